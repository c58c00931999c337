"""Keeps the latency budget: calibrates each image size, and tells every frame how many tokens it may keep.

Calibration happens between frames: one measurement after each, more while no frame waits. So masks keep coming; until
it is done, a budget gets the smallest capacity that may be used. Everything but `check` and `status` belongs to the
worker's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from clustvit_ros.engine import Engine, Stats
from clustvit_ros.errors import ConfigError
from clustvit_ros.node.parameters import SegmentationParameters
from clustvit_ros.policy import Allowance, BudgetController, BudgetStatus, LatencyTable, MissCounter, Misses
from clustvit_ros.policy.calibration import Calibration, CalibrationCache, CalibrationKey

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


class LatencyControl:
    """One engine's latency, for every size of images that it meets.

    Args:
        engine: used by the thread that calls.
        logger: an rclpy logger.
        cache: of calibrations.
    """

    def __init__(self, engine: Engine, logger: Any, cache: CalibrationCache | None = None) -> None:
        self._engine = engine
        self._logger = logger
        self._cache = cache or CalibrationCache()
        self._sizes: dict[tuple[int, int], _ImageSize] = {}
        self._device = engine.info.device
        self._newest: tuple[int, int] | None = None
        self._parameters = SegmentationParameters()
        self._misses = MissCounter()
        self._recalibrated = False
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
        status = self._status
        status.check(new.latency_budget_ms, new.budget_reference, _min_tokens(new))
        if status.table is None:
            self._logger.info(
                f"latency_budget_ms {new.latency_budget_ms:g} is accepted unchecked: what is feasible will be known "
                "after calibration"
            )

    def allow(self, image_size: tuple[int, int], parameters: SegmentationParameters) -> Allowance:
        """Decide about the next frame; warms the engine for a size that is new.

        Args:
            image_size: (height, width) of the frame.
            parameters: in force for it.
        """
        entry = self._prepare(image_size, parameters)
        if (parameters.latency_budget_ms, parameters.budget_reference) != (
            self._parameters.latency_budget_ms, self._parameters.budget_reference,
        ):  # fmt: skip
            self._misses.start_over()
        self._newest, self._parameters = image_size, parameters
        budget_ms, min_tokens = parameters.latency_budget_ms, _min_tokens(parameters)
        decision = None
        ceiling = next((c for c in entry.capacities if c >= min_tokens), entry.capacities[-1])
        state = "calibrating" if entry.calibration is not None else "uncalibrated"
        if entry.controller is not None:
            entry.controller.retarget(budget_ms or math.inf, min_tokens, parameters.budget_reference == "stamp")
            decision = entry.controller.decide()
            ceiling, state = decision.capacity, "held" if decision.feasible else "infeasible"
        bounds = [bound for bound in (parameters.token_capacity, ceiling if budget_ms else 0) if bound]
        return Allowance(
            budget_ms=budget_ms,
            reference=parameters.budget_reference,
            policy=parameters.deadline_policy,
            min_tokens=parameters.min_tokens,
            token_ceiling=min(bounds, default=0),
            state=state if budget_ms else "off",
            decision=decision,
        )

    def observe(self, allowance: Allowance, engine: Stats, age_ms: float, missed: bool, learn: bool = True) -> Misses:
        """Learn from the frame that `allowance` was for.

        Args:
            allowance: as `allow` gave it.
            engine: what the engine did.
            age_ms: milliseconds from the frame's stamp to the publication of its mask.
            missed: it missed its deadline.
            learn: the frame is an example of what one frame costs; one of a batch is not.

        Returns:
            Deadline misses so far, this frame included.
        """
        assert self._newest is not None  # `allow` comes first
        entry = self._sizes[self._newest]
        if allowance.budget_ms:
            self._misses.add(missed)
        if learn and entry.controller is not None and entry.calibration is None and not entry.unsettled:
            overhead_ms = max(age_ms - engine.total_ms, 0.0)
            entry.controller.observe(engine.token_capacity, engine.total_ms, overhead_ms)
        entry.unsettled = False
        self._publish_status(entry, allowance)
        return self._status.misses

    def use_idle_time(self, idle: Callable[[], bool]) -> None:
        """Go on with a calibration, if there is one: by one measurement, and by more while `idle()`."""
        entry = self._sizes[self._newest] if self._newest is not None else None
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
            self._publish_status(entry, self._status.allowance)
            if not idle():
                return

    def _prepare(self, image_size: tuple[int, int], parameters: SegmentationParameters) -> _ImageSize:
        if self._engine.info.device != self._device:  # it fell back, or came back: what was measured is void
            self._device = self._engine.info.device
            self._sizes.clear()
        again = parameters.recalibrate and not self._recalibrated
        self._recalibrated = self._recalibrated and parameters.recalibrate
        entry = self._sizes.get(image_size)
        if entry is None:
            self._engine.warmup(image_size)
            if len(self._sizes) >= _REMEMBERED_SIZES:
                self._sizes.clear()
            entry = self._sizes[image_size] = _ImageSize(self._engine.capacities(image_size))
            kept = None if again else self._cache.load(self._key(entry, image_size, parameters.threads))
            if kept is not None:
                self._use(entry, kept)
                self._logger.info(f"latency of {_text(image_size)} images as measured earlier: {_describe(kept)}")
                self._tell_infeasible(entry, parameters)
        start = again or (entry.table is None and not entry.failure)
        if start and entry.calibration is None:
            entry.calibration, entry.failure = Calibration(self._engine, image_size), ""
            self._logger.info(
                f"calibrating {len(entry.capacities)} token capacities for {_text(image_size)} images between frames, "
                "for a few seconds"
            )
        return entry

    def _finish(self, entry: _ImageSize, calibration: Calibration) -> None:
        latency_ms = calibration.latency_ms()
        self._use(entry, latency_ms)
        entry.calibration = None
        self._recalibrated = self._parameters.recalibrate
        assert self._newest is not None  # a calibration belongs to a frame's size
        self._logger.info(f"latency of {_text(self._newest)} images: {_describe(latency_ms)}")
        self._tell_infeasible(entry, self._parameters)
        try:
            self._cache.store(self._key(entry, self._newest, self._parameters.threads), latency_ms)
        except OSError as error:
            self._logger.warning(f"calibration cannot be kept for the next start: {error}")

    def _use(self, entry: _ImageSize, latency_ms: dict[int, float]) -> None:
        entry.table = LatencyTable(latency_ms)
        entry.controller = BudgetController(entry.table)

    def _tell_infeasible(self, entry: _ImageSize, parameters: SegmentationParameters) -> None:
        try:
            BudgetStatus(table=entry.table).check(
                parameters.latency_budget_ms, parameters.budget_reference, _min_tokens(parameters)
            )
        except ConfigError as error:
            self._logger.error(f"{error}; until then frames are segmented with the fewest tokens allowed")

    def _key(self, entry: _ImageSize, image_size: tuple[int, int], threads: int) -> CalibrationKey:
        return CalibrationKey.of(self._engine.info, threads, image_size, entry.capacities)

    def _publish_status(self, entry: _ImageSize, allowance: Allowance | None) -> None:
        controller = entry.controller
        self._status = BudgetStatus(
            allowance=allowance,
            misses=self._misses.misses,
            table=entry.table,
            slowdown=controller.typical_slowdown if controller is not None else 1.0,
            overhead_ms=controller.typical_overhead_ms if controller is not None else 0.0,
            failure=entry.failure,
            recalibrated=self._recalibrated,
        )


def _budget_of(parameters: SegmentationParameters) -> tuple[float, str, int]:
    return parameters.latency_budget_ms, parameters.budget_reference, _min_tokens(parameters)


def _min_tokens(parameters: SegmentationParameters) -> int:
    """The fewest tokens that the budget must leave; the user's upper bound comes first."""
    return min(parameters.min_tokens, parameters.token_capacity or parameters.min_tokens)


def _text(image_size: tuple[int, int]) -> str:
    return f"{image_size[1]}x{image_size[0]}"


def _describe(latency_ms: dict[int, float]) -> str:
    return ", ".join(f"{tokens} tokens {value:.1f} ms" for tokens, value in sorted(latency_ms.items()))
