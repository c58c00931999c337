"""What a run folder holds besides checkpoint, log and model: all that is needed to repeat the run.

`recipe.yaml` with every default written out, `run.json` (versions, seed, device, command), `data.json` (every file with
its SHA-256, and what was left out and why).
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import clustvit_ros
from clustvit_ros.config import to_mapping
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.training.checkpoint import write_text
from clustvit_ros.training.dataset import Finding, LabelledImages
from clustvit_ros.training.recipe import Recipe

RECIPE_FILE, RUN_FILE, DATA_FILE = "recipe.yaml", "run.json", "data.json"
_PACKAGES = ("torch", "numpy", "opencv-python-headless", "opencv-python", "safetensors", "PyYAML", "tqdm")
_READERS = 8


def write_run_files(run_dir: Path, recipe: Recipe, device: torch.device, facts: Mapping[str, Any]) -> None:
    """Write `recipe.yaml` and `run.json`.

    Args:
        run_dir: made if it does not exist.
        recipe: as it is trained.
        device: where.
        facts: more for `run.json`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_mapping(recipe), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    write_text(run_dir / RECIPE_FILE, text)
    content = {**facts, "command": sys.argv, **describe_environment(device)}
    write_text(run_dir / RUN_FILE, json.dumps(content, indent=2) + "\n")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions of everything that takes part, the package's own source included, and the device."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    on_gpu = device.type == "cuda"
    return {
        "version": clustvit_ros.__version__,
        "source_sha256": _hash_source(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
    }


def list_data(splits: Mapping[str, LabelledImages], left_out: Sequence[Finding]) -> dict[str, Any]:
    """Every file of a run with its SHA-256.

    Args:
        splits: labelled images by the name of their split.
        left_out: files that are not used, and why.
    """
    listing: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        for name, data in splits.items():
            images = readers.map(hash_file, [pair.image for pair in data.pairs])
            label_files = sorted({pair.label for pair in data.pairs})
            labels = dict(zip(label_files, readers.map(hash_file, label_files), strict=True))
            listing[name] = [
                {"image": str(p.image), "sha256": digest, "label": str(p.label), "label_sha256": labels[p.label]}
                for p, digest in zip(data.pairs, images, strict=True)
            ]
    listing["left_out"] = [{"file": str(finding.file), "problem": finding.problem} for finding in left_out]
    return listing


def write_data_listing(run_dir: Path, listing: dict[str, Any]) -> None:
    """Write `data.json`, or compare with the one that a run to be continued has.

    Raises:
        DataError: the files are others than when the run began.
    """
    path = run_dir / DATA_FILE
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for split in sorted(set(before) | set(listing)):
            old, new = (_digests(content.get(split, [])) for content in (before, listing))
            changed = [file for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file)]
            if changed:
                raise DataError(
                    f"{run_dir}: the data changed since this run began: {', '.join(changed[:5])} ({len(changed)} "
                    f"file(s) of {split}); restore them, or pass an empty run folder"
                )
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(listing, indent=1) + "\n")


def tensorboard_writer(run_dir: Path) -> Callable[[dict[str, Any]], None]:
    """A function that logs an epoch's record for TensorBoard.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the Python package tensorboard; install it, or this package with its "
            "'tensorboard' extra"
        ) from error
    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, dict):
                for part, number in value.items():
                    if number is not None:
                        writer.add_scalar(f"{name}/{part}", number, record["epoch"])
            elif isinstance(value, (int, float)) and name != "epoch":
                writer.add_scalar(name, value, record["epoch"])
        writer.flush()

    return write


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _hash_source() -> str:
    digest = hashlib.sha256()
    root = Path(clustvit_ros.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _digests(entries: list[dict[str, str]]) -> dict[str, tuple[str | None, str | None]]:
    return {Path(e["image"]).name: (e.get("sha256"), e.get("label_sha256")) for e in entries if "image" in e}
