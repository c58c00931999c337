"""Runs frames through a pipeline in a thread of its own, and keeps account of what became of each camera's."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from clustvit_ros.errors import ClustvitError, ImageError
from clustvit_ros.node.diagnostics import FrameCounts, LatencyWindow
from clustvit_ros.node.frame_pipeline import DecodedFrame, Frame, FramePipeline, FrameReport
from clustvit_ros.node.frame_worker import FrameWorker, LatestSlot
from clustvit_ros.node.parameters import SegmentationParameters

_LOG_PERIOD_S = 5.0


@dataclass
class Account:
    """What became of one camera's frames in one activation.

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
        pipeline: the pipeline in force; asked once per turn, so that an engine changes between frames.
        parameters: a camera's parameters in force; asked once per frame, so that it sees one consistent set.
        on_report: called in the worker's thread after each segmented frame, late ones included.
        logger: an rclpy logger.
        context_ok: False once ROS is shutting down: publishing then fails, and that is no fault.
        slot: where frames wait; None keeps the newest of one camera.
        cameras: their names; empty for the only camera.
    """

    def __init__(
        self,
        pipeline: Callable[[], FramePipeline],
        parameters: Callable[[str], SegmentationParameters],
        on_report: Callable[[Frame, FrameReport, FrameCounts], None],
        logger: Any,
        context_ok: Callable[[], bool],
        slot: LatestSlot[Frame] | None = None,
        cameras: Iterable[str] = ("",),
    ) -> None:
        self._pipeline = pipeline
        self._parameters = parameters
        self._on_report = on_report
        self._logger = logger
        self._context_ok = context_ok
        self._accounts = {camera: Account() for camera in cameras}
        self.slot: LatestSlot[Frame] = slot if slot is not None else LatestSlot()
        self._worker = FrameWorker(self.slot, self._handle, lambda error: self._on_fault(error))

    @property
    def busy(self) -> bool:
        """The worker's thread is alive, and may be in the engine."""
        return self._worker.running

    def start(self) -> None:
        """Begin to handle frames."""
        self._worker.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Finish the frame at hand and end.

        Returns:
            False when the engine was still busy after `timeout_s` seconds.
        """
        return self._worker.stop(timeout_s)

    def put(self, frame: Frame) -> None:
        """Make `frame` its camera's next one; never blocks."""
        self.slot.put(frame, frame.camera)

    def account(self, camera: str = "") -> Account:
        """What became of a camera's frames so far; the windows are shared, the counts are the caller's own."""
        account = copy.copy(self._accounts[camera])
        account.counts = self._counts(camera)
        return account

    def _counts(self, camera: str) -> FrameCounts:
        counts = copy.copy(self._accounts[camera].counts)
        counts.received, counts.dropped = self.slot.counts_of(camera)
        return counts

    def _handle(self, frame: Frame) -> None:
        pipeline, parameters = self._pipeline(), self._parameters(frame.camera)
        frames = [frame, *(self.slot.take_rest() if pipeline.may_batch(parameters) else [])]
        decoded: list[DecodedFrame] = []
        for one in frames:
            try:
                decoded.append(pipeline.decode(one, self._parameters(one.camera) if one is not frame else parameters))
            except Exception as error:  # one camera's bad frame is no reason to lose another's
                self._on_fault(error, one.camera)
        for batch in pipeline.batches_of(decoded):
            try:
                reports = pipeline.segment(batch)
            except Exception as error:
                for member in batch:
                    self._on_fault(error, member.frame.camera)
                continue
            for member, report in zip(batch, reports, strict=True):
                self._enter(member.frame, report)
        pipeline.use_idle_time(lambda: self.slot.idle)

    def _enter(self, frame: Frame, report: FrameReport) -> None:
        account = self._accounts[frame.camera]
        account.counts.segmented += report.published
        account.counts.late += not report.published
        account.unstamped = not report.stamped
        account.arrival_age_ms = report.arrival_age_ms
        account.age.samples.append(report.age_ms)
        account.engine.samples.append(report.engine.total_ms)
        self.slot.served(frame.camera, report.age_ms - report.arrival_age_ms)
        self._on_report(frame, report, self._counts(frame.camera))

    def _on_fault(self, error: Exception, camera: str | None = None) -> None:
        if not self._context_ok():
            return
        account = self._accounts[next(iter(self._accounts)) if camera is None else camera]
        name = f"{camera}: " if camera else ""
        if isinstance(error, ImageError):
            account.counts.rejected += 1
            account.last_rejection = str(error)
            self._logger.error(
                f"{name}image not segmented ({account.counts.rejected} so far): {error}",
                throttle_duration_sec=_LOG_PERIOD_S,
            )
            return
        account.counts.failed += 1
        account.last_failure = str(error) or type(error).__name__
        # An error of our own says all there is to say; any other needs its origin to be found.
        detail = str(error) if isinstance(error, ClustvitError) else "".join(traceback.format_exception(error)).rstrip()
        self._logger.error(
            f"{name}engine failed ({account.counts.failed} frames so far): {detail}",
            throttle_duration_sec=_LOG_PERIOD_S,
        )
