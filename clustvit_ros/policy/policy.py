# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What to do with a frame: at which size and with how many tokens, so that budget, guards and the user's bounds hold.

`plan` before an engine call, `learn` after it, `use_idle_time` between frames: these three see everything, and nothing
else has to be called in order. With a budget, each image size is calibrated between frames, by one measurement after
each and by more while no frame waits, so masks keep coming; until it is done, the fastest point that may be used is.
Everything but `check` and `status` belongs to the thread that owns the engine.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from clustvit_ros.engine import Engine, Prediction
from clustvit_ros.engine.ladder import OperatingPoint, WorthOrder, front_of, input_scales
from clustvit_ros.engine.machine import OthersMeter, others_seconds
from clustvit_ros.errors import ConfigError
from clustvit_ros.policy.budget import BudgetController, Decision
from clustvit_ros.policy.calibration import (
    Calibration,
    CalibrationCache,
    CalibrationKey,
    LatencyTable,
    anchors,
    points_of,
    settings_at,
)
from clustvit_ros.policy.merge_guard import MergeGuard
from clustvit_ros.policy.parameters import SegmentationParameters
from clustvit_ros.policy.plan import BudgetStatus, Lesson, Misses, Plan, check_budget

# Warming and calibrating a size costs seconds and memory; a stream that changes its size for ever must not add up.
_REMEMBERED_SIZES = 16
_PROGRESS_PERIOD_S = 2.0


class _ImageSize:
    """What is known about images of one size.

    Args:
        worth: orders operating points by what they are worth.
        engine: name of what runs, which is another one where graphs turn out not to be captured.
    """

    def __init__(self, worth: WorthOrder, engine: str) -> None:
        self._worth, self.engine = worth, engine
        self.calibration: Calibration | None = None
        self.controller: BudgetController | None = None
        self.table: LatencyTable | None = None
        self.failure = ""
        # Points and threads that may come and never ran, those that a budget may choose first, then those that the
        # threshold may lead to from there: what they need is made between frames.
        self.cold: list[tuple[OperatingPoint, int]] = []
        self.limits: tuple[Any, ...] = ()
        self.points: list[OperatingPoint] = []
        """All points within the user's limits, by size and capacity."""
        self.front: list[OperatingPoint] = []
        """Those that none beats in both latency and worth, fastest first; all while the table tells of none."""

    def bound(self, limits: tuple[Any, ...], points: list[OperatingPoint]) -> None:
        """Take other limits, and the points within them."""
        if limits[:2] != self.limits[:2]:
            self.failure = ""  # of other sizes
        self.limits, self.points = limits, points
        known = [point for point in points if self.knows([point])]
        ordered = sorted(points, key=self._worth)
        self.front = front_of(known, self.table, self._worth) if self.table is not None and known else ordered

    def knows(self, points: Sequence[OperatingPoint]) -> bool:
        """Whether points are of sizes that were timed; of a larger one, the table would promise too much."""
        return self.table is not None and self.table.covers(points)

    def use(self, table: LatencyTable) -> None:
        """Decide by a table from now on."""
        self.table = table
        self.bound(self.limits, self.points)
        self.controller = BudgetController(table, self.front)
        sizes = {point.tokens_total for point in self.front}
        beside = [point for point in self.points if point.tokens_total in sizes and point not in self.front]
        self.cold = [(point, threads) for point in self.front for threads in table.thread_counts]
        self.cold += [(point, table.thread_counts[0]) for point in beside]


