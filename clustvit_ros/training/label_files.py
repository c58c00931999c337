# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""How label files are written: ids, colours, polygons or run lengths, each read into class ids with 255 for void."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.errors import DataError
from clustvit_ros.images import read_image, read_stored


class Pair(NamedTuple):
    """Where one labelled image lies; `label` is a label image, or a file that holds the labels of many images."""

    image: Path
    label: Path

    @property
    def stem(self) -> str:
        return self.image.stem


_FARTHEST_PX = 1 << 17

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
        plain = set(void) == {IGNORE_INDEX} and all(value == class_id for value, class_id in ids.items())
        self.meaning = "" if plain else f"ids {sorted(ids.items())}, void {sorted(set(void))}"
        self._expected = f"one of {sorted(set(ids) - set(void))} or {sorted(set(void))} for void"

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
        self._binary, self.meaning = binary, f"colours {list(colours)}, void {sorted(set(void))}"
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
    labels = read_stored(path)
    if labels.ndim == 3:
        labels = _palette_indices(path, labels)
    if labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16):
        colours = " of colours; for masks in the classes' colours say `labels: colours` in dataset.yaml"
        raise DataError(
            f"{path}: got shape {labels.shape} of {labels.dtype}{colours if labels.ndim == 3 else ''}, expected an "
            "8-bit PNG of class ids"
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


def read_run_lengths(segmentation: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Decode COCO's run-length encoding: lengths of what is not set and set by turns, column by column.

    Args:
        segmentation: its `size` and `counts`, numbers or COCO's text.
        size: (height, width) of the image.

    Returns:
        (H, W) bool.

    Raises:
        ValueError, KeyError, TypeError: it is none, or of another size.
    """
    if tuple(segmentation["size"]) != size:
        raise ValueError(f"a mask of size {segmentation['size']}, the image has {list(size)}")
    counts = segmentation["counts"]
    runs = np.asarray(_read_counts(counts) if isinstance(counts, str) else counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or int(runs.sum()) != size[0] * size[1]:
        raise ValueError(f"run lengths that do not add up to {size[0]}x{size[1]} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def _read_counts(text: str) -> list[int]:
    """Numbers of five bits a character, the lowest first, from the fourth on as differences to the last but one."""
    counts: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits > 40:
            raise ValueError("run lengths that are no COCO text")
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            value -= (1 << bits) if code & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    return counts


def read_points(values: Any) -> np.ndarray:
    """(N, 2) float x and y of a polygon, from pairs or one flat list.

    Raises:
        ValueError, TypeError: not that, or far from any image.
    """
    points = np.reshape(np.asarray(values, np.float64), (-1, 2))
    if not np.isfinite(points).all() or (np.abs(points) > _FARTHEST_PX).any():
        raise ValueError("a polygon with points that no image has")
    return points


def outline(kind: str, points: np.ndarray) -> np.ndarray:
    """(N, 2) corners of a shape of labelme's.

    Args:
        kind: "rectangle", "circle" or any other.
        points: (M, 2) two opposite corners of a rectangle, or all four, as other programs write them; centre of a
            circle and a point on it; else the corners themselves.
    """
    if kind == "rectangle":
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    if kind == "circle":
        angles = np.linspace(0.0, 2.0 * np.pi, 64, endpoint=False)
        radius_px = float(np.hypot(*(points[1] - points[0])))
        return points[0] + radius_px * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points


def fill_polygon(labels: np.ndarray, points: np.ndarray, value: int) -> None:
    """Set the pixels whose centres lie inside; OpenCV's fillPoly adds half a pixel all around.

    Args:
        labels: (H, W) ids to paint on.
        points: (N, 2) x and y in pixels from the outer corner of the first pixel; even-odd where edges cross.
        value: the id.
    """
    following = np.roll(points, -1, axis=0)
    ends = np.stack([points[:, 1], following[:, 1]])
    first, last = np.sort(np.clip(np.ceil(ends - 0.5), 0, labels.shape[0]).astype(np.int64), axis=0)
    # Every edge crosses the centre lines of its rows, and to the right of there inside and outside change places.
    edge = np.repeat(np.arange(len(points)), last - first)
    if not edge.size:
        return
    rows = first[edge] + np.arange(edge.size) - np.searchsorted(edge, edge)
    (x, y), (dx, dy) = points[edge].T, (following - points)[edge].T
    columns = np.clip(np.ceil(x + (rows + 0.5 - y) / dy * dx - 0.5), 0, labels.shape[1]).astype(np.int64)
    top, left, bottom = rows.min(), columns.min(), rows.max() + 1
    crossings = np.zeros((bottom - top, labels.shape[1] + 1 - left), np.uint8)
    np.add.at(crossings, (rows - top, columns - left), 1)
    inside = np.cumsum(crossings[:, :-1], axis=1, dtype=np.uint8) & 1
    labels[top:bottom, left:][inside > 0] = value


def paint_mask(labels: np.ndarray, mask: np.ndarray, corner: tuple[int, int], value: int) -> None:
    """Set the pixels of a smaller (h, w) bool `mask` whose first pixel lies at (row, column) `corner`, if at all."""
    top, left = corner
    inside = labels[max(top, 0) : max(top + mask.shape[0], 0), max(left, 0) : max(left + mask.shape[1], 0)]
    inside[mask[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]]] = value


def paint_where(mask: np.ndarray, labels: np.ndarray, value: int) -> None:
    """Set the pixels of an (H, W) bool `mask`.

    Raises:
        DataError: it is of another size.
    """
    if mask.shape != labels.shape:
        raise DataError(f"its segments are {mask.shape}, the image {labels.shape}")
    labels[mask] = value
