"""Holds the engine in use, and changes it for another between two frames."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from clustvit_ros.engine import Engine
from clustvit_ros.engine.batching import measure_batching
from clustvit_ros.engine.class_groups import group_classes
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.node.camera_outputs import CameraOutputs
from clustvit_ros.node.frame_pipeline import FramePipeline
from clustvit_ros.node.latency_control import LatencyControl
from clustvit_ros.node.merge_guard import check_exemptions
from clustvit_ros.node.parameters import SegmentationParameters
from clustvit_ros.node.replay import FixedLatency

_POLL_S = 0.002


@dataclass(frozen=True)
class LoadedEngine:
    """A warm engine and what belongs to it.

    Args:
        engine: used by the worker's thread.
        latency: its calibration and budget.
        pipeline: segments frames with it.
    """

    engine: Engine
    latency: LatencyControl | FixedLatency
    pipeline: FramePipeline


class EngineHost:
    """The engine of a node.

    Args:
        factory: makes the engine that parameters ask for.
        logger: an rclpy logger.
        now_ns: node clock, nanoseconds.
    """

    def __init__(
        self, factory: Callable[[SegmentationParameters], Engine], logger: Any, now_ns: Callable[[], int]
    ) -> None:
        self._factory = factory
        self._logger = logger
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._current: LoadedEngine | None = None
        self._retired: list[Engine] = []

    @property
    def current(self) -> LoadedEngine | None:
        """What new frames are segmented with; None when nothing is loaded."""
        return self._current

    def load(self, parameters: SegmentationParameters, outputs: Mapping[str, CameraOutputs]) -> LoadedEngine:
        """Load an engine, warm it, and find out what batching brings; takes seconds. `use` puts it in force.

        Args:
            parameters: name it.
            outputs: camera -> where its masks go.

        Raises:
            ClustvitError: it cannot be loaded, or has not the classes that parameters name.
        """
        scripted = parameters.engine == "scripted"
        model = "" if scripted else f" with model {parameters.model}, device {parameters.device}"
        self._logger.info(f"loading engine {parameters.engine}{model}")
        start_s = time.monotonic()
        engine = self._factory(parameters)
        try:
            info = engine.info
            grouping = group_classes(info.classes, parameters.class_groups)
            check_exemptions(parameters, info.classes.names)
            self._logger.info(f"warming {info.model} up on {info.device}")
            engine.warmup()
            lossless = parameters.processing == "every_frame"
            gain = None
            if len(outputs) > 1 and not lossless:
                gain = measure_batching(engine, len(outputs))
                self._logger.info(str(gain))
            latency = FixedLatency(engine) if lossless else LatencyControl(engine, self._logger)
            pipeline = FramePipeline(engine, outputs, self._now_ns, latency, gain)
        except BaseException:
            engine.close()
            raise
        if lossless and parameters.latency_budget_ms:
            self._logger.warning("latency_budget_ms has no effect while processing is every_frame")
        if grouping.table is not None:
            self._logger.info(f"{len(info.classes)} classes become {', '.join(grouping.classes.names)}")
        if grouping.ungrouped:
            self._logger.warning(
                f"class_groups: {', '.join(grouping.ungrouped)} are in no group; their pixels become 255 (unlabelled)"
            )
        info = engine.info
        reason = f" ({info.device_reason})" if info.device_reason else ""
        self._logger.info(
            f"{info.model} runs on {info.device}{reason}: engine {info.engine}, {info.precision}, "
            f"{len(info.classes)} classes, {info.tokens_total} tokens at {info.input_size[1]}x{info.input_size[0]}; "
            f"loaded and warm in {time.monotonic() - start_s:.1f} s"
        )
        return LoadedEngine(engine, latency, pipeline)

    def load_beside(
        self,
        parameters: SegmentationParameters,
        outputs: Mapping[str, CameraOutputs],
        meanwhile: Callable[[], bool],
    ) -> LoadedEngine:
        """Load an engine in a thread while the one in use goes on.

        Args:
            parameters: as for `load`.
            outputs: as for `load`.
            meanwhile: called every few milliseconds; False gives up.

        Raises:
            ConfigError: it cannot be used, and why.
        """
        future: Future[LoadedEngine] = Future()

        def work() -> None:
            try:
                future.set_result(self.load(parameters, outputs))
            except BaseException as error:  # whatever it is, it belongs to the caller
                future.set_exception(error)

        # A daemon: a load that hangs must not keep a process alive that was told to end.
        threading.Thread(target=work, name="engine-loader", daemon=True).start()
        while not future.done():
            if not meanwhile():
                future.add_done_callback(_close_unused)
                raise ConfigError(f"model: {parameters.model!r} is not loaded, since the node is shutting down")
            time.sleep(_POLL_S)
        try:
            return future.result()
        except Exception as error:
            detail = str(error) if isinstance(error, ClustvitError) else f"{type(error).__name__}: {error}"
            in_use = self._current.engine.info.model if self._current is not None else "none"
            message = f"model: {parameters.model!r} cannot be used ({detail}); {in_use} stays in use"
            self._logger.error(message)
            raise ConfigError(message) from error

    def use(self, loaded: LoadedEngine) -> None:
        """Segment the next frame with `loaded`; the engine before it is freed when no frame needs it any more."""
        with self._lock:
            if self._current is not None:
                self._retired.append(self._current.engine)
            self._current = loaded

    def pipeline(self) -> FramePipeline:
        """For the worker's thread between two frames: what to segment the next one with."""
        self.free_retired()
        current = self._current
        assert current is not None  # a worker runs only while an engine is loaded
        return current.pipeline

    def free_retired(self) -> None:
        """Free engines that were replaced; while no frame is being segmented."""
        with self._lock:
            retired, self._retired = self._retired, []
        for engine in retired:
            engine.close()

    def free(self) -> None:
        """Free everything; while no frame is being segmented."""
        self.free_retired()
        with self._lock:
            current, self._current = self._current, None
        if current is not None:
            current.engine.close()


def _close_unused(future: Future[LoadedEngine]) -> None:
    if future.exception() is None:
        future.result().engine.close()
