# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Labels of COCO (instances, stuff and panoptic) and of labelme to PNGs of class ids with a `dataset.yaml`.

Every value of such a file is untrusted: what cannot be used is a DataError that names the file and the image.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import yaml

from clustvit_ros.classes import IGNORE_INDEX, ClassSet
from clustvit_ros.errors import ConfigError, DataError, ImageError
from clustvit_ros.images import IMAGE_SUFFIXES, check_pixels, orientation, read_image
from clustvit_ros.training import label_files
from clustvit_ros.training.layouts import DATASET_FILE

VOID = "void"
_BACKGROUNDS, _VOIDS = ("background", "_background_"), ("void", "ignore", "__ignore__")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MAX_PIXELS, _LONGEST_STEM_BYTES = 1 << 28, 200
# What values of other types, sizes and signs than expected lead to.
_MALFORMED = KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError, cv2.error
_LABELME_SHAPES = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2}


class Region(NamedTuple):
    """A part of an image and its class.

    Attributes:
        name: of the class.
        area: in pixels, 0 where that does not matter: larger ones are painted first.
        paint: sets the region's pixels in (H, W) labels to an id.
    """

    name: str
    area: float
    paint: Callable[[np.ndarray, int], None]


class Annotated(NamedTuple):
    """One image of a labelled set.

    Attributes:
        name: what the labels' file calls the image, relative to its folder of images.
        image: where it lies.
        size: (height, width) that it was labelled at.
        regions: gives what is labelled, the uppermost last; raises DataError.
    """

    name: str
    image: Path
    size: tuple[int, int]
    regions: Callable[[], list[Region]]


class Source(NamedTuple):
    """Labels that have been opened.

    Attributes:
        split: "train", "val" or "test" where names say so; else empty.
        names: classes that occur, in the order of the file.
        images: what is labelled.
    """

    split: str
    names: tuple[str, ...]
    images: list[Annotated]


@dataclass
class Conversion:
    """What became of labels.

    Args:
        counts: images by split.
        classes: names in the order of their ids.
        problems: images that are left out, and why.
        left_out: shapes without an area, by kind, and images without a labelled pixel.
        missing: classes without a pixel in training images, which `train` refuses.
    """

    counts: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    missing: tuple[str, ...] = ()


