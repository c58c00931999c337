"""Checkpoints that survive interruption: written beside, flushed to disk, then renamed over the last one."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from clustvit_ros.errors import DataError

CHECKPOINT = "checkpoint.pt"


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
    """Around whatever writes `path` by way of `<path>.partial`: a full disk becomes a clear error.

    Raises:
        DataError: it cannot be written, for instance because the disk is full.
    """
    try:
        yield
    # PyTorch's writer raises RuntimeError when the disk is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        kept = "; the file written before is kept" if path.exists() else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}: cannot be written ({reason}){kept}; make room on the disk or check the folder's permissions, "
            "then run the same command to continue"
        ) from error


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read ({reason}); pass another run folder to start anew") from error


def check_fingerprint(path: Path, saved: str, current: dict[str, Any]) -> None:
    """Refuse to continue a run that was made in another way.

    Args:
        path: of the checkpoint, for the message.
        saved: JSON of the fingerprint in it.
        current: fingerprint of this run.

    Raises:
        DataError: with what differs; a class list that differs is said first.
    """
    before = json.loads(saved)
    after = json.loads(json.dumps(current))
    if before.get("classes") != after.get("classes"):
        old, new = ([entry["name"] for entry in fingerprint.get("classes", [])] for fingerprint in (before, after))
        raise DataError(
            f"{path} was made with another class list: got {', '.join(new)}; the checkpoint has {', '.join(old)}; "
            "pass an empty run folder, or the recipe it was made with (another recipe cannot continue it)"
        )
    flat_before, flat_after = _flatten(before), _flatten(after)
    changed = [
        f"{name} {flat_before.get(name)} -> {flat_after.get(name)}"
        for name in sorted(flat_before.keys() | flat_after.keys())
        if flat_before.get(name) != flat_after.get(name)
    ]
    if changed:
        raise DataError(
            f"{path} was made with another recipe ({'; '.join(changed[:5])}); pass an empty run folder, or the recipe "
            "it was made with"
        )


def _flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
