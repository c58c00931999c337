# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Labelled images: pairs of an image file and what its labels are read from."""

from __future__ import annotations

import concurrent.futures
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from clustvit_ros.classes import IGNORE_INDEX, Sample
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.images import IMAGE_SUFFIXES, list_images, orientation, read_image
from clustvit_ros.training.label_files import LabelReader, Pair, read_labels

_READERS = 8


class BadFile(NamedTuple):
    """What is wrong with one file."""

    file: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}" if str(self.file) not in self.problem else self.problem


class LabelledImages:
    """Pairs of image and label files with the same stem, sorted by it.

    Args:
        images_dir: folder of images.
        labels_dir: folder of PNGs of class ids, as `read_ids` reads them.
        num_classes: ids from here up to 254 are errors.
        strict: False leaves images without label out, and lists them in `findings`.

    Raises:
        DataError: a folder is missing or empty, files lack their partner, or an image is there twice (each is named).
    """

    def __init__(self, images_dir: Path, labels_dir: Path, num_classes: int, strict: bool = True) -> None:
        pairs = find_pairs(Path(images_dir), Path(labels_dir))
        self._fill(pairs, num_classes, lambda pair: read_labels(pair.label, num_classes), str(labels_dir), strict)

    @classmethod
    def of_pairs(
        cls, pairs: Iterable[Pair], num_classes: int, read: LabelReader, where: str, strict: bool = True
    ) -> LabelledImages:
        """Images whose labels are read by `read`; `where` names the data in errors, `strict` as for the class."""
        data = cls.__new__(cls)
        data._fill(list(pairs), num_classes, read, where, strict)
        return data

    def _fill(self, pairs: list[Pair], num_classes: int, read: LabelReader, where: str, strict: bool) -> None:
        self.num_classes, self.where = num_classes, where
        self._read = read
        if again := [pair.stem for pair, count in Counter(pairs).items() if count > 1]:
            raise DataError(
                f"{where}: {len(again)} image(s) are there more than once, and would count as often: {_names(again)}; "
                "name each once, in one list or split"
            )
        missing = [pair for pair in pairs if not pair.label.is_file()]
        if missing and strict:
            stems = _names([pair.stem for pair in missing])
            raise DataError(
                f"{where}: {len(missing)} of {len(pairs)} images have no label: {stems}; label or remove them, or pass "
                "--bad-data skip to go on without them"
            )
        self.findings = [BadFile(pair.image, "the image has no label") for pair in missing]
        self.pairs = [pair for pair in pairs if pair.label.is_file()]
        if not self.pairs:
            raise DataError(f"{where}: the split is empty, expected at least one image with labels")

    def subset(self, indices: Iterable[int]) -> LabelledImages:
        """Some of the images, as labelled images of their own.

        Raises:
            DataError: none is left.
        """
        return LabelledImages.of_pairs(
            [self.pairs[index] for index in indices], self.num_classes, self._read, self.where
        )

    @property
    def meaning(self) -> str:
        """Which values or colours of its labels are which class, and which void; empty where they are ids as such."""
        return getattr(self._read, "meaning", "")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read one pair.

        Raises:
            DataError: a file cannot be read, the sizes differ, or a label id has no class.
        """
        pair = self.pairs[index]
        image = read_image(pair.image)
        labels = self._read(pair)
        if labels.shape != image.shape[:2]:
            turned = labels.shape == image.shape[1::-1] and orientation(pair.image) != 1
            raise DataError(
                f"{pair.label}: labels are {labels.shape}, the image {pair.image.name} is {image.shape[:2]}"
                + ("; they were drawn on the turned image, " + _ORIENTATION_REMEDY if turned else "")
            )
        return Sample(image, labels, pair.stem)


def group_images(
    data: LabelledImages, group: str | Sequence[str], to_hold_out: bool = True
) -> dict[str, list[int]]:
    """Which images were taken together: neighbouring frames of one drive are no test of each other.

    Args:
        data: images whose names say it.
        group: a regular expression for the beginning of a file's stem, whose match (its first group, if it has one)
            names the drive, e.g. "[^_]+" for what stands before the first "_"; or the names themselves, as stems begin
            with them, and images of no such name belong nowhere.
        to_hold_out: whether each is to be held out in turn, for which there have to be two.

    Returns:
        Indices of the images of each drive, in the order of their names or of the list.

    Raises:
        ConfigError: no rule, or one that cannot be used.
        DataError: names that the rule does not fit, a listed name without images, or one group alone, which leaves
            nothing to hold out.
    """
    stems = [pair.stem for pair in data.pairs]
    found: dict[str, list[int]] = {}
    if not group:
        raise ConfigError(f"{data.where}: nothing says which images belong together, expected group in dataset.yaml")
    if isinstance(group, str):
        try:
            pattern = re.compile(group)
        except re.error as error:
            raise ConfigError(f"group: {group!r} is no regular expression ({error})") from error
        part = 1 if pattern.groups else 0
        names = [(match[part] or "") if (match := pattern.match(stem)) else "" for stem in stems]
        strange = [stem for stem, name in zip(stems, names, strict=True) if not name]
        if strange:
            raise DataError(f"{data.where}: group {group!r} finds nothing in {len(strange)} names: {_names(strange)}")
        for name in sorted(set(names)):
            found[name] = [index for index, other in enumerate(names) if other == name]
    else:
        clash = [(a, b) for a in group for b in group if a is not b and b.startswith(a)]
        if clash or "" in group:
            raise ConfigError(f"group: got {list(group)}, expected names of which none begins with another")
        for name in group:
            found[name] = [index for index, stem in enumerate(stems) if stem.startswith(name)]
    if not to_hold_out:
        return {name: indices for name, indices in found.items() if indices}
    empty = [name for name, indices in found.items() if not indices]
    if empty:
        raise DataError(f"{data.where}: no image belongs to group {', '.join(empty)}; check group in dataset.yaml")
    if len(found) < 2:
        raise DataError(f"{data.where}: all images belong to group {next(iter(found))}, expected two or more")
    return found


def joined(data: Sequence[LabelledImages], same_classes: bool = False) -> LabelledImages:
    """Several data sets behind each other.

    Args:
        data: the data sets.
        same_classes: whether they have the same classes; else the ids of each follow on those of the ones before.

    Returns:
        All images, with the `findings` of all.

    Raises:
        DataError: an image is in several of them.
    """
    readers: dict[Pair, tuple[LabelReader, int]] = {}
    first_id, total = 0, 0
    for part in data:
        readers.update({pair: (part._read, first_id) for pair in part.pairs})
        total = first_id + part.num_classes
        first_id = 0 if same_classes else total

    def read(pair: Pair) -> np.ndarray:
        read_part, first = readers[pair]
        labels = read_part(pair)
        return np.where(labels == IGNORE_INDEX, IGNORE_INDEX, labels + first).astype(np.uint8)

    pairs = [pair for part in data for pair in part.pairs]
    whole = LabelledImages.of_pairs(pairs, total, read, " and ".join(part.where for part in data))
    whole.findings = [finding for part in data for finding in part.findings]
    return whole


_ORIENTATION_REMEDY = "whose orientation tag is not applied, as in messages; turn its pixels and drop the tag"


def warn_of_orientation(data: LabelledImages) -> str:
    """What to tell of images with an orientation tag: pixels are taken as stored, their labels may not be; or empty."""
    turned = [pair.image.name for pair in data.pairs if orientation(pair.image) != 1]
    if not turned:
        return ""
    return (
        f"{data.where}: {len(turned)} image(s) are stored turned ({_names(turned, 3)}); pixels are taken as stored, as "
        "from a camera: labels must have been drawn on those, or turn the pixels and drop the tag (exiftran -ai)"
    )


def warn_of_lonely_labels(data: LabelledImages) -> str:
    """What to tell of labels beside those of the data, which no image has; or empty."""
    where = {
        (pair.image.parent, pair.label.parent, pair.label.name[len(pair.stem) :].lower())
        for pair in data.pairs if pair.label.name.startswith(pair.stem)
    }  # fmt: skip
    lonely = []
    for images_dir, labels_dir, suffix in sorted(where):
        stems = {path.stem.lower() for path in list_images(images_dir)}
        names = [path.name for path in labels_dir.iterdir() if path.name.lower().endswith(suffix)]
        visible = sorted(name for name in names if not name.startswith("."))
        lonely += [name for name in visible if name.lower().removesuffix(suffix) not in stems]
    if not lonely:
        return ""
    return (
        f"{data.where}: {len(lonely)} label(s) have no image ({_names(lonely, 3)}) and teach nothing; images end in "
        f"{', '.join(IMAGE_SUFFIXES)} and lie in the folder itself"
    )


def check_images(
    data: LabelledImages, min_side_px: int = 1, progress: Callable[[Iterable], Iterable] = lambda items: items
) -> list[BadFile]:
    """Read every image with its labels once, and list what cannot be trained on.

    Args:
        data: what to check.
        min_side_px: images that are smaller than a patch of this side are findings.
        progress: wraps the iteration, as `tqdm` does.

    Returns:
        In the order of the data: unreadable and mis-sized files, labels without a class, all-void labels, and images
        smaller than a patch.
    """
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        problems = readers.map(lambda index: _problem(data, index, min_side_px), range(len(data)))
        return [finding for finding in progress(problems) if finding is not None]


def without(data: LabelledImages, findings: Sequence[BadFile]) -> LabelledImages:
    """The images that nothing was found wrong with.

    Raises:
        DataError: none is left.
    """
    wrong = {finding.file for finding in findings}
    kept = [index for index, pair in enumerate(data.pairs) if pair.image not in wrong]
    if not kept:
        raise DataError(f"{data.where}: nothing is left of {len(data)} images; the first: {findings[0]}")
    return data.subset(kept)


def list_findings(findings: Sequence[BadFile], where: str, limit: int = 10) -> str:
    """Findings as lines under a heading."""
    lines = [f"  {finding}" for finding in findings[:limit]]
    if len(findings) > limit:
        lines.append(f"  and {len(findings) - limit} more")
    return f"{where}: {len(findings)} file(s) cannot be used:\n" + "\n".join(lines)


def usable(data: LabelledImages, bad_data: str, patch_size: int) -> tuple[LabelledImages, list[BadFile]]:
    """Check every file of a split.

    Args:
        bad_data: "strict" or "skip".
        patch_size: images must have at least one patch.

    Returns:
        What can be used, and what is left out.

    Raises:
        DataError: strict, and something cannot be used (each file is listed); or nothing is left.
    """
    found = check_images(
        data,
        patch_size,
        lambda items: tqdm(items, desc=f"check {data.where}", total=len(data), leave=False, mininterval=1.0),
    )
    findings = [*data.findings, *found]
    for warning in filter(None, (warn_of_orientation(data), warn_of_lonely_labels(data))):
        print(warning, file=sys.stderr)
    if not findings:
        return data, []
    text = list_findings(findings, data.where)
    if bad_data == "strict":
        raise DataError(f"{text}\nrepair or remove them, or pass --bad-data skip to go on without them")
    print(text, file=sys.stderr)
    return (without(data, found) if found else data), findings


def _problem(data: LabelledImages, index: int, min_side_px: int) -> BadFile | None:
    image = data.pairs[index].image
    try:
        sample = data[index]
    except DataError as error:
        return BadFile(image, str(error))
    if min(sample.labels.shape) < min_side_px:
        return BadFile(image, f"the image is {sample.labels.shape}, smaller than a patch of {min_side_px} px")
    if (sample.labels == IGNORE_INDEX).all():
        return BadFile(image, "the labels are all void")
    return None


def find_pairs(images_dir: Path, labels_dir: Path, suffix: str = ".png") -> list[Pair]:
    """Images of a folder with the paths of their labels, which may not be there, sorted by stem.

    Args:
        images_dir: folder of images.
        labels_dir: folder of labels; it may be the same one.
        suffix: labels are called <stem of the image><suffix>, in whatever case.

    Raises:
        DataError: a folder is missing, no image is there, or one stem is there twice.
    """
    if not labels_dir.is_dir():
        raise DataError(f"label folder {labels_dir} does not exist; expected a folder of <stem>{suffix}")
    images = find_images(images_dir, suffix if images_dir.resolve() == labels_dir.resolve() else "")
    files = {path.name.lower(): path for path in labels_dir.iterdir()}
    pairs = []
    for stem in sorted(images):
        exact = labels_dir / (stem + suffix)
        pairs.append(Pair(images[stem], exact if exact.exists() else files.get(exact.name.lower(), exact)))
    return pairs


def find_images(images_dir: Path, but: str = "") -> dict[str, Path]:
    """Image files of a folder by stem, without those whose names end in `but`.

    Raises:
        DataError: no such folder, no image in it, or one stem twice.
    """
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise DataError(f"image folder {images_dir} does not exist")
    found: dict[str, Path] = {}
    for path in list_images(images_dir):
        if but and path.name.lower().endswith(but.lower()):
            continue
        if path.stem in found:
            raise DataError(f"{images_dir}: {found[path.stem].name} and {path.name} share a stem; keep one of them")
        found[path.stem] = path
    if not found:
        raise DataError(f"{images_dir}: no image found, expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found


def _names(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
