# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What a run folder holds besides checkpoint, log and model: all that is needed to repeat the run.

`recipe.yaml` with every default written out, `run.json` (versions, seed, device, command), `data.json` (every file with
its SHA-256, and what was left out and why).

Checkpoints that survive interruption: written beside, flushed to disk, then renamed over the last one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import pickle
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

import clustvit_ros
from clustvit_ros.config import read_json, to_mapping
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.measure.pictures import new_figure, save_figure
from clustvit_ros.paths import hash_file, replacing
from clustvit_ros.training.dataset import BadFile, LabelledImages
from clustvit_ros.training.recipe import Recipe

CHECKPOINT, DONE_FILE = "checkpoint.pt", "done.json"
_LOCK, _MEANINGS = ".lock", "meanings"


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Keep a run folder for this process, until it ends in whatever way.

    Raises:
        DataError: another process trains in it, or it cannot be written.
    """
    with writing(run_dir / _LOCK):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / _LOCK).open("w", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{run_dir}: another training runs in this folder; wait for it, or pass another folder with --out"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; until it is complete on disk, the one before stays.

    Raises:
        DataError: it cannot be written, for instance because the disk is full.
    """
    _write(path, lambda partial: torch.save(state, partial))


def write_text(path: Path, text: str) -> None:
    """Write a text file in the same way.

    Raises:
        DataError: it cannot be written.
    """
    _write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        DataError: it cannot be written.
    """
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes `path`: a full disk becomes a clear error.

    Raises:
        DataError: it cannot be written, for instance because the disk is full.
    """
    try:
        yield
    # PyTorch's writer raises RuntimeError when the disk is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        kept = "; the file written before is kept" if path.exists() else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}: cannot be written ({reason}){kept}; make room on the disk or check the folder's permissions, "
            "then run the same command to continue"
        ) from error


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    with writing(path), replacing(path) as partial:
        write(partial)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises:
        DataError: it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged file makes it stumble over
        reason = (str(error).splitlines() or [""])[0]
        # PyTorch recommends to load without `weights_only`, which would execute what is in the file.
        if isinstance(error, pickle.UnpicklingError) or not reason:
            reason = "it is damaged, or no checkpoint"
        raise DataError(f"{path}: cannot be read ({reason}); pass another run folder to start anew") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: got {type(state).__name__}, expected a checkpoint; pass another run folder")
    return state


def hash_names(images: Iterable[Path]) -> str:
    """Of which images something learns: a hash of their names in any order, wherever they lie."""
    names = "\0".join(sorted(image.name for image in images))
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def write_done(
    run_dir: Path, recipe: Recipe, train: LabelledImages, val: LabelledImages | None, scores: dict[str, Any]
) -> None:
    """Note for `read_done` what a training that came to its end learnt, and its scores."""
    content = {"recipe": to_mapping(recipe), "images": _hash_names_of(train, val), "scores": scores}
    write_text(run_dir / DONE_FILE, json.dumps(content, indent=1) + "\n")


def read_done(
    run_dir: Path, recipe: Recipe, train: LabelledImages, val: LabelledImages | None, split: str
) -> dict[str, Any] | None:
    """The scores of what was trained to its end in a folder; None where nothing was, or by another recipe.

    Args:
        run_dir: of a run, or of one of its folds.
        recipe, train, val: what it would be trained by and on, and scored on, now.
        split: what those that score it are called; empty for none.

    Raises:
        DataError: it was trained or scored on other images, as folds of another number are.
        ConfigError: the file cannot be read.
    """
    path, images = run_dir / DONE_FILE, _hash_names_of(train, val)
    content = read_json(path) if path.exists() else {}
    scores = content.get("scores")
    if content.get("recipe") != to_mapping(recipe) or not isinstance(scores, dict):
        return None
    # Versions that noted no names noted these two.
    before = str(scores.get("split", "")).removesuffix(", held out"), scores.get("images", 0)
    now = split, len(val) if val else 0
    if before != now or content.get("images", images) != images:
        told = [f"scored on {count} images of {name}" if name else "scored on none" for name, count in (before, now)]
        raise DataError(
            f"{run_dir}: was trained on other images: {told[0]}, this run would be {told[1]}; pass another run folder "
            "(--out), or the data, --folds and group that it was made with"
        )
    return scores


def _hash_names_of(train: LabelledImages, val: LabelledImages | None) -> dict[str, str]:
    parts = {"train": train.pairs, "val": val.pairs if val else []}
    return {name: hash_names(pair.image for pair in pairs) for name, pairs in parts.items()}


def check_fingerprint(path: Path, saved: str, current: dict[str, Any]) -> None:
    """Refuse to continue a run that was made in another way.

    Args:
        path: checkpoint file, for the message.
        saved: JSON of the fingerprint in it; of versions that noted no images, without `images`.
        current: fingerprint of this run.

    Raises:
        DataError: with what differs; a class list that differs is said first.
    """
    before = json.loads(saved)
    after = json.loads(json.dumps(current))
    images = after.pop("images", None)
    if before.pop("images", images) != images:
        raise DataError(
            f"{path} was made with other images; pass an empty run folder (--out), or the images, --folds and group "
            "that it was made with"
        )
    if before.get("classes") != after.get("classes"):
        old, new = ([entry["name"] for entry in fingerprint.get("classes", [])] for fingerprint in (before, after))
        raise DataError(
            f"{path} was made with another class list: got {', '.join(new)}; the checkpoint has {', '.join(old)}; "
            "pass an empty run folder (--out), or the recipe it was made with (another recipe cannot continue it)"
        )
    flat_before, flat_after = _flatten(before), _flatten(after)
    changed = [
        f"{name} {flat_before.get(name)} -> {flat_after.get(name)}"
        for name in sorted(flat_before.keys() | flat_after.keys())
        if flat_before.get(name) != flat_after.get(name)
    ]
    if changed:
        raise DataError(
            f"{path} was made with another recipe ({'; '.join(changed[:5])}); pass an empty run folder (--out), "
            "or the recipe it was made with"
        )


