"""Holding a latency budget by bounding the token capacity.

Feed-forward from a calibrated table (what a capacity costs on this device when nothing else runs), corrected by
feedback (how much slower frames are just now). The correction is an upper estimate over recent frames, so that noise is
paid for in advance; a lasting change of load replaces those frames at once instead of fading in.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

from clustvit_ros.control.latency import LatencyTable
from clustvit_ros.errors import ConfigError

# Frames that the slowdown is estimated from.
_WINDOW = 24
# So many frames in a row beyond the estimate are no spikes any more: the load has changed.
_RISEN_FRAMES = 3
_FALLEN_FRAMES = 6
# A larger capacity must fit with this to spare, for so many frames in a row, before it is taken.
_HEADROOM = 0.05
_STEADY_FRAMES = 6
# Noise is assumed to be at least this much, relative.
_MIN_SPREAD = 0.01
# Spreads above the median that the estimate covers: under normal noise it is exceeded by 6 frames in 1,000.
_SPREADS = 2.5
# A capacity that was left soon after it was taken is not tried again for so many frames, doubled each time.
_RETRY_FRAMES = 60
_MAX_RETRY_FRAMES = 3840


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

    Args:
        table: calibrated latencies.
        budget_ms: milliseconds a frame may take.
        min_tokens: smallest capacity that may be chosen, whatever the budget.

    Raises:
        ConfigError: no capacity fits the budget even on an idle device; the message names the feasible minimum.
    """

    def __init__(self, table: LatencyTable, budget_ms: float, min_tokens: int = 0) -> None:
        self._table = table
        self._capacities = [c for c in table.capacities if c >= min_tokens] or [table.capacities[-1]]
        check_budget(table, budget_ms, min_tokens)
        self._budget_ms = budget_ms
        self._slowdowns = _Estimate()
        self._overheads = _Estimate()
        self._frame = 0
        self._raised_at = -_RETRY_FRAMES
        self._retry_at: dict[int, int] = {}
        self._retry_frames: dict[int, int] = {}
        self._wanted_larger = 0
        self._capacity = self._fitting(budget_ms)[0]

    def decide(self) -> Decision:
        """The largest capacity allowed for the next frame."""
        slowdown, overhead_ms = self._slowdowns.upper(1.0), self._overheads.upper(0.0)
        engine_budget_ms = self._budget_ms - overhead_ms
        predicted_ms = self._table[self._capacity] * slowdown
        return Decision(
            capacity=self._capacity,
            budget_ms=self._budget_ms,
            engine_budget_ms=engine_budget_ms,
            slowdown=slowdown,
            overhead_ms=overhead_ms,
            predicted_ms=predicted_ms,
            feasible=self._table[self._capacities[0]] * slowdown <= engine_budget_ms,
        )

    def observe(self, capacity: int, engine_ms: float, overhead_ms: float = 0.0) -> None:
        """Learn from a frame.

        Args:
            capacity: that it was processed with; it may be below the one allowed.
            engine_ms: milliseconds in the engine.
            overhead_ms: milliseconds outside it that count against the budget.
        """
        self._frame += 1
        if self._slowdowns.add(engine_ms / self._table[capacity]) < 0:
            # The load went away: what failed under it says nothing about now.
            self._retry_at.clear()
            self._retry_frames.clear()
        self._overheads.add(overhead_ms)
        budget_ms = self._budget_ms - self._overheads.upper(0.0)
        slowdown = self._slowdowns.upper(1.0)
        fitting, roomy = self._fitting(budget_ms / slowdown)
        if fitting < self._capacity:
            self._lower(fitting)
        elif roomy > self._capacity:
            self._wanted_larger += 1
            if self._wanted_larger >= _STEADY_FRAMES:
                self._raise(roomy)
        else:
            self._wanted_larger = 0

    def _fitting(self, budget_ms: float) -> tuple[int, int]:
        """The largest capacity that fits, and the largest allowed one that fits with headroom."""
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


def check_budget(table: LatencyTable, budget_ms: float, min_tokens: int = 0) -> None:
    """Refuse a budget that cannot be held on an idle device.

    Raises:
        ConfigError: naming the feasible minimum.
    """
    smallest = next((c for c in table.capacities if c >= min_tokens), table.capacities[-1])
    minimum_ms = table[smallest]
    if not budget_ms >= minimum_ms:
        raise ConfigError(
            f"latency_budget_ms: got {budget_ms:g}, but {smallest} tokens already take {minimum_ms:.1f} ms here; "
            f"expected 0 (off) or at least {minimum_ms:.1f}"
        )


class _Estimate:
    """Upper estimate of a noisy quantity that may jump."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)

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
        self._recent.append(value)
        return int(risen) - int(fallen)

    def upper(self, default: float) -> float:
        """Median plus spread: a single spike does not move it. `default` before any value."""
        if not self._recent:
            return default
        return statistics.median(self._recent) + _SPREADS * _spread(self._recent)

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
