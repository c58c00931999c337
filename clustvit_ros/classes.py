"""Class names, colours and the ignore index, shared by masks, overlays, data sets and model cards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustvit_ros.errors import ConfigError

IGNORE_INDEX = 255
"""Label of pixels that have no class: void in the data, below the confidence threshold in a mask."""


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
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated or not all(self.names):
            raise ConfigError(f"classes: names must be unique and non-empty, got repeated or empty {repeated or ['']}")
        if len(self.colours) != len(self.names):
            raise ConfigError(f"classes: got {len(self.colours)} colours for {len(self.names)} names, expected as many")
        for name, colour in zip(self.names, self.colours, strict=True):
            if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
                raise ConfigError(f"classes: colour of {name!r} is {list(colour)}, expected three integers 0..255")

    def __len__(self) -> int:
        return len(self.names)

    def palette(self) -> np.ndarray:
        """Colours for every value a mask can hold.

        Returns:
            (max(256, len(self)), 3) uint8, RGB; ids without a class, the ignore index among them, are black.
        """
        table = np.zeros((max(IGNORE_INDEX + 1, len(self)), 3), np.uint8)
        table[: len(self)] = self.colours
        return table
