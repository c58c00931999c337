"""Labelled pictures of many simulated worlds, in the folders that the trainer reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.sim.camera import SIM_CLASSES, SimFrame, SimulatedCamera

FRAMES_PER_WORLD = 8
_SPLITS = ("train", "val")
# A lap takes about this many seconds; frames of one world are spread over it.
_LAP_S = 150.0


def sample_frames(
    count: int, seed: int, split: str = "train", size: tuple[int, int] = (480, 640)
) -> Iterator[tuple[str, SimFrame]]:
    """Frames from as many worlds as needed, a few from each.

    Args:
        count: how many.
        seed: of the whole; no two splits or seeds share a world.
        split: "train" or "val".
        size: (height, width) in pixels.

    Yields:
        A name that is unique within the split, and the frame with its labels.
    """
    for world in range(-(-count // FRAMES_PER_WORLD)):
        rng = np.random.default_rng((seed, _SPLITS.index(split), world))
        camera = SimulatedCamera(int(rng.integers(1 << 32, 1 << 62)), size, rate_hz=1.0)
        for number in range(min(FRAMES_PER_WORLD, count - world * FRAMES_PER_WORLD)):
            second = rng.uniform(number, number + 1) * _LAP_S / FRAMES_PER_WORLD
            yield f"{world:05d}_{number}", camera.frame(int(second))
        camera.close()


def write_dataset(
    folder: Path,
    count: int,
    seed: int,
    val_share: float = 0.1,
    size: tuple[int, int] = (480, 640),
    on_frame: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Write `folder`/{train,val}/{images,labels} and `folder`/dataset.json.

    Args:
        count: pictures in all.
        seed: the same seed writes the same files.
        val_share: share of the pictures that become the validation split, of worlds of their own.
        size: (height, width) in pixels.
        on_frame: called after each picture.

    Returns:
        Pictures by split.

    Raises:
        ConfigError: a value out of range.
        DataError: the folder holds a data set already, or cannot be written.
    """
    if count < 1:
        raise ConfigError(f"sim-dataset: count is {count}, expected at least 1")
    if seed < 0:
        raise ConfigError(f"sim-dataset: seed is {seed}, expected 0 or more")
    if not 0.0 <= val_share < 1.0:
        raise ConfigError(f"sim-dataset: the validation share is {val_share}, expected 0 to below 1")
    held_out = min(max(round(count * val_share), 1), count - 1) if val_share else 0
    counts = {"train": count - held_out, "val": held_out}
    if any((folder / split).exists() for split in _SPLITS):
        raise DataError(f"{folder}: there is a train or val folder already; remove them, or pass another folder")
    for split, wanted in counts.items():
        images, labels = folder / split / "images", folder / split / "labels"
        for path in (images, labels) if wanted else ():
            path.mkdir(parents=True)
        for name, frame in sample_frames(wanted, seed, split, size):
            assert frame.labels is not None
            _write(images / f"{name}.jpg", frame.image, [cv2.IMWRITE_JPEG_QUALITY, 95])
            _write(labels / f"{name}.png", frame.labels, [])
            on_frame()
    facts = {"classes": list(SIM_CLASSES.names), "seed": seed, "size": list(size), **counts}
    (folder / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return counts


def _write(path: Path, pixels: np.ndarray, options: list[int]) -> None:
    if not cv2.imwrite(str(path), pixels, options):
        raise DataError(f"{path}: cannot be written; check the folder's permissions and the disk's free space")
