"""Deterministic replay (`processing: every_frame`): no frame is dropped, nothing adapts, so masks repeat bit for bit.

Live, the newest frame wins and latency decides how much is merged; both depend on the clock. Here frames wait in order,
and a mask depends on its image, the model and the parameters alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy

from clustvit_ros.engine import Engine, Stats
from clustvit_ros.errors import ConfigError
from clustvit_ros.node.frame_worker import LatestSlot
from clustvit_ros.node.parameters import SegmentationParameters
from clustvit_ros.policy import Allowance, BudgetStatus, Misses

T = TypeVar("T")

REPLAY_OUTPUT_DEPTH = 200
"""A consumer may fall behind by so many masks."""


def replay_qos() -> QoSProfile:
    """Input that loses nothing: the publisher must be reliable as well."""
    return QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE)


class FrameQueue(LatestSlot[T]):
    """First in, first out.

    Args:
        limit_bytes: no more than this is held; what comes when it is full is dropped and counted.
        bytes_of: the size of an item.
    """

    def __init__(self, limit_bytes: int, bytes_of: Callable[[T], int]) -> None:
        super().__init__()
        self._limit_bytes, self._bytes_of = limit_bytes, bytes_of
        self._queue: deque[tuple[str, T]] = deque()
        self._held_bytes = 0

    @property
    def idle(self) -> bool:
        """True while nothing waits to be taken and more may come."""
        return not self._queue and not self._closed

    def put(self, item: T, camera: str = "") -> None:
        """Append `item`; never blocks."""
        size = self._bytes_of(item)
        with self._condition:
            self._received[camera] += 1
            # A single frame above the limit is still a frame to be segmented.
            if self._closed or (self._queue and self._held_bytes + size > self._limit_bytes):
                self._dropped[camera] += 1
                return
            self._queue.append((camera, item))
            self._held_bytes += size
            self._condition.notify()

    def take(self, timeout_s: float | None = None) -> T | None:
        """Remove and return the oldest item, whichever camera it is from.

        Args:
            timeout_s: seconds to wait for one; None waits for ever.

        Returns:
            The item, or None on timeout and once the queue is closed.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._closed or bool(self._queue), timeout_s)
            if not self._queue:
                return None
            _, item = self._queue.popleft()
            self._held_bytes -= self._bytes_of(item)
            return item

    def _clear(self) -> None:
        self._dropped.update(camera for camera, _ in self._queue)
        self._queue.clear()
        self._held_bytes = 0


class FixedLatency:
    """Takes the place of a `LatencyControl`: measures nothing, and grants what the parameters say.

    Args:
        engine: used by the thread that calls.
    """

    status = BudgetStatus(recalibrated=True)
    """There is no budget to report about."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._warm_size: tuple[int, int] | None = None

    def check(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        """Refuse a latency budget.

        Raises:
            ConfigError: one is set.
        """
        if new.latency_budget_ms != old.latency_budget_ms and new.latency_budget_ms:
            raise ConfigError(
                f"latency_budget_ms: got {new.latency_budget_ms:g}, expected 0 while processing is every_frame, where "
                "nothing may adapt; set token_capacity, or use processing live"
            )

    def allow(self, image_size: tuple[int, int], parameters: SegmentationParameters) -> Allowance:
        """The same for every frame under the same parameters; warms the engine for a size that is new."""
        if image_size != self._warm_size:
            self._engine.warmup(image_size)
            self._warm_size = image_size
        return Allowance(
            budget_ms=0.0,
            reference=parameters.budget_reference,
            policy="publish_late",
            min_tokens=parameters.min_tokens,
            token_ceiling=parameters.token_capacity,
            state="off",
            decision=None,
        )

    def observe(self, allowance: Allowance, engine: Stats, age_ms: float, missed: bool, learn: bool = True) -> Misses:
        """Nothing is learnt."""
        return Misses()

    def use_idle_time(self, idle: Callable[[], bool]) -> None:
        """Nothing is to be done between frames."""
