# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Holding a latency budget by choosing an operating point: input size and token capacity.

Feed-forward from a calibrated table (what a point costs on this device when nothing else runs), corrected by feedback
(how much slower frames are just now). The correction is an upper estimate over recent frames, so that noise is paid for
in advance; a lasting change of load replaces those frames at once instead of fading in. Where the estimate was too low,
the frame that was late makes room for those after it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from clustvit_ros.engine.ladder import OperatingPoint
from clustvit_ros.policy.calibration import LatencyTable

# Frames that the slowdown is estimated from.
_WINDOW = 24
# So many frames in a row beyond the estimate are no spikes any more: the load has changed.
_RISEN_FRAMES = 3
_FALLEN_FRAMES = 6
# A better point must fit with this to spare, for so many frames in a row, before it is taken.
_HEADROOM = 0.05
_STEADY_FRAMES = 6
# Of so many frames, one in fifty may be above the estimate, however seldom and wild spikes are, and what was seen is
# not the worst that comes; with fewer frames than the second number, a share says nothing.
_TAIL_WINDOW = 60
# Another budget leads to other points, of which older spikes tell less.
_TAIL_AFTER_CHANGE = 16
_MIN_TAIL_FRAMES = 8
_TAIL_SHARE = 0.02
_BEYOND_TAIL = 0.15  # one in 30 exceeds the second largest of 60
# One of so many frames may be late; after it, they get this share of the budget, so that there is no second one.
_LATE_FRAMES = 50
_LATE_SHARE = 0.8
_FEW_FRAMES = 8  # a spread over fewer is a guess; what was seen bounds it
_BEYOND_SEEN = 1.1
# Cores that others must use less than they did for a while, for what was learnt under their load to be forgotten.
_LOAD_FELL = 0.5
_LEVEL_SHARE = 0.05  # how much one frame counts in the level of others' use
# Where others use hardly a core, what slowed a count of threads was a moment of the machine's: after so many frames
# without it, nothing speaks against it any more. Else its last spikes would bar it for as long as it is not used.
_STALE_FRAMES = 60
_IDLE_CORES = 0.25
_UNTRIED = 1.1  # measured over calibrated latency of a count of threads that was not tried yet, while another one was
# Several threads wait for each other now and then, more rarely and for longer than few frames show: so much faster they
# must be to be preferred to one.
_MORE_THREADS = 1.12
_MIN_SPREAD = 0.01  # noise is assumed to be at least this much, relative
# Spreads above the median that the estimate covers: under normal noise it is exceeded by 6 frames in 1,000.
_SPREADS = 2.5
# A point that was left soon after it was taken is not tried again for so many frames, doubled each time.
_RETRY_FRAMES = 60
_MAX_RETRY_FRAMES = 3840


@dataclass(frozen=True)
class Decision:
    """What the controller allows for the next frame, and why.

    Args:
        point: input size, and largest token capacity to use.
        threads: CPU threads to use; 0 is the engine's own choice.
        budget_ms: the budget in force.
        engine_budget_ms: what is left of it for the engine.
        slowdown: upper estimate of measured over calibrated latency, with so many threads.
        overhead_ms: upper estimate of everything outside the engine that counts against the budget.
        point_ms: latency at `point` on the undisturbed device, with as many threads as are best there.
        predicted_ms: upper estimate of the engine's latency at `point`.
        least_ms: upper estimate of the latency that counts at the fastest point allowed, or, where more threads make
            that faster, at `point`: the least budget that holds.
        feasible: False when every point is expected to miss the budget.
    """

    point: OperatingPoint
    threads: int
    budget_ms: float
    engine_budget_ms: float
    slowdown: float
    overhead_ms: float
    point_ms: float
    predicted_ms: float
    least_ms: float
    feasible: bool


