"""Runs frames through a pipeline in a thread of its own, and keeps account of what became of each."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clustvit_ros.errors import ClustvitError, ImageError
from clustvit_ros.ros.diagnostics import FrameCounts, LatencyWindow
from clustvit_ros.ros.frame_pipeline import Frame, FramePipeline, FrameReport
from clustvit_ros.ros.frame_worker import FrameWorker, LatestSlot
from clustvit_ros.ros.parameters import SegmentationParameters

_LOG_PERIOD_S = 5.0


@dataclass
class Account:
    """What became of the frames of one activation.

    Args:
        counts: frames by fate; `received` and `dropped` are filled in by `FrameRunner.account`.
        age: milliseconds from stamp to publication.
        engine: milliseconds in the engine.
        last_rejection: why the last rejected message was.
        last_failure: what the engine last raised.
        unstamped: the newest frame had no stamp.
        arrival_age_ms: the newest frame's, from its stamp to its arrival; negative when it came from the future.
    """

    counts: FrameCounts = field(default_factory=FrameCounts)
    age: LatencyWindow = field(default_factory=LatencyWindow)
    engine: LatencyWindow = field(default_factory=LatencyWindow)
    last_rejection: str = ""
    last_failure: str = ""
    unstamped: bool = False
    arrival_age_ms: float = 0.0


class FrameRunner:
    """Newest frame wins; a frame that cannot be segmented is counted and logged, never fatal.

    Args:
        pipeline: handles one frame.
        parameters: the parameters in force; asked once per frame, so that a frame sees one consistent set.
        on_report: called in the worker's thread after each segmented frame, late ones included.
        logger: an rclpy logger.
        context_ok: False once ROS is shutting down: publishing then fails, and that is no fault.
        slot: where frames wait; None keeps the newest only.
    """

    def __init__(
        self,
        pipeline: FramePipeline,
        parameters: Callable[[], SegmentationParameters],
        on_report: Callable[[Frame, FrameReport, FrameCounts], None],
        logger: Any,
        context_ok: Callable[[], bool],
        slot: LatestSlot[Frame] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._parameters = parameters
        self._on_report = on_report
        self._logger = logger
        self._context_ok = context_ok
        self._account = Account()
        self._slot: LatestSlot[Frame] = slot if slot is not None else LatestSlot()
        self._worker = FrameWorker(self._slot, self._handle, self._on_fault)

    @property
    def busy(self) -> bool:
        """True while the thread lives: the engine may be in use."""
        return self._worker.running

    def start(self) -> None:
        """Begin to handle frames."""
        self._worker.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Finish the frame at hand and end the thread; False when it is still busy after `timeout_s` seconds."""
        return self._worker.stop(timeout_s)

    def put(self, frame: Frame) -> None:
        """Make `frame` the next one; never blocks."""
        self._slot.put(frame)

    def account(self) -> Account:
        """What became of the frames so far; the windows are shared, the counts are the caller's own."""
        account = copy.copy(self._account)
        account.counts = self._counts()
        return account

    def _counts(self) -> FrameCounts:
        counts = copy.copy(self._account.counts)
        counts.received, counts.dropped = self._slot.received, self._slot.dropped
        return counts

    def _handle(self, frame: Frame) -> None:
        report = self._pipeline.process(frame, self._parameters())
        account = self._account
        account.counts.segmented += report.published
        account.counts.late += not report.published
        account.unstamped = not report.stamped
        account.arrival_age_ms = report.arrival_age_ms
        account.age.samples.append(report.age_ms)
        account.engine.samples.append(report.engine.total_ms)
        self._on_report(frame, report, self._counts())
        self._pipeline.use_idle_time(lambda: self._slot.idle)

    def _on_fault(self, error: Exception) -> None:
        if not self._context_ok():
            return
        account = self._account
        if isinstance(error, ImageError):
            account.counts.rejected += 1
            account.last_rejection = str(error)
            self._logger.error(
                f"image not segmented ({account.counts.rejected} so far): {error}", throttle_duration_sec=_LOG_PERIOD_S
            )
            return
        account.counts.failed += 1
        account.last_failure = str(error) or type(error).__name__
        # An error of our own says all there is to say; any other needs its origin to be found.
        detail = str(error) if isinstance(error, ClustvitError) else "".join(traceback.format_exception(error)).rstrip()
        self._logger.error(
            f"engine failed ({account.counts.failed} frames so far): {detail}", throttle_duration_sec=_LOG_PERIOD_S
        )
