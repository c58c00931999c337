# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Class names, colours and the ignore index, shared by masks, overlays, data sets and model cards."""

from __future__ import annotations

import collections
import colorsys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import yaml

from clustvit_ros.errors import ConfigError
from clustvit_ros.paths import share_dir

IGNORE_INDEX = 255
"""Label of pixels that have no class: void in the data, below the confidence threshold in a mask."""


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


@dataclass(frozen=True)
class ClassEntry:
    """One class as files list it, in the order of its id."""

    name: str
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class ClassSet:
    """The ordered classes of a model; a class's id is its position.

    Args:
        names: unique, non-empty names.
        colours: one (red, green, blue) per class, each 0..255.

    Raises:
        ConfigError: names repeat or are empty, or a colour is not three bytes.
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("classes: got an empty list, expected at least one {name, colour} entry")
        repeated = sorted(name for name, count in collections.Counter(self.names).items() if count > 1)
        if repeated or not all(self.names):
            raise ConfigError(f"classes: names must be unique and non-empty, got repeated or empty {repeated or ['']}")
        unprintable = [name for name in self.names if not name.isprintable()]
        if unprintable:
            raise ConfigError(f"classes: names must be printable, got {unprintable[0][:60]!r}")
        if len(self.colours) != len(self.names):
            raise ConfigError(f"classes: got {len(self.colours)} colours for {len(self.names)} names, expected as many")
        for name, colour in zip(self.names, self.colours, strict=True):
            if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
                raise ConfigError(f"classes: colour of {name!r} is {list(colour)}, expected three integers 0..255")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, entries: Iterable[ClassEntry]) -> ClassSet:
        """Classes as a file lists them."""
        pairs = [(entry.name, entry.colour) for entry in entries]
        return cls(tuple(name for name, _ in pairs), tuple(colour for _, colour in pairs))

    def entries(self) -> list[dict[str, Any]]:
        """As a file lists them."""
        pairs = zip(self.names, self.colours, strict=True)
        return [{"name": name, "colour": list(colour)} for name, colour in pairs]

    @classmethod
    def numbered(cls, count: int) -> ClassSet:
        """Classes without names of their own: "class_0", "class_1", ... in colours that differ between neighbours."""
        # Steps of the golden ratio around the colour circle keep any two near ids far apart.
        hues = [index * 0.618034 % 1.0 for index in range(count)]
        colours = [colorsys.hsv_to_rgb(hue, 0.65, 0.95 - 0.35 * (index % 2)) for index, hue in enumerate(hues)]
        return cls(
            tuple(f"class_{index}" for index in range(count)),
            tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours),
        )

    def palette(self) -> np.ndarray:
        """Colours for every value a mask can hold.

        Returns:
            (max(256, len(self)), 3) uint8, RGB; ids without a class, the ignore index among them, are black.
        """
        table = np.zeros((max(IGNORE_INDEX + 1, len(self)), 3), np.uint8)
        table[: len(self)] = self.colours
        return table


def class_set_names() -> list[str]:
    """Names of the class lists that come with the package."""
    return sorted(path.stem for path in (share_dir() / "config" / "classes").glob("*.yaml"))


def write_out_classes(content: dict[str, Any], where: str, named: bool = False) -> None:
    """Replace the name of a class list that a file's `classes` may hold by the list itself, in place.

    Args:
        content: of the file.
        where: what messages call it.
        named: names alone are enough, and get colours.

    Raises:
        ConfigError: there is none of that name.
    """
    names = content.get("classes")
    if named and isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        colours = ClassSet.numbered(len(names)).colours
        content["classes"] = [{"name": n, "colour": list(c)} for n, c in zip(names, colours, strict=True)]
    if isinstance(content.get("classes"), str):
        try:
            content["classes"] = load_class_set(content["classes"]).entries()
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def load_class_set(name: str) -> ClassSet:
    """A class list that comes with the package.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in class_set_names():
        raise ConfigError(f"classes: got {name!r}, expected one of {', '.join(class_set_names())}")
    entries = yaml.safe_load((share_dir() / "config" / "classes" / f"{name}.yaml").read_text(encoding="utf-8"))
    return ClassSet(tuple(e["name"] for e in entries), tuple(tuple(e["colour"]) for e in entries))
