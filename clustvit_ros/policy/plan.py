# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""How one call of the engine is made, and what is known about the latency budget."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from clustvit_ros.engine import Settings
from clustvit_ros.engine.ladder import OperatingPoint
from clustvit_ros.errors import ConfigError
from clustvit_ros.policy.budget import Decision
from clustvit_ros.policy.calibration import LatencyTable
from clustvit_ros.policy.parameters import SegmentationParameters

TOLERATED_MISSES = 0.02
"""Share of recent frames that may miss their deadline before anybody is told."""

# A share of few frames says little: one miss among the first ten is no trend.
_MIN_FRAMES = 50
_RECENT_FRAMES = 300
# What is named as the smallest budget must be held, and the estimate is of frames at other points.
_BEYOND_LEAST = 0.1
# An infinite interval would make every moment that is due NaN.
_FOR_EVER_S = 1e9


class FramePace:
    """Lets so many of a camera's frames per second pass, those nearest to evenly spaced moments."""

    def __init__(self) -> None:
        self._due_s = self._arrived_s = self._taken_s = -math.inf
        self._period_s = 0.0

    def admits(self, now_s: float, rate_hz: float) -> bool:
        """Whether the frame that arrives now is to be segmented.

        Args:
            now_s: monotonic seconds.
            rate_hz: most frames per second; 0 lets all pass.
        """
        gap_s, self._arrived_s = now_s - self._arrived_s, now_s
        if not rate_hz:
            return True
        interval_s = min(1.0 / rate_hz, _FOR_EVER_S)
        if gap_s < interval_s:  # a pause says nothing about the camera's period
            self._period_s += 0.1 * (gap_s - self._period_s) if self._period_s else gap_s
        due_s = min(self._due_s, self._taken_s + 1.5 * interval_s)  # the rate may have been lower
        # The next frame would be farther from the moment that is due.
        if now_s + min(self._period_s, interval_s) / 2 < due_s:
            return False
        missed = due_s + interval_s <= now_s  # what a pause has left out is not made up for
        self._due_s, self._taken_s = (now_s if missed else due_s) + interval_s, now_s
        return True


@dataclass(frozen=True)
class Plan:
    """How one engine call is made, and why.

    Args:
        parameters: values in force for its frames.
        cameras: name of the camera that each image is from.
        images: (H, W, 3) uint8 RGB images of one size.
        settings: what the engine is asked for.
        input_size: (height, width) that the network works at.
        min_tokens: fewest tokens that a budget must leave, from the user or the accuracy checks.
        budget_state: `off`; `calibrating` or `uncalibrated` (calibration failed), both at the fastest point allowed;
            `held`; `infeasible` when even that point is expected to miss the budget.
        decision: what the budget controller decided; None before calibration.
        accuracy: what the accuracy checks found, as keys and values.
    """

    parameters: SegmentationParameters
    cameras: Sequence[str]
    images: Sequence[np.ndarray]
    settings: Settings
    input_size: tuple[int, int]
    min_tokens: int
    budget_state: str
    decision: Decision | None
    accuracy: Mapping[str, str] = field(default_factory=dict)

    @property
    def budget_ms(self) -> float:
        """Milliseconds a frame may take; 0 is no budget."""
        return 0.0 if self.budget_state == "off" else self.parameters.latency_budget_ms

    def is_missed(self, engine_ms: float, age_ms: float) -> bool:
        """Whether a frame was too late.

        Args:
            engine_ms: milliseconds in the engine.
            age_ms: milliseconds since the frame's stamp.
        """
        return 0.0 < self.budget_ms < (age_ms if self.parameters.budget_reference == "stamp" else engine_ms)

    def as_pairs(self) -> dict[str, str]:
        """Keys as they appear in stats and diagnostics."""
        pairs = {
            "latency_budget_ms": f"{self.budget_ms:g}", "budget_reference": self.parameters.budget_reference,
            "deadline_policy": self.parameters.deadline_policy, "min_tokens": str(self.min_tokens),
            "token_ceiling": str(self.settings.token_capacity), "budget_state": self.budget_state,
            "input_scale_ceiling": f"{self.parameters.input_scale:g}",
        }  # fmt: skip
        if self.decision is not None:
            pairs["budget_feasible"] = str(self.decision.feasible).lower()
            pairs["slowdown"] = f"{self.decision.slowdown:.3f}"
            pairs["point_ms"] = f"{self.decision.point_ms:.3f}"
            pairs["predicted_ms"] = f"{self.decision.predicted_ms:.3f}"
            pairs["overhead_ms"] = f"{self.decision.overhead_ms:.3f}"
            pairs["least_budget_ms"] = least_text(self.decision.least_ms)
        return {**pairs, **self.accuracy}


@dataclass(frozen=True)
class Lesson:
    """What is known about a call's frames once their masks are out.

    Args:
        missed: whether each image took longer than its budget.
        misses: deadline misses so far, these included.
        facts: why they were segmented this way, as keys and values.
    """

    missed: Sequence[bool]
    misses: int
    facts: Mapping[str, str]