class Policy:
    """Plans the calls of one engine.

    Args:
        engine: what is planned for; calibration and accuracy checks call it, too.
        logger: takes `info`, `warning` and `error`, as rclpy's loggers do.
        cache: keeps calibrations from start to start.
        clock: gives monotonic seconds.
        others_s: seconds that other processes have computed here; None where the system does not tell.
    """

    def __init__(
        self, engine: Engine, logger: Any, cache: CalibrationCache | None = None,
        clock: Callable[[], float] = time.monotonic, others_s: Callable[[], float | None] = others_seconds,
    ) -> None:  # fmt: skip
        self._engine, self._logger, self._clock, self._others_s = engine, logger, clock, others_s
        self._others = OthersMeter(others_s, clock)
        self._cache = cache or CalibrationCache()
        self._input_size = engine.info.input_size
        self._worth = WorthOrder(engine.info.accuracies)
        self._guard = MergeGuard(engine, self._worth, clock)
        self._guarded = self._recalibrated = False
        self._sizes: dict[tuple[int, int], _ImageSize] = {}
        self._newest: tuple[int, int] | None = None
        self._parameters = SegmentationParameters()
        self.misses = Misses()
        self._plan: Plan | None = None
        # Eighths of the tokens that were exempt from merging, of late and at most.
        self._exempt_eighths: deque[int] = deque(maxlen=10)
        self._exempt = 0
        self._unsettled = False  # the next frame, of any size, is no example: it waited for warm-up or measurement
        self._status = BudgetStatus()

    @property
    def status(self) -> BudgetStatus:
        """After the newest frame; any thread may ask."""
        return self._status

    def check(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        """Refuse a budget that cannot be held; any thread may ask.

        Raises:
            ConfigError: naming the feasible minimum.
        """
        if new.budget_terms == old.budget_terms or not new.latency_budget_ms:
            return
        if not new.adapts:
            raise ConfigError(
                f"latency_budget_ms: got {new.latency_budget_ms:g}, expected 0 while processing is every_frame, where "
                "nothing may adapt; set token_capacity, or use processing live"
            )
        size, table, status = self._status.image_size, self._status.table, self._status
        points = [] if size is None else self._make_points(size, new)
        if size is None or table is None or not table.covers(points):
            self._logger.info(
                f"latency_budget_ms {new.latency_budget_ms:g} is accepted unchecked: what is feasible will be known "
                "after calibration"
            )
            return
        front, counts = front_of(points, table, self._worth), new.budget_reference == "stamp"
        try:
            check_budget(table, front, new.latency_budget_ms, status.slowdown, status.overhead_ms * counts)
        except ConfigError as error:
            fastest_ms = min(table[point] for point in self._make_points(size, old))
            if new.eases_budget_of(old) and table[front[0]] <= fastest_ms:
                self._logger.warning(f"this eases the budget that is missed now, but not enough: {error}")
            elif new.latency_budget_ms != old.latency_budget_ms:
                raise
            else:
                raise ConfigError(f"with these values the budget in force cannot be held: {error}") from None

    def plan(
        self, images: Sequence[np.ndarray], parameters: SegmentationParameters, cameras: Sequence[str] = ("",),
        confidence: bool = False, clusters: bool = False,
    ) -> Plan:  # fmt: skip
        """Decide how the next frames are segmented; warms the engine for a size that is new.

        Args:
            images: (H, W, 3) uint8 RGB images of one size, for one engine call.
            parameters: values in force for them.
            cameras: name of the camera that each image is from.
            confidence: whether somebody wants the confidence map.
            clusters: whether somebody wants the cluster map.
        """
        size = (images[0].shape[0], images[0].shape[1])
        entry = self._prepare(size, parameters)
        guarded = parameters.is_guarded
        if self._guarded and not guarded:
            self._guard.forget()
        self._guarded = guarded
        checked = parameters.min_agreement and parameters.accuracy_check_period_s
        floor = self._guard.floor if checked else None
        point, state, decision = self._choose(entry, parameters, floor)
        scale = parameters.input_scale if point is None else point.input_scale
        # What the checks found wanting must not come back by the threshold.
        of_size = [each for each in entry.points if each.input_scale == scale]
        fewest = 0 if floor is None else (self._above(floor, of_size) or of_size[-1:])[0].capacity
        settings = parameters.settings(
            self._input_size, confidence, clusters, 0 if point is None else point.capacity, scale
        )
        if decision is not None and state != "off":
            settings = replace(settings, threads=decision.threads)
        if guarded:
            ladder = of_size if point is None else entry.front
            settings = self._guard.protect(settings, parameters, cameras, fewest, ladder)
        return Plan(
            parameters, cameras, images, settings, self._engine.input_size(size, scale),
            max(parameters.min_tokens, fewest), state, decision, self._guard.pairs,
        )  # fmt: skip

    def learn(self, plan: Plan, result: Prediction, ages_ms: Sequence[float], overtaken: bool = False) -> Lesson:
        """Learn from the call that `plan` was for.

        Args:
            plan: as `plan` gave it.
            result: what the engine made of it, in the model's own classes.
            ages_ms: milliseconds of each image, from its stamp to the publication of its mask.
            overtaken: whether the images had got carried masks before, which were judged in their place.
        """
        self._plan = plan
        if self._guarded:
            self._guard.saw(plan.cameras, plan.images, plan.settings, result)
        facts, stats = plan.as_pairs(), result.stats
        self._exempt_eighths.append(math.ceil(8 * stats.tokens_exempt / stats.tokens_total))
        self._exempt = max(self._exempt_eighths)
        if not plan.parameters.adapts:
            self._status = BudgetStatus(recalibrated=plan.parameters)  # there is no budget to report about
            return Lesson([False] * len(ages_ms), 0, facts)
        assert self._newest is not None  # `plan` came before
        entry = self._sizes[self._newest]
        judge = plan.is_missed if overtaken else partial(self.misses.judge, plan)
        missed = [judge(stats.total_ms, age_ms) for age_ms in ages_ms]
        # Of a batch, nobody knows what one frame costs.
        alone = len(ages_ms) == 1 and entry.calibration is None
        if entry.controller is not None and alone:
            point, others = stats.operating_point, self._others.cores()
            overhead_ms = None if self._unsettled else max(ages_ms[0] - stats.total_ms, 0.0)
            if entry.knows([point]):
                entry.controller.observe(point, stats.total_ms, overhead_ms, stats.threads, others)
        self._unsettled = False
        self._publish_status(entry)
        return Lesson(missed, self.misses.total, facts)

    def use_idle_time(self, is_free: Callable[[], bool]) -> None:
        """Do what can wait: an accuracy check that is due, and a calibration by one step, by more while `is_free()`."""
        self._guard.use_idle_time(is_free)
        entry = self._sizes.get(self._newest) if self._newest is not None else None
        while entry is not None and (entry.calibration is not None or entry.cold):
            self._unsettled = True
            try:
                self._prepare_further(entry)
            except Exception as error:  # whatever an engine raises; frames go on without a calibration
                entry.calibration, entry.cold, entry.failure = None, [], str(error) or type(error).__name__
                self._recalibrated = True
                self._logger.error(f"calibration failed: {entry.failure}")
            if entry.calibration is not None:
                self._logger.info(
                    f"calibrating: {100 * entry.calibration.progress:.0f} %", throttle_duration_sec=_PROGRESS_PERIOD_S
                )
            self._publish_status(entry)
            if not is_free():
                return

    def _choose(
        self, entry: _ImageSize, parameters: SegmentationParameters, floor: OperatingPoint | None
    ) -> tuple[OperatingPoint | None, str, Decision | None]:
        """The operating point to use (None: the user's own), the budget's state, and the controller's decision."""
        budget_ms = parameters.latency_budget_ms if parameters.adapts else 0.0
        allowed = self._above(floor, entry.front) or entry.front[-1:]
        if entry.controller is None or not entry.knows(allowed):
            if not budget_ms:
                return None, "off", None
            state = "calibrating" if entry.calibration is not None else "uncalibrated"
            return min(allowed, key=lambda point: (point.tokens_total, point.capacity)), state, None
        entry.controller.retarget(budget_ms or math.inf, allowed, parameters.budget_reference == "stamp")
        decision = entry.controller.decide()
        if not budget_ms:
            return None, "off", decision
        return decision.point, "held" if decision.feasible else "infeasible", decision

    def _above(self, floor: OperatingPoint | None, points: Sequence[OperatingPoint]) -> Sequence[OperatingPoint]:
        """The points that are worth at least what the accuracy checks ask for."""
        return [point for point in points if floor is None or self._worth(point) >= self._worth(floor)]

    def _make_points(self, image_size: tuple[int, int], parameters: SegmentationParameters) -> list[OperatingPoint]:
        """The points that the user's bounds leave, ascending; never none."""
        points = points_of(self._engine, image_size, _scales_of(parameters))
        # Nothing else than merging is bounded by what may be kept.
        merges = any(point.capacity < point.tokens_total for point in points)
        most, fewest = (merges and parameters.token_capacity) or math.inf, parameters.fewest_tokens
        eighths = self._exempt if parameters.exempts else 0  # they come before every bound: fewer will not be kept
        enough = [p for p in reversed(points) if p.capacity >= p.tokens_total * eighths // 8]
        exempt = {p.tokens_total: p.capacity for p in enough}
        capacities = (max(min(p.capacity, most), exempt[p.tokens_total] if eighths else 0) for p in points)
        bounded = dict.fromkeys(p._replace(capacity=int(c)) for p, c in zip(points, capacities, strict=True))
        return [point for point in bounded if point.capacity >= fewest] or [list(bounded)[-1]]

    def _prepare(self, image_size: tuple[int, int], parameters: SegmentationParameters) -> _ImageSize:
        if parameters.budget_target != self._parameters.budget_target:
            self.misses.start_over()
        self._newest, self._parameters = image_size, parameters
        again = parameters.recalibrate and not self._recalibrated
        self._recalibrated = self._recalibrated and parameters.recalibrate
        entry = self._sizes.get(image_size)
        # Another engine has other latencies, which matter to a budget alone.
        if entry is None or (parameters.latency_budget_ms and entry.engine != self._engine.info.engine):
            self._engine.warmup(image_size)
            self._unsettled = True
            if len(self._sizes) >= _REMEMBERED_SIZES:
                self._sizes.clear()
            entry = self._sizes[image_size] = _ImageSize(self._worth, self._engine.info.engine)
        bounds = (parameters.fewest_tokens, parameters.token_capacity, parameters.exempts, self._exempt)
        limits = (parameters.input_scale, parameters.min_input_scale, *bounds)
        if limits != entry.limits:
            entry.bound(limits, self._make_points(image_size, parameters))
        if entry.calibration is not None or not parameters.adapts or not (parameters.latency_budget_ms or again):
            return entry
        if not again and entry.knows(entry.points):
            return entry
        sizes = _scales_of(parameters)
        wanted = anchors(self._engine, image_size, sizes)
        key = CalibrationKey.of(self._engine, parameters.threads, image_size, wanted)
        kept = None if again else self._cache.load(key)
        if kept is not None:
            self._logger.info(f"latency of {_text(image_size)} images as measured earlier: {_describe(kept)}")
            self._use(entry, parameters, kept)
        elif again or not entry.failure:
            entry.calibration = Calibration(self._engine, image_size, sizes, others_s=self._others_s, clock=self._clock)
            entry.failure = ""
            self._logger.info(
                f"calibrating {len(wanted)} operating points for {_text(image_size)} images between frames, for a few "
                "seconds"
            )
        return entry

    def _prepare_further(self, entry: _ImageSize) -> None:
        """Take one step towards points that are timed and ready to run."""
        assert self._newest is not None  # a calibration belongs to a frame's size
        calibration = entry.calibration
        if calibration is None:
            settings = settings_at(*entry.cold.pop(0))
            if self._plan is not None:
                wanted = self._plan.settings
                settings = replace(
                    settings, output_size=wanted.output_size, confidence=wanted.confidence, clusters=wanted.clusters
                )
            self._engine.segment(np.zeros((*self._newest, 3), np.uint8), settings)
            return
        calibration.step()
        if not calibration.done:
            return
        table, entry.calibration = calibration.table(), None
        self._recalibrated = self._parameters.recalibrate
        self._logger.info(f"latency of {_text(self._newest)} images: {_describe(table)}")
        self._use(entry, self._parameters, table)
        if calibration.disturbed:
            self._logger.info("other processes computed meanwhile: this calibration is not kept for the next start")
            return
        key = CalibrationKey.of(self._engine, self._parameters.threads, self._newest, calibration.points)
        try:
            self._cache.store(key, table)
        except OSError as error:
            self._logger.warning(f"calibration cannot be kept for the next start: {error}")

    def _use(self, entry: _ImageSize, parameters: SegmentationParameters, table: LatencyTable) -> None:
        """Decide by a table from now on."""
        entry.use(table)
        if parameters.latency_budget_ms:
            try:
                check_budget(table, entry.front, parameters.latency_budget_ms)
            except ConfigError as error:
                self._logger.error(f"{error}; until then frames are segmented at that point")

    def _publish_status(self, entry: _ImageSize) -> None:
        controller = entry.controller
        self._status = BudgetStatus(
            plan=None if self._plan is None else replace(self._plan, images=self._plan.images[:0]),
            misses=self.misses.total, recent=self.misses.recent, table=entry.table, image_size=self._newest,
            slowdown=controller.slowdown if controller is not None else 1.0,
            overhead_ms=controller.overhead_ms if controller is not None else 0.0, failure=entry.failure,
            recalibrated=self._parameters if self._recalibrated else None,
        )  # fmt: skip


def _scales_of(parameters: SegmentationParameters) -> tuple[float, ...]:
    return input_scales(parameters.min_input_scale, parameters.input_scale)


def _text(image_size: tuple[int, int]) -> str:
    return f"{image_size[1]}x{image_size[0]}"


def _describe(table: LatencyTable) -> str:
    texts = []
    for threads, (total, kept), value in table.items():
        by = f" on {threads} thread{'s' if threads > 1 else ''}" if threads else ""
        texts.append(f"{kept} of {total} tokens{by} {value:.1f} ms")
    return ", ".join(texts)
