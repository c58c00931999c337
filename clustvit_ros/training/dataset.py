"""Labelled images in folders: `images/<stem>.*` beside `labels/<stem>.png`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.errors import DataError
from clustvit_ros.image_files import IMAGE_SUFFIXES, list_images


class Sample(NamedTuple):
    """One labelled image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8 class ids, 255 = void.
        stem: file name without suffix.
    """

    image: np.ndarray
    labels: np.ndarray
    stem: str


class LabelledImages:
    """Pairs of image and label files with the same stem, sorted by it.

    Args:
        images_dir: folder of images.
        labels_dir: folder of single-channel 8-bit PNGs.
        num_classes: ids from here up to 254 are errors.

    Raises:
        DataError: a folder is missing or empty, or files lack their partner (each is named).
    """

    def __init__(self, images_dir: Path, labels_dir: Path, num_classes: int) -> None:
        self.num_classes = num_classes
        images = find_images(images_dir)
        if not Path(labels_dir).is_dir():
            raise DataError(f"label folder {labels_dir} does not exist; expected a folder of <stem>.png")
        labels = {path.stem: path for path in Path(labels_dir).glob("*.png")}
        missing = sorted(images.keys() - labels.keys())
        if missing:
            raise DataError(f"{labels_dir}: {len(missing)} of {len(images)} images have no label: {_names(missing)}")
        self._pairs = [(images[stem], labels[stem]) for stem in sorted(images)]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read one pair.

        Raises:
            DataError: a file cannot be read, the sizes differ, or a label id has no class.
        """
        image_path, label_path = self._pairs[index]
        image = read_image(image_path)
        labels = read_labels(label_path, self.num_classes)
        if labels.shape != image.shape[:2]:
            raise DataError(
                f"{label_path}: labels are {labels.shape}, the image {image_path.name} is {image.shape[:2]}"
            )
        return Sample(image, labels, image_path.stem)


def find_images(images_dir: Path) -> dict[str, Path]:
    """Image files of a folder by stem.

    Raises:
        DataError: no such folder, no image in it, or one stem twice.
    """
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise DataError(f"image folder {images_dir} does not exist")
    found: dict[str, Path] = {}
    for path in list_images(images_dir):
        if path.stem in found:
            raise DataError(f"{images_dir}: {found[path.stem].name} and {path.name} share a stem; keep one of them")
        found[path.stem] = path
    if not found:
        raise DataError(f"{images_dir}: no image found, expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found


def read_image(path: Path) -> np.ndarray:
    """Read an image file: (H, W, 3) uint8 RGB.

    Raises:
        DataError: it cannot be read.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path}: cannot be read as an image; replace or remove the file")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_labels(path: Path, num_classes: int) -> np.ndarray:
    """Read a label file: (H, W) uint8 class ids, 255 = void.

    Raises:
        DataError: it is not a single-channel 8-bit image, or holds an id without a class.
    """
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if labels is None or labels.ndim != 2 or labels.dtype != np.uint8:
        got = "an unreadable file" if labels is None else f"shape {labels.shape} of {labels.dtype}"
        raise DataError(f"{path}: got {got}, expected a single-channel 8-bit PNG of class ids")
    wrong = np.unique(labels[(labels >= num_classes) & (labels != IGNORE_INDEX)])
    if wrong.size:
        raise DataError(
            f"{path}: label ids {wrong[:10].tolist()} have no class, expected 0 to {num_classes - 1} or "
            f"{IGNORE_INDEX} for void; check the model's class list"
        )
    return labels


def _names(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