def _flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


RECIPE_FILE, RUN_FILE, DATA_FILE = "recipe.yaml", "run.json", "data.json"
_PACKAGES = ("torch", "numpy", "opencv-python-headless", "opencv-python", "safetensors", "PyYAML", "tqdm")
_READERS = 8


def write_run_files(
    run_dir: Path, recipe: Recipe, device: torch.device, facts: Mapping[str, Any], listing: dict[str, Any] | None = None
) -> None:
    """Write `recipe.yaml` and `run.json`, and `data.json` of labelled data.

    Args:
        run_dir: made if it does not exist.
        recipe: as it is trained.
        device: device that trains.
        facts: more for `run.json`.
        listing: as `list_data` gives it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_mapping(recipe), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    write_text(run_dir / RECIPE_FILE, text)
    content = {**facts, "command": sys.argv, **describe_environment(device)}
    write_text(run_dir / RUN_FILE, json.dumps(content, indent=2) + "\n")
    if listing is not None:
        write_text(run_dir / DATA_FILE, json.dumps(listing, indent=1) + "\n")


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
        "version": clustvit_ros.__version__, "source_sha256": _hash_source(), "python": platform.python_version(),
        "platform": platform.platform(), "packages": versions,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None, "threads": torch.get_num_threads(),
    }  # fmt: skip


def list_data(splits: Mapping[str, LabelledImages], left_out: Sequence[BadFile]) -> dict[str, Any]:
    """Every file of a run with its SHA-256.

    Args:
        splits: labelled images by the name of their split.
        left_out: files that are not used, and why.
    """
    listing: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        for name, data in splits.items():
            images = readers.map(_hash, [pair.image for pair in data.pairs])
            label_files = sorted({pair.label for pair in data.pairs})
            labels = dict(zip(label_files, readers.map(_hash, label_files), strict=True))
            listing[name] = [
                {"image": str(p.image), "sha256": digest, "label": str(p.label), "label_sha256": labels[p.label]}
                for p, digest in zip(data.pairs, images, strict=True)
            ]
    listing[_MEANINGS] = {name: data.meaning for name, data in splits.items()}
    listing["left_out"] = [{"file": str(finding.file), "problem": finding.problem} for finding in left_out]
    return listing


def warn_of_leaks(listing: Mapping[str, Any], val_name: str) -> None:
    """Tell which images the split that is scored has in common with what is learnt.

    Args:
        listing: as `list_data` gives it.
        val_name: name of that split.
    """
    no_learnt = val_name, "left_out", _MEANINGS
    learnt = {file["sha256"] for name, files in listing.items() if name not in no_learnt for file in files}
    shared = [Path(file["image"]).name for file in listing.get(val_name, ()) if file["sha256"] in learnt]
    if shared:
        told = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
        print(
            f"{len(shared)} of {len(listing[val_name])} images of {val_name} are learnt as well ({told}): it scores "
            "what was seen; take them out of one of both", file=sys.stderr,
        )  # fmt: skip


def check_data_listing(run_dir: Path, listing: dict[str, Any]) -> None:
    """Compare with the `data.json` that a run to be continued has.

    Raises:
        DataError: the files are others than when the run began.
    """
    path = run_dir / DATA_FILE
    before = read_json(path) if path.exists() else listing
    for split in sorted((set(before) | set(listing)) - {_MEANINGS}):
        old, new = (_digests(content.get(split, [])) for content in (before, listing))
        changed = [file for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file)]
        if changed:
            raise DataError(
                f"{run_dir}: the data changed since this run began: {', '.join(changed[:5])} ({len(changed)} "
                f"file(s) of {split}); restore them, or pass an empty run folder (--out)"
            )
    if before.get(_MEANINGS, listing[_MEANINGS]) != listing[_MEANINGS]:  # which earlier versions did not note
        raise DataError(
            f"{run_dir}: labels are read otherwise than when this run began; restore classes, labels and ignore in "
            "dataset.yaml, or pass an empty run folder (--out)"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def draw_log(log: Path) -> None:
    """Draw loss and mIoU over the epochs of a log of JSON lines as a PNG beside it, where matplotlib is installed.

    What a full disk or an editor made of a line is left out: the run is done, and this is its picture.
    """
    records: list[dict[str, Any]] = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and all(_is_number(record.get(key, 0)) for key in ("epoch", "loss", "miou")):
                records += [record] if {"epoch", "loss"} <= record.keys() else []
    try:
        figure, ((losses,),) = new_figure((7.0, 4.0))
    except ConfigError:
        return
    epochs = [record["epoch"] for record in records]
    losses.plot(epochs, [record["loss"] for record in records], color="tab:blue")
    losses.set_xlabel("epoch")
    losses.set_ylabel("loss", color="tab:blue")
    scored = [record for record in records if "miou" in record]
    if scored:
        scores = losses.twinx()
        scores.plot([r["epoch"] for r in scored], [r["miou"] for r in scored], "o-", color="tab:orange")
        scores.set_ylabel("mIoU, %", color="tab:orange")
    save_figure(figure, log.with_suffix(".png"))


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _hash_source() -> str:
    digest = hashlib.sha256()
    root = Path(clustvit_ros.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _digests(entries: list[dict[str, str]]) -> dict[str, tuple[str | None, str | None]]:
    return {Path(e["image"]).name: (e.get("sha256"), e.get("label_sha256")) for e in entries if "image" in e}