class Misses:
    """Deadline misses, ever and among the latest frames."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: deque[bool] = deque(maxlen=_RECENT_FRAMES)
        self.total = 0

    def judge(self, plan: Plan, engine_ms: float | None, age_ms: float) -> bool:
        """Whether a frame was too late; counted, if it had a deadline. Any thread may ask.

        Args:
            plan: how its mask was made.
            engine_ms: milliseconds in the engine; None for a mask that was carried from another frame.
            age_ms: milliseconds since the frame's stamp.
        """
        missed = plan.is_missed(engine_ms or 0.0, age_ms)
        if plan.budget_ms and (engine_ms is not None or plan.parameters.budget_reference == "stamp"):
            with self._lock:
                self._recent.append(missed)
                self.total += missed
        return missed

    def start_over(self) -> None:
        """Forget recent frames: they had another deadline. The total stays."""
        self._recent.clear()

    @property
    def recent(self) -> tuple[int, int]:
        """Misses among the latest frames, and how many frames these are."""
        with self._lock:
            return sum(self._recent), len(self._recent)


@dataclass(frozen=True)
class BudgetStatus:
    """What is known after some frame; made by the thread that segments, read by any other.

    Args:
        plan: how the newest frame was made; None before the first.
        misses: deadline misses so far.
        recent: misses among the latest frames, and how many frames these are.
        table: calibrated latencies for the newest frame's size; None when there are none yet.
        image_size: (height, width) of the newest frame; None before the first.
        slowdown: measured over calibrated latency of recent frames, its upper estimate.
        overhead_ms: milliseconds outside the engine of recent frames, their upper estimate.
        failure: why there is no calibration; empty when there is one, or none was tried.
        recalibrated: values that asked to `recalibrate`, once that is done; else None.
    """

    plan: Plan | None = None
    misses: int = 0
    recent: tuple[int, int] = (0, 0)
    table: LatencyTable | None = None
    image_size: tuple[int, int] | None = None
    slowdown: float = 1.0
    overhead_ms: float = 0.0
    failure: str = ""
    recalibrated: SegmentationParameters | None = None

    def problem(self) -> str:
        """What keeps the budget from being held, in a sentence; empty when nothing does."""
        plan = self.plan
        if plan is None or plan.budget_ms <= 0.0:
            return ""
        budget = f"latency_budget_ms {plan.budget_ms:g}"
        if plan.budget_state == "uncalibrated":
            return f"{budget} gets the fastest operating point only: calibration failed ({self.failure})"
        decision = plan.decision
        if decision is not None and plan.budget_state == "infeasible":
            outside = f" and {decision.overhead_ms:.1f} ms pass outside the engine" if decision.overhead_ms else ""
            return (
                f"{budget} cannot be held now: {point_text(decision.point)}, the fastest allowed, take up to "
                f"{decision.predicted_ms:.1f} ms, {decision.slowdown:.2f} times the calibrated latency{outside}; the "
                f"smallest budget that holds now is {least_text(decision.least_ms)}"
            )
        missed, frames = self.recent
        if missed > TOLERATED_MISSES * max(frames, _MIN_FRAMES):
            text = f"{missed} of the last {frames} frames missed {budget}"
            if decision is None:
                return text
            return f"{text}; the smallest that holds now is {least_text(decision.least_ms)}"
        return ""

    def as_pairs(self) -> dict[str, str]:
        """Keys as they appear in diagnostics."""
        pairs = self.plan.as_pairs() if self.plan is not None else {}
        pairs["deadline_misses"] = str(self.misses)
        pairs["deadline_misses_recent"] = "{} of {}".format(*self.recent)
        if self.table is not None:
            for threads, (total, kept), value in self.table.items():
                by = f"_{threads}_threads" if threads else ""
                pairs[f"calibrated.{kept}_of_{total}_tokens{by}_ms"] = f"{value:.2f}"
        return pairs


def check_budget(
    table: LatencyTable, points: Sequence[OperatingPoint], budget_ms: float, slowdown: float = 1.0,
    overhead_ms: float = 0.0,
) -> None:  # fmt: skip
    """Refuse a budget that cannot be held now.

    Args:
        table: calibrated latencies.
        points: those that may be chosen, fastest first.
        budget_ms: the budget.
        slowdown: upper estimate of measured over calibrated latency, as frames run now.
        overhead_ms: upper estimate of the milliseconds outside the engine that count against the budget.

    Raises:
        ConfigError: naming the smallest budget that holds.
    """
    fastest = points[0]
    engine_ms = table[fastest] * slowdown
    if budget_ms >= engine_ms + overhead_ms:
        return
    outside = f" and {overhead_ms:.1f} ms pass outside the engine" if overhead_ms else ""
    raise ConfigError(
        f"latency_budget_ms: got {budget_ms:g}, but {point_text(fastest)}, the fastest allowed, take up to "
        f"{engine_ms:.1f} ms here as frames run now{outside}; expected 0 (off) or at least "
        f"{least_text(engine_ms + overhead_ms)}"
    )


def least_text(least_ms: float) -> str:
    """The smallest budget to name where `least_ms` is the estimate of what holds."""
    return f"{math.ceil(round(least_ms * (1.0 + _BEYOND_LEAST) * 10, 6)) / 10:.1f}"


def point_text(point: OperatingPoint) -> str:
    """A point in words."""
    at = "" if point.input_scale == 1.0 else f" at {point.input_scale:g} of the input's sides"
    return f"{point.capacity} of {point.tokens_total} tokens{at}"
