# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What is done with finished masks: many classes become few names, and classes become colours.

What a costmap needs of eleven street classes is `traversable`, `obstacle` and `sky`. Grouping is one table look-up on
the mask, after the arg-max over the model's own classes. So every engine can do it, it costs a tenth of a millisecond,
and it changes live. The confidence stays the probability of the winning class: a lower bound of its group's, which is
smaller where the network hesitates between classes of one group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX, ClassSet
from clustvit_ros.engine.engine import Prediction
from clustvit_ros.errors import ConfigError

Groups = tuple[tuple[str, tuple[str, ...]], ...]
"""Groups in order, each with its name and the names of its classes."""


def parse_groups(text: str) -> Groups:
    """Read groups from their text form.

    Args:
        text: `GROUP: CLASS, CLASS; GROUP: CLASS`.

    Raises:
        ConfigError: not of that form, a group that repeats, or a class that is in two groups.
    """
    groups: dict[str, tuple[str, ...]] = {}
    found: dict[str, str] = {}
    for part in filter(str.strip, text.split(";")):
        name, colon, members = part.partition(":")
        name, classes = name.strip(), tuple(member.strip() for member in members.split(","))
        if not (colon and name and all(classes)):
            raise ConfigError(f"class_groups: got {part.strip()!r}, expected GROUP: CLASS, CLASS, ...")
        if name in groups:
            raise ConfigError(f"class_groups: group {name!r} is given twice, expected each name once; merge the two")
        for member in classes:
            if member in found:
                raise ConfigError(
                    f"class_groups: class {member!r} is in {found[member]!r} and in {name!r}, expected it in one group"
                )
            found[member] = name
        groups[name] = classes
    if len(groups) > IGNORE_INDEX:
        raise ConfigError(f"class_groups: got {len(groups)} groups, expected at most {IGNORE_INDEX}")
    return tuple(groups.items())


@dataclass(frozen=True)
class ClassGrouping:
    """From a model's classes to those of the mask.

    Args:
        classes: classes of the mask: the groups in their order, each in the colour of its first class; the model's own
            where there are no groups.
        ungrouped: the model's classes that no group names; their pixels become the ignore index.
        table: (max(256, classes of the model),) uint8, model's class id -> group id; None changes nothing.
    """

    classes: ClassSet
    ungrouped: tuple[str, ...] = ()
    table: np.ndarray | None = None

    def apply(self, prediction: Prediction) -> Prediction:
        """Replace class ids by group ids; what is in no group gets the ignore index and confidence 0."""
        if self.table is None:
            return prediction
        mask, confidence = prediction.mask, prediction.confidence
        mask = np.stack([cv2.LUT(m, self.table) for m in mask]) if mask.dtype == np.uint8 else self.table[mask]
        if confidence is not None and self.ungrouped:
            confidence = np.where(mask == IGNORE_INDEX, np.uint8(0), confidence)
        return replace(prediction, mask=mask, confidence=confidence)


@lru_cache(maxsize=8)
def group_classes(classes: ClassSet, groups: Groups) -> ClassGrouping:
    """Make the grouping for a model.

    Args:
        classes: the model's.
        groups: what replaces its classes; none keeps every class as it is.

    Raises:
        ConfigError: a class that the model does not have.
    """
    if not groups:
        return ClassGrouping(classes)
    ids = {name: index for index, name in enumerate(classes.names)}
    unknown = [member for _, members in groups for member in members if member not in ids]
    if unknown:
        raise ConfigError(
            f"class_groups: the model has no class {', '.join(map(repr, unknown))}, expected {', '.join(classes.names)}"
        )
    table = np.full(max(IGNORE_INDEX + 1, len(classes)), IGNORE_INDEX, np.uint8)
    for index, (_, members) in enumerate(groups):
        table[[ids[member] for member in members]] = index
    grouped = {member for _, members in groups for member in members}
    return ClassGrouping(
        classes=ClassSet(
            tuple(name for name, _ in groups), tuple(classes.colours[ids[members[0]]] for _, members in groups)
        ),
        ungrouped=tuple(name for name in classes.names if name not in grouped),
        table=table,
    )


def draw_overlay(image: np.ndarray, mask: np.ndarray, palette: np.ndarray, alpha: float) -> np.ndarray:
    """Blend the colours of a mask into an image; unlabelled pixels show the image alone.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (h, w) uint8 or uint16 class ids, scaled to the image's size if it differs.
        palette: (classes, 3) uint8 RGB, as `ClassSet.palette` gives it.
        alpha: weight of the colours, 0 to 1.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    if mask.shape != image.shape[:2]:
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    colours = _look_up(mask, palette)
    blended = cv2.addWeighted(image, 1.0 - alpha, colours, alpha, 0.0)
    return cv2.copyTo(image, (mask == IGNORE_INDEX).view(np.uint8), blended)


def _look_up(mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    if mask.dtype != np.uint8:
        return palette[mask]
    # Each channel has its own table; several times faster than indexing the palette.
    return cv2.LUT(cv2.merge([mask, mask, mask]), palette[None, :256])
