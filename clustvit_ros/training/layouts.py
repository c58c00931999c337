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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clustvit_ros.classes import IGNORE_INDEX, ClassEntry, ClassSet, load_class_set, write_out_classes
from clustvit_ros.config import from_mapping, read_yaml
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.images import IMAGE_SUFFIXES, list_images
from clustvit_ros.training.dataset import LabelledImages, find_pairs
from clustvit_ros.training.label_files import ColourLabels, IdLabels, LabelReader, Pair, PolygonLabels

DATASET_FILE = "dataset.yaml"
_LABEL_FOLDERS, _VALIDATION = ("labels", "masks", "annotations"), ("val", "valid", "validation")
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
        classes: in the order of their ids: names, or names and colours (`colour` or `color`).
        labels: "ids" (single-channel PNGs) or "colours" (masks in the classes' colours).
        ignore: values that mean void: ids, or colours as [red, green, blue].
        label_suffix: a label file is called <stem of its image><label_suffix>.
        splits: image lists by split name; without them, folders named as usual: `train/images` with `train/labels`, or
            `images/train` with `labels/train`; `masks` and `annotations` for labels, `valid` and `validation` for val.
        group: which images were taken together, for instance on one drive: see `group_images`.
    """

    layout: Literal["folders", "ade20k", "suim", "rumexweeds", "cityscapes"] = "folders"
    root: str = "."
    classes: tuple[Any, ...] = ()
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
            raise DataError(
                f"{self.root}: has no split {split!r}, only {', '.join(self.splits) or 'none'}; expected "
                f"{split}/images and {split}/labels there, or a dataset.yaml whose splits name it"
            )
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
        raise ConfigError(f"{path}: classes is missing, expected at least one name, or {{name, colour}} entry")
    classes = _classes(content, path)
    read = _reader(content, classes, path)
    splits = {name: from_mapping(_Split, split, f"{path}: splits: {name}") for name, split in content.splits.items()}
    splits = splits or _usual_splits(root)
    if not splits:
        raise ConfigError(
            f"{path}: splits is missing, and {root} holds no train/images and train/labels, or images/train and "
            "labels/train; expected for instance train: {images: ..., labels: ...}"
        )

    def folders(split: _Split) -> Callable[[int, bool], LabelledImages]:
        def open_split(num_classes: int, strict: bool) -> LabelledImages:
            pairs = find_pairs(root / split.images, root / split.labels, content.label_suffix)
            if split.list:
                by_stem = {pair.stem: pair for pair in pairs}
                stems = _read_list(root / split.list)
                unknown = [stem for stem in stems if stem not in by_stem]
                if unknown:
                    raise DataError(f"{root / split.list}: {len(unknown)} names have no image: {unknown[:10]}")
                pairs = [by_stem[stem] for stem in stems]
            return LabelledImages.of_pairs(pairs, num_classes, read, str(root / split.labels), strict)

        return open_split

    return DataSet(root, classes, {name: folders(split) for name, split in splits.items()}, content.group)


def _classes(content: _DatasetFile, path: Path) -> ClassSet:
    defaults = ClassSet.numbered(len(content.classes)).colours
    entries = []
    for index, entry in enumerate(content.classes):
        if isinstance(entry, dict) and "color" in entry:
            entry = {("colour" if key == "color" else key): value for key, value in entry.items()}
        if isinstance(entry, str) or (isinstance(entry, dict) and "colour" not in entry):
            if content.labels == "colours":
                raise ConfigError(f"{path}: classes[{index}] has no colour, which labels: colours needs")
            entry = {"colour": defaults[index], **({"name": entry} if isinstance(entry, str) else entry)}
        entries.append(from_mapping(ClassEntry, entry, f"{path}: classes[{index}]"))
    return ClassSet.of(entries)


def _usual_splits(root: Path) -> dict[str, _Split]:
    found: dict[str, _Split] = {}
    for name, split in (("train", "train"), *((name, "val") for name in _VALIDATION), ("test", "test")):
        for labels in _LABEL_FOLDERS:
            for images, masks in ((f"{name}/images", f"{name}/{labels}"), (f"images/{name}", f"{labels}/{name}")):
                if (root / images).is_dir() and (root / masks).is_dir():
                    found.setdefault(split, _Split(images, masks))
    return found


def _reader(content: _DatasetFile, classes: ClassSet, path: Path) -> LabelReader:
    if content.labels == "ids":
        void = content.ignore or (IGNORE_INDEX,)
        if not all(isinstance(value, int) and 0 <= value <= 255 for value in void):
            raise ConfigError(f"{path}: ignore is {list(void)}, expected label ids 0..255")
        return IdLabels({index: index for index in range(len(classes))}, (*void, IGNORE_INDEX))
    if not all(isinstance(colour, list) and len(colour) == 3 for colour in content.ignore):
        raise ConfigError(f"{path}: ignore is {list(content.ignore)}, expected colours [red, green, blue]")
    ignored = [(colour[0], colour[1], colour[2]) for colour in content.ignore]
    meanings: dict[tuple[int, int, int], str] = {}
    pairs = [*zip(classes.names, classes.colours, strict=True), *(("ignore", colour) for colour in ignored)]
    for name, colour in pairs:
        if meanings.setdefault(colour, name) != name:
            raise ConfigError(
                f"{path}: {list(colour)} is the colour of {meanings[colour]} and of {name}, expected another for each"
            )
    return ColourLabels(classes.colours, ignored)


def _read_lines(path: Path) -> list[str]:
    """What a text file names, one a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read ({error.reason}), expected text in UTF-8; save it as that") from error
    return [line.strip() for line in lines if line.strip()]


def _read_list(path: Path) -> list[str]:
    names = [Path(line) for line in _read_lines(path)]
    # Stems may hold dots, as 2007.00001 does.
    return [name.stem if name.suffix.lower() in IMAGE_SUFFIXES else name.name for name in names]


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
            images = [root / name for name in dict.fromkeys(line for path in lists for line in _read_lines(path))]
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
    pairs = find_pairs(images_dir, labels_dir, suffix)
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