def convert_labels(
    sources: Sequence[Path], out: Path, images: Path | None = None, classes: Sequence[str] = (),
    background: str = "background", val_every: int = 10, copy: bool = False,
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> Conversion:  # fmt: skip
    """Write a data set that the trainer takes as it is: `dataset.yaml` and {train,val,...}/{images,labels}.

    Args:
        sources: COCO JSON files, or folders of labelme's JSON files.
        out: new or empty folder.
        images: folder of a COCO file's images; None looks beside it.
        classes: which classes, in the order of their ids; empty for all that occur. Others count as not labelled.
        background: class of pixels that are not labelled; "void" leaves them without a class.
        val_every: where no name says the split, every so many-th image, of fewer the last, is for validation; 0: none.
        copy: copy images, instead of linking to them.
        progress: wraps the iteration over images.

    Returns:
        What was written, and what was left out.

    Raises:
        ConfigError: options that do not fit the labels, or a folder with files in it.
        DataError: labels that cannot be read, or of which nothing is left.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there and not empty; expected a new or empty folder")
    done = Conversion()
    opened = [_open_labelme(path, done) if path.is_dir() else _open_coco(path, images, done) for path in sources]
    names = _chosen_classes([name for source in opened for name in source.names], classes, background)
    place = {name: index for index, name in enumerate(names)}
    place |= dict.fromkeys(_VOIDS, IGNORE_INDEX) | dict.fromkeys(_BACKGROUNDS, len(names))
    unlabelled, used = IGNORE_INDEX if background == VOID else len(names), set[str]()
    painted = {split: np.zeros(256, bool) for split in _SPLITS.values()}
    for source in opened:
        every = min(val_every, len(source.images))
        for number, annotated in enumerate(progress(source.images), 1):
            held_out = every > 1 and number % every == 0
            split = source.split or ("val" if held_out else "train")
            try:
                labels = _paint(annotated, place, unlabelled)
            except (DataError, ImageError) as error:
                done.problems.append(f"{annotated.name}: {error}")
                continue
            if (labels == IGNORE_INDEX).all():
                done.left_out["image without labels"] += 1
                continue
            _write_pair(out / split, _free_stem(annotated.name, split, used), annotated.image, labels, copy)
            painted[split][np.unique(labels)] = True
            done.counts[split] = done.counts.get(split, 0) + 1
    if not done.counts:
        first = done.problems[0] if done.problems else "nothing is labelled in any of them"
        raise DataError(f"{sources[0]}: no image could be converted; the first: {first}")
    has_background = any(part[len(names)] for part in painted.values())
    done.classes = (*names, _BACKGROUNDS[0] if background == VOID else background) if has_background else names
    done.missing = tuple(name for index, name in enumerate(done.classes) if not painted["train"][index])
    folders = {split: {"images": f"{split}/images", "labels": f"{split}/labels"} for split in done.counts}
    classes_named = replace(ClassSet.numbered(len(done.classes)), names=done.classes)
    content = {"classes": classes_named.entries(), "splits": folders}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    (out / DATASET_FILE).write_text(text, encoding="utf-8")
    return done


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON ({error}); export the labels again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: got {type(content).__name__} at the top level, expected COCO's or labelme's object")
    return content


def _open_coco(path: Path, images: Path | None, done: Conversion) -> Source:
    content = _read_object(path)
    if "shapes" in content:
        raise DataError(f"{path}: is labelme's file of one image; pass its folder")
    try:
        return _coco_source(path, content, images, done.left_out)
    except _MALFORMED as error:
        raise DataError(
            f"{path}: cannot be read as COCO labels ({_reason(error)}); expected images, annotations and categories as "
            "https://cocodataset.org/#format-data has them"
        ) from error


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _coco_source(path: Path, content: Mapping[str, Any], images: Path | None, left_out: Counter[str]) -> Source:
    category_names = {int(entry["id"]): str(entry["name"]).strip() for entry in content["categories"]}
    panoptic = any("segments_info" in entry for entry in content["annotations"])
    if not (listed := content["images"]):
        raise DataError(f"{path}: lists no images, expected at least one")
    # Exports that were put together list an image once for each of them: what is labelled belongs to its file.
    files = {entry["id"]: str(entry["file_name"]) for entry in listed}
    annotations: dict[str, list[dict[str, Any]]] = {}
    used_ids: set[int] = set()
    for entry in content["annotations"]:
        if entry["image_id"] not in files or (not panoptic and not entry.get("segmentation")):
            left_out["box" if entry["image_id"] in files else "annotation of no listed image"] += 1
            continue
        annotations.setdefault(files[entry["image_id"]], []).append(entry)
        used_ids |= {int(part["category_id"]) for part in (entry["segments_info"] if panoptic else [entry])}
    unknown = sorted(used_ids - category_names.keys())
    if unknown:
        raise DataError(f"{path}: annotations name categories {unknown[:10]}, which categories does not list")
    folder = _image_folder(path, list(files.values()), images)
    found = []
    for name, entry in {str(entry["file_name"]): entry for entry in listed}.items():
        size = int(entry["height"]), int(entry["width"])
        regions = functools.partial(_regions, path, annotations.get(name, []), size, category_names)
        found.append(Annotated(name, folder / name, size, regions))
    names = tuple(dict.fromkeys(name for number, name in category_names.items() if number in used_ids))
    return Source(_split_of(path.stem, path.parent.name), names, found)


def _regions(
    path: Path, entries: Sequence[Mapping[str, Any]], size: tuple[int, int], category_names: Mapping[int, str]
) -> list[Region]:
    found: list[Region] = []
    for entry in entries:
        if "segments_info" in entry:
            found += _segments(path, entry, category_names)
        else:
            name, area = category_names[int(entry["category_id"])], float(entry.get("area") or 0.0)
            found.append(Region(name, area, _painter(entry["segmentation"], size)))
    return found


def _image_folder(path: Path, names: Sequence[str], given: Path | None) -> Path:
    """Where a COCO file's images are: given, or beside it, under the names that COCO, CVAT and Roboflow use."""
    base, subset = path.parent, path.stem.rpartition("_")[2]
    beside = [base, base / "images", *(up / name for up in (base, base.parent) for name in (subset, "images"))]
    beside += [base.parent / "images" / subset, base.parent / "images" / path.stem, base / path.stem]
    folders = list(dict.fromkeys([given] if given is not None else beside))
    for folder in folders:
        if any((folder / name).is_file() for name in names[:100]):
            return folder
    tried = ", ".join(map(str, folders))
    raise DataError(f"{path}: its image {names[0]} is not in {tried}; pass the folder with --images")


def _painter(segmentation: Any, size: tuple[int, int]) -> Callable[[np.ndarray, int], None]:
    """What paints a COCO segmentation."""
    if isinstance(segmentation, dict):
        return functools.partial(label_files.paint_where, label_files.read_run_lengths(segmentation, size))
    return functools.partial(_fill, [label_files.read_points(flat) for flat in segmentation])


def _segments(path: Path, entry: Mapping[str, Any], category_names: Mapping[int, str]) -> Iterator[Region]:
    """What a panoptic image's PNG of segments holds."""
    name = Path(str(entry["file_name"])).name
    folders = [path.with_suffix(""), path.parent / path.stem.removeprefix("panoptic_"), path.parent]
    file = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if file is None:
        raise DataError(f"{name} of its segments is in none of {', '.join(map(str, folders))}")
    ids = read_image(file).astype(np.int64) @ (1, 256, 65536)
    for part in entry["segments_info"]:
        mask = ids == int(part["id"])
        yield Region(category_names[int(part["category_id"])], 0.0, functools.partial(label_files.paint_where, mask))


def _open_labelme(folder: Path, done: Conversion) -> Source:
    files = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: holds no .json file, expected labelme's, one for each image; or pass COCO's file")
    names: set[str] = set()
    found = []
    for file in files:
        try:
            content = _read_object(file)
            shapes = [_labelme_shape(shape, done.left_out) for shape in content["shapes"]]
            image = file.parent / str(content["imagePath"]).replace("\\", "/")
            size = int(content["imageHeight"]), int(content["imageWidth"])
        except DataError as error:
            done.problems.append(str(error))
        except _MALFORMED as error:
            done.problems.append(f"{file}: cannot be read as labelme's labels ({_reason(error)}); save it again")
        else:
            image = image if image.is_file() else file.parent / image.name
            regions = [region for region in shapes if region is not None]
            names.update(region.name for region in regions)
            found.append(Annotated(str(file.relative_to(folder)), image, size, functools.partial(list, regions)))
    return Source(_split_of(folder.name), tuple(sorted(names)), found)


def _labelme_shape(shape: Mapping[str, Any], left_out: Counter[str]) -> Region | None:
    kind, name = str(shape.get("shape_type") or "polygon"), str(shape["label"]).strip()
    if kind not in _LABELME_SHAPES:
        left_out[kind] += 1
        return None
    points = label_files.read_points(shape["points"])
    if len(points) < _LABELME_SHAPES[kind]:
        raise ValueError(f"{kind} {name!r} with {len(points)} points")
    if kind == "mask":
        try:
            data = base64.b64decode(shape["mask"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"mask {name!r} is no base64") from error
        mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
        if mask is None:
            raise ValueError(f"mask {name!r} is no image")
        left, top = (round(float(value)) for value in points[0])
        return Region(name, 0.0, lambda labels, value: label_files.paint_mask(labels, mask > 0, (top, left), value))
    return Region(name, 0.0, functools.partial(_fill, [label_files.outline(kind, points)]))


def _fill(polygons: Sequence[np.ndarray], labels: np.ndarray, value: int) -> None:
    for points in polygons:
        label_files.fill_polygon(labels, points, value)


def _chosen_classes(found: Sequence[str], asked: Sequence[str], background: str) -> tuple[str, ...]:
    occur = tuple(dict.fromkeys(name for name in found if name not in _VOIDS and name not in _BACKGROUNDS))
    missing = [name for name in asked if name not in occur]
    if missing:
        raise ConfigError(f"--classes: {', '.join(missing)} do not occur; there are {', '.join(occur) or 'none'}")
    names = tuple(asked) or occur
    if not 0 < len(names) < IGNORE_INDEX:
        reason = "boxes alone are none" if not names else "choose some (--classes)"
        raise DataError(f"{len(names)} classes have labelled areas, expected 1 to {IGNORE_INDEX - 1}; {reason}")
    # Names that cannot be used are told before anything is written.
    all_names = names if background == VOID else (*names, background)
    replace(ClassSet.numbered(len(all_names)), names=all_names)
    return names


def _paint(annotated: Annotated, place: Mapping[str, int], unlabelled: int) -> np.ndarray:
    """(H, W) uint8 ids of an image; IGNORE_INDEX for void."""
    check_pixels(*annotated.size, _MAX_PIXELS)
    if not annotated.image.is_file():
        raise DataError(f"the image {annotated.image} is missing")
    if _suffix(annotated.image) not in IMAGE_SUFFIXES:
        raise DataError(f"{annotated.image} cannot be trained on, expected {', '.join(IMAGE_SUFFIXES)}; convert it")
    size = read_image(annotated.image).shape[:2]
    if size != annotated.size:
        raise DataError(f"labelled as {annotated.size}, the image is {size}: it was turned or resized since")
    if orientation(annotated.image) != 1:  # which keeps the size: nothing tells on which pixels was drawn
        raise DataError(
            f"the image {annotated.image} is stored turned or mirrored, its labels may be drawn on it as viewers show "
            "it or as stored; turn its pixels (exiftran -ai) for the former, drop its orientation tag for the latter"
        )
    labels = np.full(annotated.size, unlabelled, np.uint8)
    try:
        for region in sorted(annotated.regions(), key=lambda region: -region.area):
            region.paint(labels, place.get(region.name, unlabelled))
    except _MALFORMED as error:
        raise DataError(f"its labels cannot be read ({_reason(error)})") from error
    return labels


def _split_of(*names: str) -> str:
    """Which split names of files and folders end in, as instances_train2017 does; empty for none."""
    for name in names:
        words = re.findall(r"[a-z]+", name.lower())
        if words and words[-1] in _SPLITS:
            return _SPLITS[words[-1]]
    return ""


def _free_stem(name: str, split: str, used: set[str]) -> str:
    """A stem in one flat folder for a name that may have folders in it, or anything else."""
    base = re.sub(r"[^\w.-]+", "_", re.sub(r"\.\w+$", "", name)).strip("._")
    base = base.encode()[:_LONGEST_STEM_BYTES].decode(errors="ignore") or "image"
    stem, number = base, 1
    while f"{split}/{stem.lower()}" in used:
        number += 1
        stem = f"{base}_{number}"
    used.add(f"{split}/{stem.lower()}")
    return stem


def _suffix(image: Path) -> str:
    """What its file is called at the end in a data set: JPEGs have names that `train` does not look for."""
    suffix = image.suffix.lower()
    return ".jpg" if suffix in (".jfif", ".jpe") else suffix


def _write_pair(folder: Path, stem: str, image: Path, labels: np.ndarray, copy: bool) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    target = folder / "images" / (stem + _suffix(image))
    if not copy:
        with suppress(OSError):  # file systems without links
            target.symlink_to(image.resolve())
    if not target.is_symlink():
        shutil.copyfile(image, target)
    (folder / "labels" / f"{stem}.png").write_bytes(cv2.imencode(".png", labels)[1].tobytes())
