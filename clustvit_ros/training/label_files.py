# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""How label files are written: ids, colours or polygons, each read into class ids with 255 for void."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.errors import DataError
from clustvit_ros.images import read_image


class Pair(NamedTuple):
    """Where one labelled image lies; `label` is a label image, or a file that holds the labels of many images."""

    image: Path
    label: Path

    @property
    def stem(self) -> str:
        return self.image.stem


LabelReader = Callable[[Pair], np.ndarray]
"""Reads the labels of a pair: (H, W) uint8 class ids, 255 = void; raises DataError."""


class IdLabels:
    """Single-channel 8-bit images whose values stand for classes.

    Args:
        ids: value in the file to class id; values that are neither here nor void are errors.
        void: values without a class.
    """

    def __init__(self, ids: Mapping[int, int], void: Sequence[int] = (IGNORE_INDEX,)) -> None:
        # Void wins: a class may give up its value, as data sets with "other" as class 0 do.
        self._table = np.full(256, -1, np.int16)
        for value, class_id in ids.items():
            self._table[value] = class_id
        self._table[list(void)] = IGNORE_INDEX
        self._expected = f"one of {sorted(set(ids) - set(void))} or {sorted(void)} for void"

    def __call__(self, pair: Pair) -> np.ndarray:
        values = read_ids(pair.label)
        labels = self._table[values]
        if (labels < 0).any():
            wrong = np.unique(values[labels < 0])[:10].tolist()
            raise DataError(f"{pair.label}: label ids {wrong} have no class, expected {self._expected}")
        return labels.astype(np.uint8)


class ColourLabels:
    """Colour images whose colours stand for classes.

    Args:
        colours: (red, green, blue) of each class, in the order of their ids.
        void: colours without a class.
        binary: every channel is 0 or 255, and values between, which lossy formats and resized masks have, are
            rounded to the nearer one (as SUIM's masks need).
    """

    def __init__(
        self, colours: Sequence[tuple[int, int, int]], void: Sequence[tuple[int, int, int]] = (), binary: bool = False,
    ) -> None:  # fmt: skip
        self._binary = binary
        table = {int(_code(np.array(colour))): index for index, colour in enumerate(colours)}
        table.update({int(_code(np.array(colour))): IGNORE_INDEX for colour in void})
        self._codes = np.array(sorted(table), np.int64)
        self._ids = np.array([table[code] for code in self._codes.tolist()], np.uint8)

    def __call__(self, pair: Pair) -> np.ndarray:
        image = read_image(pair.label)
        if self._binary:
            image = np.where(image > 127, 255, 0)
        codes = _code(image)
        place = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = self._codes[place] != codes
        if unknown.any():
            wrong = [[int(c) >> 16, int(c) >> 8 & 255, int(c) & 255] for c in np.unique(codes[unknown])[:5]]
            raise DataError(
                f"{pair.label}: {100 * unknown.mean():.2f} % of the pixels have colours of no class, such as {wrong}; "
                "add them to classes or ignore, or write masks without lossy compression"
            )
        return self._ids[place]


class PolygonLabels:
    """CVAT annotation files ("CVAT for images"): `<image name=...><polygon label=... points="x,y;x,y">`.

    Args:
        names: class names; everything outside of a polygon is class 0.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._ids = {name: index for index, name in enumerate(names)}

    def __call__(self, pair: Pair) -> np.ndarray:
        images = _parse_cvat(pair.label)
        if pair.image.name not in images:
            raise DataError(f"{pair.label}: holds no <image> named {pair.image.name}")
        image = images[pair.image.name]
        try:
            size = int(image.attrib["height"]), int(image.attrib["width"])
            labels = np.zeros(size, np.uint8)
            for polygon in image.iterfind("polygon"):
                name = polygon.attrib["label"].strip().lower()
                if name not in self._ids:
                    raise DataError(f"{pair.label}: {pair.image.name} has a polygon of {name!r}, which is no class")
                points = [[float(v) for v in point.split(",")] for point in polygon.attrib["points"].split(";")]
                cv2.fillPoly(labels, [np.array(points).astype(np.int32)], (self._ids[name],))
        except (KeyError, ValueError, cv2.error) as error:
            raise DataError(f"{pair.label}: the entry of {pair.image.name} cannot be read ({error!r})") from error
        return labels


@functools.lru_cache(maxsize=64)
def _parse_cvat(path: Path) -> dict[str, ElementTree.Element]:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path}: cannot be read as CVAT annotations ({error})") from error
    return {Path(image.attrib.get("name", "")).name: image for image in root.iterfind("image")}


def _code(colours: np.ndarray) -> np.ndarray:
    """(..., 3) colours as one number each."""
    wide = colours.astype(np.int64)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def read_labels(path: Path, num_classes: int) -> np.ndarray:
    """Read a label file: (H, W) uint8 class ids, 255 = void.

    Raises:
        DataError: it is not a single-channel 8-bit image, or holds an id without a class.
    """
    labels = read_ids(path)
    wrong = np.unique(labels[(labels >= num_classes) & (labels != IGNORE_INDEX)])
    if wrong.size:
        raise DataError(
            f"{path}: label ids {wrong[:10].tolist()} have no class, expected 0 to {num_classes - 1} or "
            f"{IGNORE_INDEX} for void; check the model's class list"
        )
    return labels


def read_ids(path: Path) -> np.ndarray:
    """Read an image of ids: (H, W) uint8.

    Ids are grey values of 8 or 16 bits, indices of a palette (whose colours mean nothing), or the equal colours of RGB
    and RGBA images; 65535 of 16 bits is 255.

    Raises:
        DataError: it is something else, or an id is above 255.
    """
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if labels is not None and labels.ndim == 3:
        labels = _palette_indices(path, labels)
    if labels is None or labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16):
        got = "an unreadable file" if labels is None else f"shape {labels.shape} of {labels.dtype}"
        colours = " of colours; for masks in the classes' colours say `labels: colours` in dataset.yaml"
        raise DataError(
            f"{path}: got {got}{colours if labels is not None and labels.ndim == 3 else ''}, expected an 8-bit PNG of "
            "class ids"
        )
    if labels.dtype == np.uint16:
        wrong = np.unique(labels[(labels > IGNORE_INDEX) & (labels < 65535)])
        if wrong.size:
            raise DataError(f"{path}: label ids {wrong[:10].tolist()} have no class, expected at most {IGNORE_INDEX}")
        labels = np.minimum(labels, IGNORE_INDEX).astype(np.uint8)
    return labels


def _palette_indices(path: Path, colours: np.ndarray) -> np.ndarray:
    """(H, W) ids of a file that OpenCV shows in colours; `colours` itself where they are none."""
    try:
        from PIL import Image

        with Image.open(path) as image:
            if image.mode == "P":
                return np.array(image)
    except ImportError as error:
        raise DataError(f"{path}: needs the Python package pillow to tell palettes; pip install pillow") from error
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove the file") from error
    grey = colours[..., 0]
    return grey if (colours[..., 1:3] == grey[..., None]).all() else colours
