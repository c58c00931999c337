# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What to do with a frame: how many tokens it may keep so that budget, guards and the user's bounds hold.

`plan` before an engine call, `learn` after it, `use_idle_time` between frames: these three see everything, and nothing
else has to be called in order. Each image size is calibrated between frames, by one measurement after each and by more
while no frame waits, so masks keep coming; until it is done, a budget gets the smallest capacity that may be used.
Everything but `check` and `status` belongs to the thread that owns the engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clustvit_ros.engine import Engine, Prediction
from clustvit_ros.errors import ConfigError
from clustvit_ros.policy.budget import BudgetController, Decision, LatencyTable
from clustvit_ros.policy.calibration import Calibration, CalibrationCache, CalibrationKey
from clustvit_ros.policy.merge_guard import MergeGuard
from clustvit_ros.policy.parameters import SegmentationParameters
from clustvit_ros.policy.plan import BudgetStatus, Lesson, Misses, Plan

# Warming and calibrating a size costs seconds and memory; a stream that changes its size for ever must not add up.
_REMEMBERED_SIZES = 16
_PROGRESS_PERIOD_S = 2.0


class _ImageSize:
    """What is known about images of one size.

    Args:
        capacities: the engine's ladder for it.
    """

    def __init__(self, capacities: tuple[int, ...]) -> None:
        self.capacities = capacities
        self.calibration: Calibration | None = None
        self.controller: BudgetController | None = None
        self.table: LatencyTable | None = None
        self.failure = ""
        # The next frame is no example: it waited for the warm-up or for a measurement.
        self.unsettled = True

    def use(self, latency_ms: dict[int, float]) -> None:
        """Decide by calibrated milliseconds per capacity from now on."""
        self.table = LatencyTable(latency_ms)
        self.controller = BudgetController(self.table)


