"""How published data sets write their labels, each read into class ids with 255 for void."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.errors import DataError
from clustvit_ros.training.dataset import Pair, read_ids, read_image


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
        self,
        colours: Sequence[tuple[int, int, int]],
        void: Sequence[tuple[int, int, int]] = (),
        binary: bool = False,
    ) -> None:
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
        names: of the classes; everything outside of a polygon is class 0.
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
