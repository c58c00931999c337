# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What keeps merging from doing harm: exempt classes and regions, and a check of accuracy now and then.

Now and then a frame is segmented at full size and unmerged as well, between frames. Agreement with that mask says what
merging and shrinking cost, without labels. When it falls below what is asked for, the least operating point that may be
used rises by one along those that frames move on; it falls again, one at a time, once several checks in a row leave
room. A floor that had to be raised again soon is tried for longer each time, so that a scene at the border does not
make it swing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.engine import Engine, Prediction, Settings
from clustvit_ros.engine.exemption import exempt_class_ids
from clustvit_ros.engine.ladder import OperatingPoint
from clustvit_ros.policy.parameters import SegmentationParameters

# Agreement must be above the bound by this share of what is left to 1 before the floor falls.
_HEADROOM = 0.25
_GOOD_CHECKS = 3
_MOST_GOOD_CHECKS = 48


@dataclass(frozen=True)
class Agreement:
    """One comparison of a mask with the unmerged one.

    Args:
        overall: share of equal pixels, 0..1; pixels that either mask leaves unlabelled do not count.
        per_class: name of an exempt class -> share of its pixels in the unmerged mask that the mask has as well.
            Classes that the unmerged mask lacks are left out.
    """

    overall: float
    per_class: Mapping[str, float] = field(default_factory=dict)


class AccuracyGuard:
    """Decides when a check is due and how far merging and shrinking must back off.

    Args:
        now_s: monotonic seconds at the start; the first check is due one period later.
        worth: orders operating points, of whatever image size, by what they are worth.
    """

    def __init__(self, now_s: float, worth: Callable[[OperatingPoint], Any]) -> None:
        self._checked_s, self._worth = now_s, worth
        self.floor: OperatingPoint | None = None
        """What is worth less must not be used; None is no bound."""
        self._good = 0
        self._needed = _GOOD_CHECKS
        self._lowered = False
        self.latest: Agreement | None = None
        self.checks = 0

    def due(self, now_s: float, period_s: float) -> bool:
        """Whether the next check should be made; never with a period of 0."""
        return period_s > 0.0 and now_s - self._checked_s >= period_s

    def overdue(self, now_s: float, period_s: float) -> bool:
        """Whether it can wait no longer for a moment in which nothing else is to be done."""
        return period_s > 0.0 and now_s - self._checked_s >= 2.0 * period_s

    def observe(
        self, agreement: Agreement, now_s: float, min_agreement: float, used: OperatingPoint,
        ladder: Sequence[OperatingPoint],
    ) -> None:  # fmt: skip
        """Learn from a check.

        Args:
            agreement: what the check found.
            now_s: monotonic seconds of the check.
            min_agreement: agreement that is asked for, 0..1; 0 asks for nothing.
            used: operating point that the compared mask was made at.
            ladder: the points that frames move on, the least accurate first.
        """
        self.latest, self._checked_s, self.checks = agreement, now_s, self.checks + 1
        if min_agreement <= 0.0:
            self.floor, self._good, self._needed, self._lowered = None, 0, _GOOD_CHECKS, False
        elif agreement.overall < min_agreement:
            self._raise(used, ladder)
        elif agreement.overall >= min_agreement + _HEADROOM * (1.0 - min_agreement):
            self._good += 1
            if self.floor is not None and self._good >= self._needed:
                self._good, self._lowered = 0, True
                below = [point for point in ladder[1:] if self._worth(point) < self._worth(self.floor)]
                self.floor = below[-1] if below else None
        else:
            self._good = 0

    def skip(self, now_s: float) -> None:
        """A check failed or made no sense: wait for the next period."""
        self._checked_s = now_s

    def _raise(self, used: OperatingPoint, ladder: Sequence[OperatingPoint]) -> None:
        if self._lowered:
            # It was lowered and had to come back: longer patience the next time.
            self._needed = min(self._needed * 2, _MOST_GOOD_CHECKS)
            self._lowered = False
        self._good = 0
        # One above what was found wanting, whether the floor or the threshold had chosen that.
        above = next((point for point in ladder if self._worth(point) > self._worth(used)), ladder[-1])
        self.floor = above if self.floor is None else max(above, self.floor, key=self._worth)


@dataclass(frozen=True)
class _Sample:
    """A segmented frame that may be compared with its unmerged self."""

    image: np.ndarray
    settings: Settings
    mask: np.ndarray
    point: OperatingPoint


