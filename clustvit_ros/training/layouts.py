# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Data sets by the folder they lie in: a `dataset.yaml`, plain folders, or a published data set as its authors ship it.

Known without a `dataset.yaml`: `<split>/{images,labels}`; ADE20K (Zhou et al., arXiv 1608.05442; the scene-parsing
release); SUIM (Islam et al., arXiv 2004.01241); RumexWeeds (Güldenring et al. 2023) with its CVAT polygons; Cityscapes
(Cordts et al., arXiv 1604.01685), fine annotations.

How published data sets write their labels, each read into class ids with 255 for void.
"""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX, ClassEntry, ClassSet, load_class_set, write_out_classes
from clustvit_ros.config import from_mapping, read_yaml
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.images import list_images, read_image
from clustvit_ros.training.dataset import LabelledImages, LabelReader, Pair, find_images, read_ids


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


DATASET_FILE = "dataset.yaml"
_SUIM_HOLD_OUT = 7  # every seventh image of train_val, since its authors name no validation split

_SUIM = ClassSet(
    ("waterbody", "diver", "plant", "wreck", "robot", "reef", "fish", "sea_floor"),
    (
        (0, 0, 0), (0, 0, 255), (0, 255, 0), (0, 255, 255), (255, 0, 0), (255, 0, 255), (255, 255, 0), (255, 255, 255),
    ),
)  # fmt: skip
_RUMEXWEEDS = ClassSet(("background", "rumex_obtusifolius", "rumex_crispus"), ((0, 0, 0), (0, 255, 0), (0, 0, 255)))
# Cityscapes' label ids of the 19 classes that are scored, in the order of their training ids.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class _Split:
    """Where a split lies, relative to the data set: folders, and optionally a text file that names its stems."""

    images: str
    labels: str
    list: str = ""


@dataclass(frozen=True)
class _DatasetFile:
    """What `dataset.yaml` may hold.

    Args:
        layout: "folders", or a published data set whose classes and splits are known.
        root: folder of the data, relative to the file.
        classes: names and colours, in the order of their ids.
        labels: "ids" (single-channel PNGs) or "colours" (masks in the classes' colours).
        ignore: values that mean void: ids, or colours as [red, green, blue].
        label_suffix: a label file is called <stem of its image><label_suffix>.
        splits: image lists by split name.
        group: which images were taken together, for instance on one drive: see `group_images`.
    """

    layout: Literal["folders", "ade20k", "suim", "rumexweeds", "cityscapes"] = "folders"
    root: str = "."
    classes: tuple[ClassEntry, ...] = ()
    labels: Literal["ids", "colours"] = "ids"
    ignore: tuple[Any, ...] = ()
    label_suffix: str = ".png"
    splits: dict[str, Any] = field(default_factory=dict)
    group: str | tuple[str, ...] = ""


@dataclass(frozen=True)
class DataSet:
    """A data set whose files have been found, but not read.

    Args:
        root: its folder.
        classes: None for plain folders, which do not say.
        splits: split name -> function (number of classes, strict) that gives its images.
        group: which images were taken together, as `group_images` has it; empty where nobody said.
    """

    root: Path
    classes: ClassSet | None
    splits: dict[str, Callable[[int, bool], LabelledImages]]
    group: str | tuple[str, ...] = ""

    def open(self, split: str, num_classes: int, strict: bool = True) -> LabelledImages:
        """The images of a split.

        Args:
            split: its name.
            num_classes: number of the model's classes; it has to be the data set's own where that is known.
            strict: False leaves out images without labels.

        Raises:
            DataError: no such split, an empty one, or images without labels.
        """
        if split not in self.splits:
            raise DataError(f"{self.root}: has no split {split!r}, only {', '.join(self.splits) or 'none'}")
        if self.classes is not None and len(self.classes) != num_classes:
            raise DataError(f"{self.root}: has {len(self.classes)} classes, the model {num_classes}")
        return self.splits[split](num_classes, strict)


def open_data_set(root: Path) -> DataSet:
    """Find out what a folder holds.

    Raises:
        DataError: nothing that is known.
        ConfigError: its `dataset.yaml` cannot be used.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist")
    if (root / DATASET_FILE).is_file():
        return _from_file(root / DATASET_FILE)
    for layout, open_layout in _LAYOUTS.items():
        if _MARKS[layout](root):
            return open_layout(root)
    return _plain_folders(root)


def _plain_folders(root: Path) -> DataSet:
    def folders(split: str) -> Callable[[int, bool], LabelledImages]:
        return lambda num_classes, strict: LabelledImages(
            root / split / "images", root / split / "labels", num_classes, strict
        )

    # train and val are always there to ask for, so that a missing folder is named.
    names = {"train", "val", *(path.parent.name for path in root.glob("*/images"))}
    return DataSet(root, None, {name: folders(name) for name in sorted(names)})


def _from_file(path: Path) -> DataSet:
    mapping = read_yaml(path)
    write_out_classes(mapping, str(path))
    content = from_mapping(_DatasetFile, mapping, str(path))
    root = path.parent / content.root
    if content.layout != "folders":
        if content.classes or content.splits:
            raise ConfigError(f"{path}: layout {content.layout} has its own classes and splits; leave them out")
        return replace(_LAYOUTS[content.layout](root), group=content.group)
    if not content.classes:
        raise ConfigError(f"{path}: classes is missing, expected at least one {{name, colour}} entry")
    if not content.splits:
        raise ConfigError(f"{path}: splits is missing, expected for instance train: {{images: ..., labels: ...}}")
    classes = ClassSet.of(content.classes)
    read = _reader(content, classes, path)
    splits = {name: from_mapping(_Split, split, f"{path}: splits: {name}") for name, split in content.splits.items()}

    def folders(split: _Split) -> Callable[[int, bool], LabelledImages]:
        def open_split(num_classes: int, strict: bool) -> LabelledImages:
            images = find_images(root / split.images)
            stems = sorted(images)
            if split.list:
                stems = _read_list(root / split.list)
                unknown = [stem for stem in stems if stem not in images]
                if unknown:
                    raise DataError(f"{root / split.list}: {len(unknown)} names have no image: {unknown[:10]}")
            pairs = [Pair(images[stem], root / split.labels / (stem + content.label_suffix)) for stem in stems]
            return LabelledImages.of_pairs(pairs, num_classes, read, str(root / split.labels), strict)

        return open_split

    return DataSet(root, classes, {name: folders(split) for name, split in splits.items()}, content.group)


def _reader(content: _DatasetFile, classes: ClassSet, path: Path) -> LabelReader:
    if content.labels == "ids":
        void = content.ignore or (IGNORE_INDEX,)
        if not all(isinstance(value, int) and 0 <= value <= 255 for value in void):
            raise ConfigError(f"{path}: ignore is {list(void)}, expected label ids 0..255")
        return IdLabels({index: index for index in range(len(classes))}, (*void, IGNORE_INDEX))
    if not all(isinstance(colour, list) and len(colour) == 3 for colour in content.ignore):
        raise ConfigError(f"{path}: ignore is {list(content.ignore)}, expected colours [red, green, blue]")
    return ColourLabels(classes.colours, [(c[0], c[1], c[2]) for c in content.ignore])


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return [Path(line.strip()).stem for line in lines if line.strip()]


def _ade20k(root: Path) -> DataSet:
    """images/{training,validation}/*.jpg, annotations/...png: 0 is void, 1..150 are the classes."""
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    classes = load_class_set("ade20k")
    read = IdLabels({index + 1: index for index in range(len(classes))}, void=(0,))

    def folders(name: str) -> Callable[[int, bool], LabelledImages]:
        return lambda num_classes, strict: _by_stem(
            root / "images" / name, root / "annotations" / name, ".png", num_classes, read, strict
        )

    return DataSet(root, classes, {"train": folders("training"), "val": folders("validation")})


def _suim(root: Path) -> DataSet:
    """{train_val,TEST}/images/*.jpg and masks/*.bmp, whose colours are the corners of the RGB cube."""
    read = ColourLabels(_SUIM.colours, binary=True)
    test = "TEST" if (root / "TEST").is_dir() else "test"

    def part(folder: str, chosen: Callable[[int], bool]) -> Callable[[int, bool], LabelledImages]:
        def open_split(num_classes: int, strict: bool) -> LabelledImages:
            data = _by_stem(root / folder / "images", root / folder / "masks", ".bmp", num_classes, read, strict)
            kept = data.subset(index for index in range(len(data)) if chosen(index))
            kept.findings = data.findings
            return kept

        return open_split

    splits = {
        "train": part("train_val", lambda index: index % _SUIM_HOLD_OUT > 0),
        "val": part("train_val", lambda index: index % _SUIM_HOLD_OUT == 0),
        "test": part(test, lambda index: True),
    }
    return DataSet(root, _SUIM, splits)


def _rumexweeds(root: Path) -> DataSet:
    """<location>/<seq>/imgs/*.png with <location>/<seq>/annotations_seg.xml; dataset_splits/*random_<split>.txt."""
    read = PolygonLabels(_RUMEXWEEDS.names)

    def listed(split: str) -> Callable[[int, bool], LabelledImages]:
        def open_split(num_classes: int, strict: bool) -> LabelledImages:
            lists = sorted((root / "dataset_splits").glob(f"*random_{split}.txt"))
            names = [line.strip() for path in lists for line in path.read_text(encoding="utf-8").splitlines()]
            images = [root / name for name in dict.fromkeys(names) if name]
            pairs = [Pair(image, image.parent.parent / "annotations_seg.xml") for image in images]
            return LabelledImages.of_pairs(pairs, num_classes, read, f"{root} ({split})", strict)

        return open_split

    return DataSet(root, _RUMEXWEEDS, {split: listed(split) for split in ("train", "val", "test")})


def _cityscapes(root: Path) -> DataSet:
    """leftImg8bit/<split>/<city>/<name>_leftImg8bit.png with gtFine/<split>/<city>/<name>_gtFine_labelIds.png."""
    scored = {label_id: index for index, label_id in enumerate(_CITYSCAPES_IDS)}
    read = IdLabels(scored, void=[value for value in (*range(34), IGNORE_INDEX) if value not in scored])

    def cities(split: str) -> Callable[[int, bool], LabelledImages]:
        def open_split(num_classes: int, strict: bool) -> LabelledImages:
            pairs = []
            for city in sorted((root / "leftImg8bit" / split).glob("*")):
                for image in list_images(city):
                    name = image.stem.removesuffix("_leftImg8bit") + "_gtFine_labelIds.png"
                    pairs.append(Pair(image, root / "gtFine" / split / city.name / name))
            return LabelledImages.of_pairs(pairs, num_classes, read, f"{root} ({split})", strict)

        return open_split

    return DataSet(root, load_class_set("cityscapes"), {split: cities(split) for split in ("train", "val")})


def _by_stem(
    images_dir: Path, labels_dir: Path, suffix: str, num_classes: int, read: LabelReader, strict: bool
) -> LabelledImages:
    images = find_images(images_dir)
    pairs = [Pair(images[stem], labels_dir / (stem + suffix)) for stem in sorted(images)]
    return LabelledImages.of_pairs(pairs, num_classes, read, str(labels_dir), strict)


_MARKS: dict[str, Callable[[Path], bool]] = {
    "ade20k": lambda root: (root / "ADEChallengeData2016").is_dir() or (root / "annotations" / "training").is_dir(),
    "suim": lambda root: (root / "train_val" / "masks").is_dir(),
    "rumexweeds": lambda root: (root / "dataset_splits").is_dir(),
    "cityscapes": lambda root: (root / "leftImg8bit").is_dir(),
}
_LAYOUTS: dict[str, Callable[[Path], DataSet]] = {
    "ade20k": _ade20k, "suim": _suim, "rumexweeds": _rumexweeds, "cityscapes": _cityscapes,
}  # fmt: skip