class Policy:
    """Plans the calls of one engine.

    Args:
        engine: what is planned for; calibration and accuracy checks call it, too.
        logger: takes `info`, `warning` and `error`, as rclpy's loggers do.
        cache: keeps calibrations from start to start.
        clock: gives monotonic seconds.
    """

    def __init__(
        self, engine: Engine, logger: Any, cache: CalibrationCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._engine, self._logger = engine, logger
        self._cache = cache or CalibrationCache()
        self._input_size = engine.info.input_size
        self._guard = MergeGuard(engine, clock)
        self._guarded = False
        self._sizes: dict[tuple[int, int], _ImageSize] = {}
        self._newest: tuple[int, int] | None = None
        self._parameters = SegmentationParameters()
        self._misses = Misses()
        self._recalibrated = False
        self._plan: Plan | None = None
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
        if _budget_of(new) == _budget_of(old) or not new.latency_budget_ms:
            return
        if not new.adapts:
            raise ConfigError(
                f"latency_budget_ms: got {new.latency_budget_ms:g}, expected 0 while processing is every_frame, where "
                "nothing may adapt; set token_capacity, or use processing live"
            )
        status = self._status
        status.check(new)
        if status.table is None:
            self._logger.info(
                f"latency_budget_ms {new.latency_budget_ms:g} is accepted unchecked: what is feasible will be known "
                "after calibration"
            )

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
        floor = self._guard.floor(size) if guarded and parameters.min_agreement else 0
        min_tokens = max(parameters.min_tokens, floor)
        raised = parameters if min_tokens == parameters.min_tokens else replace(parameters, min_tokens=min_tokens)
        ceiling, state, decision = self._bound(entry, raised)
        settings = parameters.settings(self._input_size, confidence, clusters, ceiling)
        if guarded:
            settings = self._guard.protect(settings, parameters, cameras, floor)
        return Plan(
            parameters, cameras, images, settings, self._input_size, min_tokens, state, decision, self._guard.pairs
        )

    def learn(self, plan: Plan, result: Prediction, ages_ms: Sequence[float]) -> Lesson:
        """Learn from the call that `plan` was for.

        Args:
            plan: as `plan` gave it.
            result: what the engine made of it, in the model's own classes.
            ages_ms: milliseconds of each image, from its stamp to the publication of its mask.
        """
        self._plan = plan
        if self._guarded:
            self._guard.saw(plan.cameras, plan.images, plan.settings, result)
        facts, stats = plan.as_pairs(), result.stats
        if not plan.parameters.adapts:
            self._status = BudgetStatus(recalibrated=True)  # there is no budget to report about
            return Lesson([False] * len(ages_ms), 0, facts)
        assert self._newest is not None  # `plan` came before
        entry = self._sizes[self._newest]
        missed = [plan.is_missed(stats.total_ms, age_ms) for age_ms in ages_ms]
        if plan.budget_ms:
            for each in missed:
                self._misses.add(each)
        # Of a batch, nobody knows what one frame costs.
        settled = entry.calibration is None and not entry.unsettled and len(ages_ms) == 1
        if entry.controller is not None and settled:
            overhead_ms = max(ages_ms[0] - stats.total_ms, 0.0)
            entry.controller.observe(stats.token_capacity, stats.total_ms, overhead_ms)
        entry.unsettled = False
        self._publish_status(entry)
        return Lesson(missed, self._misses.total, facts)

    def use_idle_time(self, is_free: Callable[[], bool]) -> None:
        """Do what can wait: an accuracy check that is due, and a calibration by one step, by more while `is_free()`."""
        self._guard.use_idle_time(is_free)
        entry = self._sizes.get(self._newest) if self._newest is not None else None
        while entry is not None and entry.calibration is not None:
            entry.unsettled = True
            try:
                entry.calibration.step()
                if entry.calibration.done:
                    self._finish(entry, entry.calibration)
            except Exception as error:  # whatever an engine raises; frames go on without a calibration
                entry.calibration, entry.failure = None, str(error) or type(error).__name__
                self._recalibrated = True
                self._logger.error(f"calibration failed: {entry.failure}")
            if entry.calibration is not None:
                self._logger.info(
                    f"calibrating: {100 * entry.calibration.progress:.0f} %", throttle_duration_sec=_PROGRESS_PERIOD_S
                )
            self._publish_status(entry)
            if not is_free():
                return

    def _bound(self, entry: _ImageSize, parameters: SegmentationParameters) -> tuple[int, str, Decision | None]:
        """Most tokens that may be kept (0 is no bound), the budget's state, and the controller's decision."""
        budget_ms = parameters.latency_budget_ms if parameters.adapts else 0.0
        fewest = parameters.fewest_tokens
        decision = None
        ceiling = next((c for c in entry.capacities if c >= fewest), entry.capacities[-1])
        state = "calibrating" if entry.calibration is not None else "uncalibrated"
        if entry.controller is not None:
            entry.controller.retarget(budget_ms or math.inf, fewest, parameters.budget_reference == "stamp")
            decision = entry.controller.decide()
            ceiling, state = decision.capacity, "held" if decision.feasible else "infeasible"
        bounds = [bound for bound in (parameters.token_capacity, ceiling if budget_ms else 0) if bound]
        return min(bounds, default=0), state if budget_ms else "off", decision

    def _prepare(self, image_size: tuple[int, int], parameters: SegmentationParameters) -> _ImageSize:
        if _target_of(parameters) != _target_of(self._parameters):
            self._misses.start_over()
        self._newest, self._parameters = image_size, parameters
        again = parameters.recalibrate and not self._recalibrated
        self._recalibrated = self._recalibrated and parameters.recalibrate
        entry = self._sizes.get(image_size)
        if entry is None:
            self._engine.warmup(image_size)
            if len(self._sizes) >= _REMEMBERED_SIZES:
                self._sizes.clear()
            entry = self._sizes[image_size] = _ImageSize(self._engine.capacities(image_size))
            kept = None
            if parameters.adapts and not again:
                kept = self._cache.load(self._key(entry, image_size, parameters.threads))
            if kept is not None:
                entry.use(kept)
                self._logger.info(f"latency of {_text(image_size)} images as measured earlier: {_describe(kept)}")
                self._tell_infeasible(entry, parameters)
        start = again or (entry.table is None and not entry.failure)
        if parameters.adapts and start and entry.calibration is None:
            entry.calibration, entry.failure = Calibration(self._engine, image_size), ""
            self._logger.info(
                f"calibrating {len(entry.capacities)} token capacities for {_text(image_size)} images between frames, "
                "for a few seconds"
            )
        return entry

    def _finish(self, entry: _ImageSize, calibration: Calibration) -> None:
        latency_ms = calibration.latency_ms()
        entry.use(latency_ms)
        entry.calibration = None
        self._recalibrated = self._parameters.recalibrate
        assert self._newest is not None  # a calibration belongs to a frame's size
        self._logger.info(f"latency of {_text(self._newest)} images: {_describe(latency_ms)}")
        self._tell_infeasible(entry, self._parameters)
        try:
            self._cache.store(self._key(entry, self._newest, self._parameters.threads), latency_ms)
        except OSError as error:
            self._logger.warning(f"calibration cannot be kept for the next start: {error}")

    def _tell_infeasible(self, entry: _ImageSize, parameters: SegmentationParameters) -> None:
        try:
            BudgetStatus(table=entry.table).check(parameters)
        except ConfigError as error:
            self._logger.error(f"{error}; until then frames are segmented with the fewest tokens allowed")

    def _key(self, entry: _ImageSize, image_size: tuple[int, int], threads: int) -> CalibrationKey:
        return CalibrationKey.of(self._engine.info, threads, image_size, entry.capacities)

    def _publish_status(self, entry: _ImageSize) -> None:
        controller = entry.controller
        self._status = BudgetStatus(
            plan=None if self._plan is None else replace(self._plan, images=self._plan.images[:0]),
            misses=self._misses.total, recent=self._misses.recent, table=entry.table,
            slowdown=controller.typical_slowdown if controller is not None else 1.0,
            overhead_ms=controller.typical_overhead_ms if controller is not None else 0.0, failure=entry.failure,
            recalibrated=self._recalibrated,
        )  # fmt: skip


def _budget_of(parameters: SegmentationParameters) -> tuple[float, str, int]:
    return *_target_of(parameters), parameters.fewest_tokens


def _target_of(parameters: SegmentationParameters) -> tuple[float, str]:
    return parameters.latency_budget_ms, parameters.budget_reference


def _text(image_size: tuple[int, int]) -> str:
    return f"{image_size[1]}x{image_size[0]}"


def _describe(latency_ms: dict[int, float]) -> str:
    return ", ".join(f"{tokens} tokens {value:.1f} ms" for tokens, value in sorted(latency_ms.items()))