class MergeGuard:
    """Exemptions and accuracy checks of one engine.

    Everything but `pairs` belongs to the thread that owns the engine.

    Args:
        engine: what segments.
        worth: orders operating points by what they are worth.
        clock: gives monotonic seconds.
    """

    def __init__(
        self, engine: Engine, worth: Callable[[OperatingPoint], Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._worth, self._clock = engine, worth, clock
        self._names = engine.info.classes.names
        self._masks: dict[str, np.ndarray] = {}
        self._guard = AccuracyGuard(clock(), worth)
        self._ladder: Sequence[OperatingPoint] = ()
        self._told_for = 0.0
        self._sample: _Sample | None = None
        self._parameters = SegmentationParameters()
        self.pairs: Mapping[str, str] = {}
        """What the checks found, as keys and values of stats and diagnostics; any thread may read it."""

    @property
    def floor(self) -> OperatingPoint | None:
        """The least accurate operating point that the latest checks allow; None is no bound."""
        return self._guard.floor

    def protect(
        self, settings: Settings, parameters: SegmentationParameters, cameras: Sequence[str], floor: int,
        ladder: Sequence[OperatingPoint],
    ) -> Settings:  # fmt: skip
        """Add a call's exemptions and the checks' floor to its settings.

        Args:
            settings: what the engine would get without guards.
            parameters: values in force for the call.
            cameras: name of the camera that each image of the call is from.
            floor: fewest tokens that the checks allow at that size.
            ladder: the points that frames move on, the least accurate first; what a check finds moves along it.
        """
        self._parameters, self._ladder = parameters, ladder
        if not parameters.accuracy_check_period_s:
            self._forget_checks()
        elif self._told_for != parameters.min_agreement and self._guard.latest is not None:
            self._tell(self._guard.latest)
        class_ids = exempt_class_ids(self._names, parameters.merge_exempt_classes)
        if not (floor or class_ids or parameters.merge_exempt_region):
            return settings
        masks = [self._masks.get(camera) for camera in cameras]
        known = [mask for mask in masks if mask is not None]
        previous = None
        if class_ids and known:
            # The grids of several cameras may be of different input sizes; the finest holds them all.
            size = np.max([mask.shape for mask in known], axis=0)
            # A camera without a mask yet has nothing to exempt.
            blank = np.full(size, IGNORE_INDEX, known[0].dtype)
            previous = np.stack([blank if mask is None else _enlarged(mask, size) for mask in masks])
        return replace(
            settings, min_tokens=floor, merge_exempt_region=parameters.exempt_region,
            merge_exempt_classes=class_ids, merge_exempt_source=parameters.merge_exempt_source, previous_mask=previous,
        )  # fmt: skip

    def saw(self, cameras: Sequence[str], images: Sequence[np.ndarray], settings: Settings, result: Prediction) -> None:
        """Remember a call's masks.

        Args:
            cameras: name of the camera that each image is from.
            images: the call's images, in order.
            settings: what the engine was asked for.
            result: what the engine gave, in the model's own classes.
        """
        if settings.merge_exempt_classes:
            # Not the mask, where a class may lack that the network did see: it may be unsure of it, or the mask small.
            seen = result.mask if result.class_grid is None else result.class_grid
            self._masks.update(zip(cameras, seen, strict=True))
        else:
            self._masks.clear()
        self._sample = None
        # A replay must not depend on the clock.
        period_s = self._parameters.accuracy_check_period_s
        if period_s and self._parameters.adapts and self._guard.due(self._clock(), period_s):
            self._sample = _Sample(images[0], settings, result.mask[0], result.stats.operating_point)

    def forget(self) -> None:
        """Nothing is guarded any more: what was seen says nothing about later."""
        self._masks.clear()
        self._forget_checks()

    def _forget_checks(self) -> None:
        self._guard = AccuracyGuard(self._clock(), self._worth)
        self._sample, self.pairs = None, {}

    def use_idle_time(self, is_free: Callable[[], bool]) -> None:
        """Compare the latest frame with its full mask, if a check is due and nothing waits, or it is overdue.

        Args:
            is_free: says whether no frame waits.
        """
        sample, parameters, now_s = self._sample, self._parameters, self._clock()
        if sample is None or not (is_free() or self._guard.overdue(now_s, parameters.accuracy_check_period_s)):
            return
        self._sample = None
        # The same outputs as the frame had: another size would be another resampling.
        full = Settings(
            merge_threshold=1.0, confidence=False, output_size=sample.settings.output_size,
            confidence_threshold=sample.settings.confidence_threshold,
        )  # fmt: skip
        try:
            reference = self._engine.segment(sample.image, full).mask[0]
        except Exception:  # whatever an engine raises; the frames themselves tell of a failing engine
            self._guard.skip(self._clock())
            return
        agreement = compare(sample.mask, reference, self._names, sample.settings.merge_exempt_classes)
        self._guard.observe(agreement, self._clock(), parameters.min_agreement, sample.point, self._ladder)
        self._tell(agreement)

    def _tell(self, agreement: Agreement) -> None:
        self._told_for = self._parameters.min_agreement
        floor = self._guard.floor if self._told_for else None
        self.pairs = {
            "agreement": f"{agreement.overall:.4f}",
            **{f"agreement.{name}": f"{share:.4f}" for name, share in agreement.per_class.items()},
            "min_agreement": f"{self._parameters.min_agreement:g}",
            "accuracy_checks": str(self._guard.checks),
            "accuracy_min_tokens": str(floor.capacity if floor else 0),
            "accuracy_min_input_scale": f"{floor.input_scale if floor else 0.0:g}",
        }


def compare(mask: np.ndarray, reference: np.ndarray, names: Sequence[str], class_ids: Sequence[int]) -> Agreement:
    """How far a mask agrees with the unmerged one.

    Args:
        mask: (H, W) class ids.
        reference: (H, W) class ids of the unmerged mask.
        names: names of all classes.
        class_ids: ids of the classes that are told one by one.
    """
    labelled = (mask != IGNORE_INDEX) & (reference != IGNORE_INDEX)
    equal = mask == reference
    count = int(labelled.sum())
    per_class = {}
    for class_id in class_ids:
        there = reference == class_id
        if there.any():
            per_class[names[class_id]] = float(equal[there].mean())
    return Agreement(float((equal & labelled).sum() / count) if count else 1.0, per_class)


def _enlarged(mask: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A mask with its pixels repeated to (height, width) `size`: none is lost."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, mask.shape, strict=True))
    return mask[rows][:, columns]
