# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The ladders of operating points: the few input sizes, and the few token counts at each, that a network runs with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

_RUNGS = 8
INPUT_SCALES = (0.375, 0.4375, 0.5, 0.5625, 0.625, 0.75, 0.875, 1.0)
"""Shares of the input's sides that a budget chooses among, ascending; closer where a step costs more accuracy."""


class OperatingPoint(NamedTuple):
    """How large the network sees an image, and how many tokens it may keep.

    Attributes:
        input_scale: share of the sides of the model's full input, above 0 to 1.
        capacity: most tokens kept at that size.
        tokens_total: tokens at that size.
    """

    input_scale: float
    capacity: int
    tokens_total: int

    @property
    def share(self) -> float:
        """The share of that size's tokens that may be kept, above 0 to 1."""
        return self.capacity / self.tokens_total


def input_scales(smallest: float, largest: float) -> tuple[float, ...]:
    """The rungs of the size ladder from `smallest` to `largest`, both included, ascending."""
    return tuple(sorted({smallest, *(scale for scale in INPUT_SCALES if smallest < scale < largest), largest}))


def default_ladder(tokens_total: int) -> tuple[int, ...]:
    """Capacities for `tokens_total` patch tokens: every eighth up to all of them, ascending."""
    return tuple(sorted({max(tokens_total * rung // _RUNGS, 1) for rung in range(1, _RUNGS + 1)}))


def scaled_size(size: tuple[int, int], input_scale: float, patch_size: int) -> tuple[int, int]:
    """A smaller input of the same aspect, in whole patches.

    Args:
        size: (height, width) of the full input.
        input_scale: its sides' share, above 0 to 1.
        patch_size: side of a patch in pixels.

    Returns:
        (height, width), at least one patch each; `size` itself at a scale of 1.
    """
    if input_scale == 1.0:
        return size
    height, width = (max(round(side * input_scale / patch_size), 1) * patch_size for side in size)
    return height, width


def choose_capacity(ladder: Sequence[int], tokens_below_threshold: int, ceiling: int = 0, exempt: int = 0) -> int:
    """The smallest capacity that keeps every token below the threshold, but none above the ceiling.

    Args:
        ladder: capacities, ascending.
        tokens_below_threshold: tokens the threshold wants kept (of the fullest image of a batch).
        ceiling: upper bound on kept tokens; 0 is none. It need not be on the ladder.
        exempt: tokens that must not be merged (of the fullest image of a batch); they come before the ceiling.

    Returns:
        Token capacity. Slots left over keep the least certain of the tokens that could have been merged.
    """
    smallest = next((capacity for capacity in ladder if capacity >= tokens_below_threshold), ladder[-1])
    bounded = min(smallest, ceiling) if ceiling > 0 else smallest
    if bounded >= exempt:
        return bounded
    return next((capacity for capacity in ladder if capacity >= exempt), ladder[-1])


def rung_within(ladder: Sequence[int], ceiling: int) -> int:
    """The largest capacity of a ladder that an upper bound allows, at least its lowest; 0, no bound, stays 0."""
    return max((capacity for capacity in ladder if capacity <= ceiling), default=ladder[0]) if ceiling > 0 else 0


@dataclass(frozen=True)
class Accuracy:
    """What an operating point was measured to be worth, on validation images.

    Args:
        input_scale: share of the sides of the full input.
        token_share: share of that size's tokens that may be kept, 0..1.
        miou: percent.
    """

    input_scale: float
    token_share: float
    miou: float


Worth = tuple[float, float, float]
"""Orders operating points by what they are worth: percent mIoU (0 where it is unknown), input scale, token share."""


# Points of mIoU.
_CHANCE = 0.5


class WorthOrder:
    """How accurate an operating point is, compared with others.

    By the mIoU that the model's folder states, interpolated between its points; without any, by size first and by
    capacity among equal sizes. What a smaller size gains by little is taken for chance, and the larger one comes first.

    Args:
        accuracies: as `EngineInfo` has them.
    """

    def __init__(self, accuracies: Sequence[Accuracy] = ()) -> None:
        self._curves: dict[float, tuple[list[float], list[float]]] = {}
        for scale in sorted({each.input_scale for each in accuracies}):
            of_size = sorted((each.token_share, each.miou) for each in accuracies if each.input_scale == scale)
            # Keeping more tokens is never worth less: a measured gain from merging is chance, or too small to matter.
            best = itertools.accumulate((miou for _, miou in of_size), max)
            self._curves[scale] = [share for share, _ in of_size], list(best)
        self._known = functools.lru_cache(4096)(self._of)  # asked for at every frame

    def __call__(self, point: OperatingPoint) -> Worth:
        """The point's worth."""
        return self._known(point)

    def _of(self, point: OperatingPoint) -> Worth:
        if not self._curves:
            return 0.0, point.input_scale, point.share
        values: list[float] = []
        for curve in self._curves.values():
            value, best = float(np.interp(point.share, *curve)), max(values, default=0.0)
            values.append(best if 0.0 < best - value <= _CHANCE else value)
        return float(np.interp(point.input_scale, list(self._curves), values)), point.input_scale, point.share


class Latencies(Protocol):
    """Milliseconds by operating point."""

    def __getitem__(self, point: OperatingPoint, /) -> float: ...


def front_of(
    points: Iterable[OperatingPoint], latency_ms: Latencies, worth: Callable[[OperatingPoint], Worth]
) -> list[OperatingPoint]:
    """The points that none beats in both latency and worth, fastest and least accurate first."""
    front: list[OperatingPoint] = []
    for point in sorted(points, key=worth, reverse=True):
        if not front or latency_ms[point] < latency_ms[front[-1]]:
            front.append(point)
    return front[::-1]