class BudgetController:
    """Chooses the most accurate operating point whose predicted latency fits the budget.

    Call `decide` before a frame and `observe` after it. Deterministic: the same observations give the same decisions.
    Where threads can be chosen, each count has an estimate of its own, and the one with the lowest prediction is used:
    threads of one operation wait for each other, and with every core that others use, more of them lose more.
    A budget that cannot be held gets the fastest point allowed, and `Decision.feasible` says so; `check_budget` refuses
    it beforehand.

    Args:
        table: calibrated latencies.
        points: those that may be chosen, fastest and least accurate first, as `front_of` gives them; at least one.
        budget_ms: milliseconds a frame may take; infinity is no budget.
        counts_overhead: milliseconds outside the engine count against the budget.
    """

    def __init__(
        self, table: LatencyTable, points: Sequence[OperatingPoint], budget_ms: float = math.inf,
        counts_overhead: bool = True,
    ) -> None:  # fmt: skip
        self._table = table
        self._slowdowns = {threads: _Estimate() for threads in table.thread_counts}
        self._uppers = dict.fromkeys(table.thread_counts, _Upper(1.0))
        self._loads = _Loads()
        self._overheads = _Estimate()
        self._disuse = {threads: _Disuse() for threads in table.thread_counts}
        self._frame = 0
        self._target: tuple[float, tuple[OperatingPoint, ...], bool] | None = None
        self.retarget(budget_ms, points, counts_overhead)

    def retarget(self, budget_ms: float, points: Sequence[OperatingPoint], counts_overhead: bool = True) -> None:
        """Hold another budget from the next frame on; what was learnt about the device's load stays."""
        target = budget_ms, tuple(points), counts_overhead
        if self._target == target:
            return
        if self._target is not None and self._target[0] != budget_ms:
            for count, estimate in self._slowdowns.items():
                estimate.forget_spikes(but=max(0, _TAIL_AFTER_CHANGE - self._disuse[count].frames))
            self._refresh()
        self._target = target
        self._budget_ms, self._points, self._counts_overhead = target
        self._point_ms = [{count: self._table.at(point, count) for count in self._slowdowns} for point in self._points]
        self._raised_at = self._frame - _RETRY_FRAMES
        self._judged_from = self._frame + _FEW_FRAMES
        self._forget_failures()
        self._wanted_larger = 0
        self._index = 0
        self._index = self._fitting()[0]

    @property
    def slowdown(self) -> float:
        """Upper estimate of measured over calibrated latency at the fastest point; 1 before any frame."""
        return self._predict(0)[0] / min(self._point_ms[0].values())

    @property
    def overhead_ms(self) -> float:
        """Upper estimate of the milliseconds outside the engine, counted or not; 0 before any frame."""
        return self._overheads.upper(0.0).at()

    def decide(self) -> Decision:
        """The most accurate point allowed for the next frame."""
        overhead_ms = self.overhead_ms if self._counts_overhead else 0.0
        (least_ms, _), (predicted_ms, threads) = self._predict(0), self._predict(self._index)
        engine_budget_ms = self._budget_ms - overhead_ms
        point_ms = self._point_ms[self._index]
        return Decision(
            point=self._points[self._index], threads=threads, budget_ms=self._budget_ms,
            engine_budget_ms=engine_budget_ms, slowdown=predicted_ms / point_ms[threads], overhead_ms=overhead_ms,
            point_ms=min(point_ms.values()), predicted_ms=predicted_ms,
            least_ms=min(least_ms, predicted_ms) + overhead_ms, feasible=predicted_ms <= engine_budget_ms,
        )  # fmt: skip

    def _predict(self, index: int) -> tuple[float, int]:
        """The lowest upper estimate of a point's latency, and the threads that it is for."""
        of_counts = self._point_ms[index].items()
        predictions = [(ms * self._uppers[count].at(math.sqrt(ms)), count) for count, ms in of_counts]
        return min(predictions, key=lambda pair: pair[0] * (_MORE_THREADS if pair[1] > 1 else 1.0))

    def observe(
        self, point: OperatingPoint, engine_ms: float, overhead_ms: float | None = 0.0, threads: int = 0,
        others: float | None = None,
    ) -> None:  # fmt: skip
        """Learn from a frame.

        Args:
            point: where it was processed; its capacity may be below the one allowed.
            engine_ms: milliseconds in the engine.
            overhead_ms: milliseconds outside it; learnt even while they do not count. None where they are no example.
            threads: CPU threads that it was processed with.
            others: cores that other processes use now; None where nobody knows.
        """
        self._frame += 1
        if threads not in self._slowdowns:
            threads = next(iter(self._slowdowns))
        self._forget_other_loads(threads, others)
        # Where others' use of the cores is known, it tells when spikes are over; elsewhere a level that fell does.
        metered = others is not None and threads > 0
        calibrated_ms = self._table.at(point, threads)
        if self._slowdowns[threads].add(engine_ms / calibrated_ms, math.sqrt(calibrated_ms), metered) < 0:
            self._forget_failures(spikes=not metered)
        self._refresh()
        if overhead_ms is not None:
            self._overheads.add(overhead_ms)
        counted_ms = engine_ms + (overhead_ms or 0.0) * self._counts_overhead
        # Those that were much later would have been so at a lower point, too, and the first ones show what fits.
        if self._budget_ms < counted_ms <= self._budget_ms / _LATE_SHARE and self._frame > self._judged_from:
            self._late_at = self._frame
        fitting, roomy = self._fitting()
        if fitting < self._index:
            self._lower(fitting)
        elif roomy > self._index:
            self._wanted_larger += 1
            if self._wanted_larger >= _STEADY_FRAMES:
                self._index, self._raised_at, self._wanted_larger = roomy, self._frame, 0
        else:
            self._wanted_larger = 0

    def _refresh(self) -> None:
        untried = _UNTRIED if self._frame else 1.0
        self._uppers = {count: estimate.upper(untried) for count, estimate in self._slowdowns.items()}

    def _forget_other_loads(self, threads: int, others: float | None) -> None:
        """Once others use clearly fewer cores, spikes under their load say nothing, nor does any of other counts."""
        if others is not None and self._loads.fell(others):
            self._forget_failures()
            for count, estimate in self._slowdowns.items():
                estimate.forget_spikes() if count == threads else estimate.forget()
        for count, estimate in self._slowdowns.items():
            if self._disuse[count].stale(count == threads, self._loads.level <= _IDLE_CORES):
                estimate.forget()

    def _forget_failures(self, spikes: bool = True) -> None:
        """The load went away: what failed under it says nothing about now."""
        self._retry_at: dict[OperatingPoint, int] = {}
        self._retry_frames: dict[OperatingPoint, int] = {}
        if spikes:
            self._late_at = self._frame - _LATE_FRAMES

    def _fitting(self) -> tuple[int, int]:
        """Indices of the most accurate point that fits, and of the most accurate allowed one with headroom."""
        share = _LATE_SHARE if self._frame - self._late_at < _LATE_FRAMES else 1.0
        budget_ms = share * self._budget_ms - (self.overhead_ms if self._counts_overhead else 0.0)
        fitting = roomy = 0
        for index, point in enumerate(self._points):
            predicted_ms, _ = self._predict(index)
            if predicted_ms <= budget_ms:
                fitting = index
            if predicted_ms <= budget_ms * (1.0 - _HEADROOM) and self._retry_at.get(point, 0) <= self._frame:
                roomy = index
        return fitting, roomy

    def _lower(self, index: int) -> None:
        if self._frame - self._raised_at < _RETRY_FRAMES:
            # Taken and left again: the estimate is at odds with this point, and trying on would oscillate.
            left = self._points[self._index]
            frames = min(self._retry_frames.get(left, _RETRY_FRAMES // 2) * 2, _MAX_RETRY_FRAMES)
            self._retry_frames[left] = frames
            for better in self._points[self._index :]:
                self._retry_at[better] = self._frame + frames
        self._index = index
        self._wanted_larger = 0


class _Loads:
    """Notices when other processes stop computing."""

    def __init__(self) -> None:
        self.level = math.inf  # of late; nobody knows yet
        self._most = 0.0

    def fell(self, others: float) -> bool:
        """Whether they use clearly fewer cores than they did for a while; a load that wavers does not fall."""
        self.level = others if math.isinf(self.level) else self.level + _LEVEL_SHARE * (others - self.level)
        self._most = max(self._most, self.level)
        if others >= self._most - _LOAD_FELL:
            return False
        self.level = self._most = others
        return True


class _Disuse:
    """Tells when a count of threads was not used for so long that what it showed is to be forgotten."""

    def __init__(self) -> None:
        self.frames = 0  # in a row without it
        self._used = 0
        self._patience = _STALE_FRAMES

    def stale(self, used: bool, idle: bool) -> bool:
        """Count a frame: whether it was processed with this count, and whether others leave the machine idle."""
        if used:
            self.frames = 0
            self._used += 1
            if self._used >= _STALE_FRAMES:
                self._patience = _STALE_FRAMES
            return False
        self.frames += 1
        if not idle or self.frames < self._patience:
            return False
        # Given up again soon, it is not tried as often: who slows it down may not be among this machine's processes.
        self.frames = self._used = 0
        self._patience = min(2 * self._patience, _MAX_RETRY_FRAMES)
        return True


class _Upper(NamedTuple):
    """An upper estimate, which may depend on the size of what is estimated.

    Attributes:
        level: what noise around the middle makes likely, whatever the size.
        middle: of recent values.
        excess: what spikes add to the middle, times the square root of the size.
    """

    level: float
    middle: float = 0.0
    excess: float = 0.0

    def at(self, root: float = 1.0) -> float:
        """The estimate for a size of which this is the square root."""
        return max(self.level, self.middle + self.excess / root)


class _Estimate:
    """Upper estimate of a noisy quantity that may jump.

    A long frame meets more spikes than a short one, and not in proportion longer ones: measured beside a renderer and a
    recorder, one in fifty of frames of 13, 19 and 63 ms took 9, 11 and 18 ms more. So the excess of a ratio is taken to
    fall with the square root of the milliseconds that it is about.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._tail: deque[tuple[float, float]] = deque(maxlen=_TAIL_WINDOW)

    def add(self, value: float, root: float = 1.0, keep_spikes: bool = False) -> int:
        """Take in a value.

        Args:
            value: to be estimated.
            root: square root of the size of what it is about.
            keep_spikes: remember what was seen at another level; else that is forgotten together with it.

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
            if not keep_spikes:
                tail = list(self._tail)[len(self._tail) - latest + 1 :]
                self._tail.clear()
                self._tail.extend(tail)
        self._recent.append(value)
        self._tail.append((value, root))
        return int(risen) - int(fallen)

    def forget(self) -> None:
        """Know nothing again."""
        self._recent.clear()
        self._tail.clear()

    def forget_spikes(self, but: int = 0) -> None:
        """Keep what recent frames show by their middle, and spikes among the latest `but` frames."""
        while len(self._tail) > but:
            self._tail.popleft()

    def upper(self, default: float) -> _Upper:
        """Median plus spread, or what one frame in fifty exceeds: a single spike moves neither.

        `default` before any value.
        """
        if not self._recent:
            return _Upper(default)
        median = statistics.median(self._recent)
        level = median + _SPREADS * _spread(self._recent)
        if len(self._recent) < _FEW_FRAMES:
            level = min(level, _BEYOND_SEEN * max(self._recent))
        if len(self._tail) < _MIN_TAIL_FRAMES:
            return _Upper(level)
        rank = min(math.ceil((1.0 - _TAIL_SHARE) * len(self._tail)), len(self._tail) - 1)
        excess = sorted((value - median) * root for value, root in self._tail)[rank - 1]
        return _Upper(level, median, (1.0 + _BEYOND_TAIL) * excess)

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
