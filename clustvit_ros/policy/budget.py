# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Holding a latency budget by bounding the token capacity.

Feed-forward from a calibrated table (what a capacity costs on this device when nothing else runs), corrected by
feedback (how much slower frames are just now). The correction is an upper estimate over recent frames, so that noise is
paid for in advance; a lasting change of load replaces those frames at once instead of fading in.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from clustvit_ros.errors import ConfigError

# Frames that the slowdown is estimated from.
_WINDOW = 24
# So many frames in a row beyond the estimate are no spikes any more: the load has changed.
_RISEN_FRAMES = 3
_FALLEN_FRAMES = 6
# A larger capacity must fit with this to spare, for so many frames in a row, before it is taken.
_HEADROOM = 0.05
_STEADY_FRAMES = 6
# Of so many frames, one in twenty may be above the estimate, however seldom and wild spikes are; with fewer frames than
# the second number, a share says nothing.
_TAIL_WINDOW = 60
_MIN_TAIL_FRAMES = 40
_TAIL_SHARE = 0.05
# A spread over fewer frames than this is a guess; what was seen bounds it.
_FEW_FRAMES = 8
_BEYOND_SEEN = 1.1
# Noise is assumed to be at least this much, relative.
_MIN_SPREAD = 0.01
# Spreads above the median that the estimate covers: under normal noise it is exceeded by 6 frames in 1,000.
_SPREADS = 2.5
# A capacity that was left soon after it was taken is not tried again for so many frames, doubled each time.
_RETRY_FRAMES = 60
_MAX_RETRY_FRAMES = 3840


class LatencyTable:
    """Calibrated latency per token capacity.

    Measured noise must not make a larger capacity look cheaper than a smaller one: the table is made to rise by
    pooling neighbours that do not (isotonic regression).

    Args:
        latency_ms: capacity (tokens) -> milliseconds, at least one entry.

    Raises:
        ConfigError: no entry, or one that is not positive.
    """

    def __init__(self, latency_ms: Mapping[int, float]) -> None:
        if not latency_ms:
            raise ConfigError("latency table: got no capacity, expected at least one")
        if any(capacity < 1 or not 0.0 < value < math.inf for capacity, value in latency_ms.items()):
            raise ConfigError(f"latency table: got {dict(latency_ms)}, expected positive capacities and milliseconds")
        self.capacities = tuple(sorted(latency_ms))
        self._latency_ms = _rising([latency_ms[capacity] for capacity in self.capacities])

    def __getitem__(self, capacity: int) -> float:
        """Milliseconds at a capacity; between two rungs interpolated, beyond them the nearest."""
        index = bisect.bisect_left(self.capacities, capacity)
        if index == 0:
            return self._latency_ms[0]
        if index == len(self.capacities):
            return self._latency_ms[-1]
        low, high = self.capacities[index - 1 : index + 1]
        share = (capacity - low) / (high - low)
        return self._latency_ms[index - 1] * (1.0 - share) + self._latency_ms[index] * share

    def items(self) -> Iterable[tuple[int, float]]:
        """(capacity, milliseconds), ascending."""
        return zip(self.capacities, self._latency_ms, strict=True)


@dataclass(frozen=True)
class Decision:
    """What the controller allows for the next frame, and why.

    Args:
        capacity: largest token capacity to use.
        budget_ms: the budget in force.
        engine_budget_ms: what is left of it for the engine.
        slowdown: upper estimate of measured over calibrated latency.
        overhead_ms: upper estimate of everything outside the engine that counts against the budget.
        predicted_ms: upper estimate of the engine's latency at `capacity`.
        feasible: False when even the smallest capacity is expected to miss the budget.
    """

    capacity: int
    budget_ms: float
    engine_budget_ms: float
    slowdown: float
    overhead_ms: float
    predicted_ms: float
    feasible: bool


