"""The segmentation node: a thin, managed shell that feeds the newest camera images to an engine and publishes masks.

One executor thread serves parameters, lifecycle and diagnostics and only stores the newest images; one worker thread
decodes, segments and publishes. Neither waits for the other.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from std_msgs.msg import Header

from clustvit_ros.engine import Engine, ScriptedEngine, create_engine
from clustvit_ros.engine.bound_engine import BoundEngine
from clustvit_ros.engine.class_groups import group_classes, parse_groups
from clustvit_ros.engine.resilient_engine import ResilientEngine
from clustvit_ros.engine.scripted_engine import proportional
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.node import label_info
from clustvit_ros.node.camera_stream import CameraStream
from clustvit_ros.node.diagnostics import OK, FrameCounts, diagnostic_array, frame_pairs
from clustvit_ros.node.engine_host import EngineHost, LoadedEngine
from clustvit_ros.node.frame_pipeline import Frame, FrameReport
from clustvit_ros.node.frame_runner import FrameRunner
from clustvit_ros.node.frame_worker import LatestSlot
from clustvit_ros.node.merge_guard import check_exemptions
from clustvit_ros.node.node_report import camera_status
from clustvit_ros.node.parameter_server import ParameterServer
from clustvit_ros.node.parameters import CameraParameters, SegmentationParameters
from clustvit_ros.node.process import run_node
from clustvit_ros.node.qos import QosWatch
from clustvit_ros.node.replay import FrameQueue
from clustvit_ros.policy import BudgetStatus, FairScheduler

_REPORT_PERIOD_S = 1.0


def load_engine(parameters: SegmentationParameters) -> Engine:
    """Make the engine that the parameters name.

    Raises:
        ClustvitError: the model cannot be loaded, or the device does not work.
    """
    if parameters.engine == "scripted":
        return ScriptedEngine(latency_ms=proportional(parameters.scripted_latency_ms))

    def precision_on(device: str) -> str:
        # A CPU that takes over from a GPU is slow enough without emulating half precision.
        return "float32" if device == "cpu" != parameters.device else parameters.precision

    live = parameters.processing == "live"
    return ResilientEngine(
        lambda device: BoundEngine(
            lambda: create_engine(
                parameters.model, parameters.engine, device, parameters.threads, precision_on(device), share_cores=live
            )
        ),
        parameters.device,
        adapt=live,
    )


class SegmentationNode(LifecycleNode):
    """Segments the newest image of each camera, again and again.

    Args:
        engine_factory: makes the engine when the node is configured, and when `model` changes.
        arguments: of rclpy's Node.

    Raises:
        ConfigError: a start value that its parameter does not accept.
    """

    def __init__(
        self, engine_factory: Callable[[SegmentationParameters], Engine] = load_engine, **arguments: Any
    ) -> None:
        super().__init__("segmentation", **arguments)
        # rclpy raises on a transition that the state does not have, which would end the process.
        self._answer_change_state = self._service_change_state.callback
        self._service_change_state.callback = self._on_change_state
        self._state = "unconfigured"
        self._fault = ""
        self._engine_fault = ""
        self._reported_s = 0.0
        self._successor: LoadedEngine | None = None
        self._runner: FrameRunner | None = None
        self._streams: dict[str, CameraStream] = {}
        self._qos = QosWatch(self)
        self._host = EngineHost(engine_factory, self.get_logger(), lambda: self.get_clock().now().nanoseconds)
        self._server = ParameterServer(
            self, SegmentationParameters, self._why_locked, self._check_change, self._adopt_change
        )
        parse_groups(self.parameters.class_groups)
        check_exemptions(self.parameters, None)
        self.cameras = self.parameters.camera_names
        """The cameras' names; the only camera has none."""
        for camera in filter(None, self.cameras):
            self._server.add(f"{camera}.", CameraParameters)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Steady, so that diagnostics keep their pace while simulated time stands still.
        self._timer = self.create_timer(_REPORT_PERIOD_S, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME))
        if not label_info.AVAILABLE:
            self.get_logger().warning(label_info.UNAVAILABLE)

    @property
    def parameters(self) -> SegmentationParameters:
        """The parameters in force."""
        return self._server.current

    def parameters_of(self, camera: str) -> SegmentationParameters:
        """The parameters in force for one camera."""
        tables = self._server.tables
        return tables[f"{camera}."].over(tables[""]) if camera else tables[""]

    def autostart(self) -> bool:
        """Configure and activate.

        Returns:
            False when either failed; the log says why.
        """
        success = TransitionCallbackReturn.SUCCESS
        return self.trigger_configure() == success and self.trigger_activate() == success

    def close(self) -> int:
        """Stop working in whatever state the node is, and free the engine unless a frame still holds it.

        Returns:
            0: every way to end is a good one.
        """
        if self._runner is None or self._runner.stop():
            self._host.free()
        return 0

    def _on_change_state(self, request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
        try:
            return self._answer_change_state(request, response)
        except Exception as error:  # rcl's own type is private to rclpy
            if not self.context.ok():
                raise
            self.get_logger().error(f"transition {request.transition.id} refused while {self._state}: {error}")
            response.success = False
            return response

    # Lifecycle transitions. rclpy swallows what they raise, so each one reports its own failure.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Create the publishers, load and warm the engine."""
        return self._transition("configuring", "inactive", self._configure, partial(super().on_configure, state))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe to the cameras and begin to publish."""
        return self._transition("activating", "active", partial(self._activate, state))

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe and finish the frame at hand."""
        return self._transition("deactivating", "inactive", self._deactivate, partial(super().on_deactivate, state))

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the engine and the publishers."""
        return self._transition("cleaning up", "unconfigured", self._clean_up, partial(super().on_cleanup, state))

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free everything, from any state."""
        return self._transition("shutting down", "finalized", self._shut_down, partial(super().on_shutdown, state))

    def _transition(self, what: str, reached: str, *steps: Callable[[], Any]) -> TransitionCallbackReturn:
        try:
            for step in steps:
                step()
        except ClustvitError as error:
            self._fault = f"{what} failed: {error}"
            self.get_logger().error(self._fault)
            return TransitionCallbackReturn.FAILURE
        except Exception as error:  # a managed node must answer its manager, whatever happened
            self._fault = f"{what} failed: {error}"
            if self.context.ok():  # else a signal came in the middle, and every call to ROS fails
                self.get_logger().error(f"{what} failed: {traceback.format_exc().rstrip()}")
            return TransitionCallbackReturn.FAILURE
        self._state, self._fault = reached, ""
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        parameters = self.parameters
        try:
            for camera in self.cameras:
                self._streams[camera] = CameraStream(self, camera, self._qos, parameters.processing == "every_frame")
            self._host.use(self._host.load(parameters, {name: s.outputs for name, s in self._streams.items()}))
        except BaseException:
            self._destroy_streams()
            raise

    def _activate(self, state: LifecycleState) -> None:
        if self._runner is not None and self._runner.busy:
            raise ClustvitError("the engine is still busy with the last frame; try again in a moment")
        self._runner = FrameRunner(
            self._host.pipeline, self.parameters_of, self._on_frame_report, self.get_logger(), self.context.ok,
            self._make_slot(), self.cameras,
        )  # fmt: skip
        # Before the first frame: publishers drop what comes while they are inactive.
        super().on_activate(state)
        self._publish_labels()
        self._runner.start()
        for stream in self._streams.values():
            topic = stream.subscribe(self.parameters, self._runner.put)
            self.get_logger().info(f"active: {topic} -> {stream.mask_topic}")

    def _deactivate(self) -> None:
        for stream in self._streams.values():
            stream.unsubscribe()
        if self._runner is not None and not self._runner.stop():
            self.get_logger().warning("the engine is still busy with the last frame; its mask will not be published")

    def _clean_up(self) -> None:
        if self._runner is not None and self._runner.busy:
            raise ClustvitError("the engine is still busy with the last frame; try again in a moment")
        self._runner = None
        self._destroy_streams()
        self._host.free()

    def _shut_down(self) -> None:
        self._deactivate()
        if self._runner is None or not self._runner.busy:
            self._clean_up()  # else a hanging engine keeps its memory until the process ends

    def _destroy_streams(self) -> None:
        for stream in self._streams.values():
            stream.destroy()
        self._streams.clear()

    def _make_slot(self) -> LatestSlot[Frame]:
        parameters, tables = self.parameters, self._server.tables
        if parameters.processing == "every_frame":
            return FrameQueue(parameters.queue_limit_mb * 1_000_000, lambda frame: len(frame.message.data))
        return LatestSlot(FairScheduler({c: tables[f"{c}."].weight if c else 1.0 for c in self.cameras}))

    # Parameters.

    def _why_locked(self) -> str | None:
        if self._state in ("unconfigured", "finalized"):
            return None
        return (
            f"cannot change while the node is {self._state}; deactivate and clean up first "
            f"(`ros2 lifecycle set {self.get_fully_qualified_name()} ...`), or restart with the new value"
        )

    def _check_change(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        parse_groups(new.class_groups)
        check_exemptions(new, None)
        loaded = self._host.current
        if loaded is None:
            return
        loaded.latency.check(old, new)
        if new.model != old.model:
            if new.engine == "scripted":
                raise ConfigError(
                    f"model: {new.model!r} cannot be used, engine scripted runs no model; restart with engine torch"
                )
            self._successor = self._host.load_beside(
                new, {name: stream.outputs for name, stream in self._streams.items()}, self._while_loading
            )
        else:
            group_classes(loaded.engine.info.classes, new.class_groups)
            check_exemptions(new, loaded.engine.info.classes.names)

    def _adopt_change(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        if self._successor is not None:
            self._host.use(self._successor)
            self._successor = None
            self.get_logger().info(f"model {new.model} takes over from {old.model}")
        idle = self._runner is None or not self._runner.busy
        if idle:
            self._host.free_retired()
        elif self._runner is not None:
            for camera in filter(None, self.cameras):
                self._runner.slot.set_weight(camera, self._server.tables[f"{camera}."].weight)
            # Else the worker tells, before its next mask.
            if self._runner.slot.idle:
                self._publish_labels()

    def _while_loading(self) -> bool:
        for stream in self._streams.values():
            stream.take_messages()
        if time.monotonic() - self._reported_s > _REPORT_PERIOD_S:
            self._report()
        return self.context.ok()

    # Frames.

    def _on_frame_report(self, frame: Frame, report: FrameReport, counts: FrameCounts) -> None:
        stream = self._streams[frame.camera]
        if not stream.first_mask_told:
            stream.first_mask_told = True
            engine = report.engine
            self.get_logger().info(
                f"{frame.camera + ': ' if frame.camera else ''}first mask: "
                f"{report.mask_size[1]}x{report.mask_size[0]}, "
                f"{report.age_ms:.1f} ms after the image's stamp; engine {engine.total_ms:.1f} ms, "
                f"{engine.tokens_kept:g} of {engine.tokens_total} tokens"
            )
        loaded = self._host.current
        if loaded is not None and stream.outputs.wanted("stats"):
            device, name = loaded.engine.info.device, f"{self.get_name()}: frame"
            pairs = {"camera": frame.camera} if frame.camera else {}
            pairs.update(frame_pairs(report, counts))
            pairs.update(loaded.pipeline.guard.pairs)
            header = frame.message.header
            stream.outputs.publish_stats(diagnostic_array(header, name, device, OK, "segmented", pairs))

    def _publish_labels(self) -> None:
        loaded = self._host.current
        if loaded is not None:
            classes = group_classes(loaded.engine.info.classes, self.parameters.class_groups).classes
            header = Header(stamp=self.get_clock().now().to_msg())
            for stream in self._streams.values():
                stream.outputs.publish_labels(classes, self.parameters.confidence_threshold, header)

    # Diagnostics, once a second.

    def _report(self) -> None:
        self._reported_s = time.monotonic()
        self._qos.check()
        loaded = self._host.current
        budget = loaded.latency.status if loaded is not None else BudgetStatus()
        accuracy = loaded.pipeline.guard.pairs if loaded is not None else {}
        if budget.recalibrated and self.parameters.recalibrate:
            self.set_parameters([Parameter("recalibrate", value=False)])
        self._tell_engine_fault(loaded)
        array = DiagnosticArray(header=Header(stamp=self.get_clock().now().to_msg()))
        for camera in self.cameras:
            stream = self._streams.get(camera)
            if stream is not None and stream.watch is not None:
                stream.watch.check(self.parameters.input_timeout_s)
            account = self._runner.account(camera) if self._runner is not None else None
            array.status.append(
                camera_status(
                    name=f"{self.get_fully_qualified_name().lstrip('/')}: segmentation{' ' + camera if camera else ''}",
                    state=self._state, fault=self._fault, engine=loaded.engine if loaded is not None else None,
                    engine_fault=self._engine_fault, budget=budget, accuracy=accuracy, parameters=self.parameters,
                    stream=stream, account=account,
                )
            )  # fmt: skip
        self._diagnostics.publish(array)

    def _tell_engine_fault(self, loaded: LoadedEngine | None) -> None:
        fault = loaded.engine.fault if loaded is not None else ""
        if bool(fault) != bool(self._engine_fault):
            if fault:
                self.get_logger().error(fault)
            else:
                self.get_logger().info("the engine runs as configured again")
        self._engine_fault = fault


def main(arguments: list[str] | None = None) -> int:
    """Run the node until it is told to end.

    Returns:
        0 after SIGINT or SIGTERM; 1 when the node could not start.
    """
    return run_node("segmentation", SegmentationNode, spin, arguments)


def spin(node: SegmentationNode, executor: SingleThreadedExecutor) -> int:
    """Start the node where it is to start by itself, and serve it until ROS shuts down.

    Returns:
        1 when it could not start.
    """
    if node.parameters.autostart and not node.autostart():
        return 1
    executor.spin()
    return 0


if __name__ == "__main__":
    sys.exit(main())