class BudgetController:
    """Chooses the largest token capacity whose predicted latency fits the budget.

    Call `decide` before a frame and `observe` after it. Deterministic: the same observations give the same decisions.
    A budget that cannot be held gets the smallest capacity allowed, and `Decision.feasible` says so; `check_budget`
    refuses it beforehand.

    Args:
        table: calibrated latencies.
        budget_ms: milliseconds a frame may take; infinity is no budget.
        min_tokens: smallest capacity that may be chosen, whatever the budget.
        counts_overhead: milliseconds outside the engine count against the budget.
    """

    def __init__(
        self, table: LatencyTable, budget_ms: float = math.inf, min_tokens: int = 0, counts_overhead: bool = True
    ) -> None:
        self._table = table
        self._slowdowns = _Estimate()
        self._overheads = _Estimate()
        self._frame = 0
        self._target: tuple[float, int, bool] | None = None
        self.retarget(budget_ms, min_tokens, counts_overhead)

    def retarget(self, budget_ms: float, min_tokens: int = 0, counts_overhead: bool = True) -> None:
        """Hold another budget from the next frame on; what was learnt about the device's load stays."""
        if self._target == (budget_ms, min_tokens, counts_overhead):
            return
        self._target = (budget_ms, min_tokens, counts_overhead)
        self._budget_ms, self._counts_overhead = budget_ms, counts_overhead
        self._capacities = _allowed(self._table, min_tokens)
        self._raised_at = self._frame - _RETRY_FRAMES
        self._retry_at: dict[int, int] = {}
        self._retry_frames: dict[int, int] = {}
        self._wanted_larger = 0
        self._capacity = self._fitting()[0]

    @property
    def typical_slowdown(self) -> float:
        """Measured over calibrated latency of recent frames, without the margin for noise; 1 before any frame."""
        return self._slowdowns.median(1.0)

    @property
    def typical_overhead_ms(self) -> float:
        """Milliseconds outside the engine of recent frames, without the margin; 0 before any frame."""
        return self._overheads.median(0.0)

    def decide(self) -> Decision:
        """The largest capacity allowed for the next frame."""
        slowdown, overhead_ms = self._slowdowns.upper(1.0), self._overhead_ms()
        engine_budget_ms = self._budget_ms - overhead_ms
        return Decision(
            capacity=self._capacity, budget_ms=self._budget_ms, engine_budget_ms=engine_budget_ms, slowdown=slowdown,
            overhead_ms=overhead_ms, predicted_ms=self._table[self._capacity] * slowdown,
            feasible=self._table[self._capacities[0]] * slowdown <= engine_budget_ms,
        )  # fmt: skip

    def observe(self, capacity: int, engine_ms: float, overhead_ms: float = 0.0) -> None:
        """Learn from a frame.

        Args:
            capacity: that it was processed with; it may be below the one allowed.
            engine_ms: milliseconds in the engine.
            overhead_ms: milliseconds outside it; learnt even while they do not count.
        """
        self._frame += 1
        if self._slowdowns.add(engine_ms / self._table[capacity]) < 0:
            # The load went away: what failed under it says nothing about now.
            self._retry_at.clear()
            self._retry_frames.clear()
        self._overheads.add(overhead_ms)
        fitting, roomy = self._fitting()
        if fitting < self._capacity:
            self._lower(fitting)
        elif roomy > self._capacity:
            self._wanted_larger += 1
            if self._wanted_larger >= _STEADY_FRAMES:
                self._raise(roomy)
        else:
            self._wanted_larger = 0

    def _overhead_ms(self) -> float:
        return self._overheads.upper(0.0) if self._counts_overhead else 0.0

    def _fitting(self) -> tuple[int, int]:
        """The largest capacity that fits, and the largest allowed one that fits with headroom."""
        budget_ms = (self._budget_ms - self._overhead_ms()) / self._slowdowns.upper(1.0)
        fitting = roomy = self._capacities[0]
        for capacity in self._capacities:
            if self._table[capacity] <= budget_ms:
                fitting = capacity
            fits_with_headroom = self._table[capacity] <= budget_ms * (1.0 - _HEADROOM)
            if fits_with_headroom and self._retry_at.get(capacity, 0) <= self._frame:
                roomy = capacity
        return fitting, roomy

    def _lower(self, capacity: int) -> None:
        if self._frame - self._raised_at < _RETRY_FRAMES:
            # Taken and left again: the estimate is at odds with this capacity, and trying on would oscillate.
            frames = min(self._retry_frames.get(self._capacity, _RETRY_FRAMES // 2) * 2, _MAX_RETRY_FRAMES)
            self._retry_frames[self._capacity] = frames
            for larger in self._capacities[self._capacities.index(self._capacity) :]:
                self._retry_at[larger] = self._frame + frames
        self._capacity = capacity
        self._wanted_larger = 0

    def _raise(self, capacity: int) -> None:
        self._capacity = capacity
        self._raised_at = self._frame
        self._wanted_larger = 0


def check_budget(
    table: LatencyTable, budget_ms: float, min_tokens: int = 0, slowdown: float = 1.0, overhead_ms: float = 0.0
) -> None:
    """Refuse a budget that cannot be held.

    Args:
        table: calibrated latencies.
        budget_ms: the budget.
        min_tokens: smallest capacity that may be chosen.
        slowdown: measured over calibrated latency; only a device that turned out faster than calibrated counts, since
            a load may go away.
        overhead_ms: milliseconds outside the engine that count against the budget.

    Raises:
        ConfigError: naming the feasible minimum.
    """
    smallest = _allowed(table, min_tokens)[0]
    engine_ms = table[smallest] * min(slowdown, 1.0)
    if budget_ms >= engine_ms + overhead_ms:
        return
    # With the margin that the controller takes: what is named here will be held.
    minimum_ms = (engine_ms + overhead_ms) * (1.0 + _SPREADS * _MIN_SPREAD)
    outside = f" and {overhead_ms:.1f} ms pass outside the engine" if overhead_ms else ""
    raise ConfigError(
        f"latency_budget_ms: got {budget_ms:g}, but {smallest} tokens already take {engine_ms:.1f} ms here{outside}; "
        f"expected 0 (off) or at least {math.ceil(round(minimum_ms * 10, 6)) / 10:.1f}"
    )


def _allowed(table: LatencyTable, min_tokens: int) -> list[int]:
    return [capacity for capacity in table.capacities if capacity >= min_tokens] or [table.capacities[-1]]


class _Estimate:
    """Upper estimate of a noisy quantity that may jump."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._tail: deque[float] = deque(maxlen=_TAIL_WINDOW)

    def add(self, value: float) -> int:
        """Take in a value.

        Returns:
            +1 when it shows that the level has risen for good, -1 when it has fallen, else 0.
        """
        risen = self._outside(_RISEN_FRAMES, value, above=True)
        fallen = not risen and self._outside(_FALLEN_FRAMES, value, above=False)
        latest = _RISEN_FRAMES if risen else _FALLEN_FRAMES
        if risen or fallen:
            kept = list(self._recent)[len(self._recent) - latest + 1 :]
            self._recent.clear()
            self._recent.extend(kept)
            self._tail.clear()
            self._tail.extend(kept)
        self._recent.append(value)
        self._tail.append(value)
        return int(risen) - int(fallen)

    def median(self, default: float) -> float:
        """The middle of the recent values; `default` before any value."""
        return statistics.median(self._recent) if self._recent else default

    def upper(self, default: float) -> float:
        """Median plus spread, or what one frame in twenty exceeds: a single spike moves neither.

        `default` before any value.
        """
        if not self._recent:
            return default
        upper = statistics.median(self._recent) + _SPREADS * _spread(self._recent)
        if len(self._recent) < _FEW_FRAMES:
            upper = min(upper, _BEYOND_SEEN * max(self._recent))
        if len(self._tail) >= _MIN_TAIL_FRAMES:
            upper = max(upper, sorted(self._tail)[math.ceil((1.0 - _TAIL_SHARE) * len(self._tail)) - 1])
        return upper

    def _outside(self, count: int, value: float, above: bool) -> bool:
        """The latest `count` values, `value` included, all lie beyond what the ones before them suggest."""
        before = list(self._recent)[: len(self._recent) - count + 1]
        if len(self._recent) < count - 1 or not before:
            return False
        latest = [*list(self._recent)[len(self._recent) - count + 1 :], value]
        median, spread = statistics.median(before), _SPREADS * _spread(before)
        return min(latest) > median + spread if above else max(latest) < median - spread


def _spread(values: deque[float] | list[float]) -> float:
    """Standard deviation as the median absolute deviation suggests it: blind to a few spikes."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return max(1.4826 * deviation, _MIN_SPREAD * abs(median))


def _rising(values: list[float]) -> list[float]:
    """The closest non-decreasing sequence (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before_total, before_count = pools.pop()
            total, count = total + before_total, count + before_count
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]
