"""The segmentation node: a thin, managed shell that feeds the newest camera image to an engine and publishes masks.

One executor thread serves parameters, lifecycle and diagnostics and only stores the newest image; one worker thread
decodes, segments and publishes. Neither waits for the other.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from clustvit_ros.control import BudgetStatus
from clustvit_ros.errors import ClustvitError
from clustvit_ros.ros.diagnostics import OK, FrameCounts, Health, diagnostic_array, engine_pairs, frame_pairs, judge
from clustvit_ros.ros.frame_pipeline import OUTPUT_QOS, Frame, FramePipeline, FrameReport, MaskPublishers
from clustvit_ros.ros.frame_runner import Account, FrameRunner
from clustvit_ros.ros.input_watch import InputWatch, subscription_events
from clustvit_ros.ros.latency_control import LatencyControl
from clustvit_ros.ros.parameter_server import ParameterServer
from clustvit_ros.ros.parameters import SegmentationParameters
from clustvit_ros.ros.process import run_node
from clustvit_ros.runtime import Engine, ScriptedEngine, create_engine
from clustvit_ros.runtime.bound_engine import BoundEngine
from clustvit_ros.runtime.machine import throttling
from clustvit_ros.runtime.scripted_engine import proportional

INPUT_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
"""As sensor data, but keep the newest only: it is the one that will be segmented."""

_REPORT_PERIOD_S = 1.0


def load_engine(parameters: SegmentationParameters) -> Engine:
    """Make the engine that the parameters name.

    Raises:
        ClustvitError: the model cannot be loaded, or the device does not work.
    """
    if parameters.engine == "scripted":
        return ScriptedEngine(latency_ms=proportional(parameters.scripted_latency_ms))
    return BoundEngine(
        lambda: create_engine(
            parameters.model, parameters.engine, parameters.device, parameters.threads, parameters.precision
        )
    )


class SegmentationNode(LifecycleNode):
    """Segments the newest camera image, again and again.

    Args:
        engine_factory: makes the engine when the node is configured.
        arguments: of rclpy's Node.

    Raises:
        ConfigError: a start value that its parameter does not accept.
    """

    def __init__(
        self, engine_factory: Callable[[SegmentationParameters], Engine] = load_engine, **arguments: Any
    ) -> None:
        super().__init__("segmentation", **arguments)
        self._engine_factory = engine_factory
        self._engine: Engine | None = None
        self._latency: LatencyControl | None = None
        self._runner: FrameRunner | None = None
        self._watch: InputWatch | None = None
        self._subscription: Any = None
        self._stats: Any = None
        self._masks: MaskPublishers | None = None
        self._state = "unconfigured"
        self._fault = ""
        self._first_mask_told = True
        self._reported = FrameCounts()
        self._server = ParameterServer(self, SegmentationParameters, self._why_locked, self._check)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Steady, so that diagnostics keep their pace while simulated time stands still.
        self._timer = self.create_timer(_REPORT_PERIOD_S, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME))

    @property
    def parameters(self) -> SegmentationParameters:
        """The parameters in force."""
        return self._server.current

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
            self._free_engine()
        return 0

    # Lifecycle transitions. rclpy swallows what they raise, so each one reports its own failure.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm the engine, create the publishers."""
        return self._transition("configuring", self._configure, super().on_configure, state, "inactive")

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe to the camera and begin to publish."""
        return self._transition("activating", self._activate, super().on_activate, state, "active")

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe and finish the frame at hand."""
        return self._transition("deactivating", self._deactivate, super().on_deactivate, state, "inactive")

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the engine and the publishers."""
        return self._transition("cleaning up", self._clean_up, super().on_cleanup, state, "unconfigured")

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free everything, from any state."""
        return self._transition("shutting down", self._shut_down, super().on_shutdown, state, "finalized")

    def _transition(
        self,
        what: str,
        work: Callable[[], None],
        publishers: Callable[[LifecycleState], TransitionCallbackReturn],
        state: LifecycleState,
        reached: str,
    ) -> TransitionCallbackReturn:
        try:
            work()
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
        return publishers(state)

    def _configure(self) -> None:
        parameters = self.parameters
        model = "" if parameters.engine == "scripted" else f" with model {parameters.model}, device {parameters.device}"
        self.get_logger().info(f"loading engine {parameters.engine}{model}")
        start_s = time.monotonic()
        engine = self._engine_factory(parameters)
        try:
            engine.warmup()
            self._masks = MaskPublishers(self.create_lifecycle_publisher)
            self._stats = self.create_lifecycle_publisher(
                DiagnosticArray, "segmentation/stats", OUTPUT_QOS,
                qos_overriding_options=QoSOverridingOptions.with_default_policies(),
            )  # fmt: skip
        except BaseException:
            engine.close()
            self._destroy_publishers()
            raise
        self._engine = engine
        self._latency = LatencyControl(engine, self.get_logger())
        info = engine.info
        reason = f" ({info.device_reason})" if info.device_reason else ""
        self.get_logger().info(
            f"{info.model} runs on {info.device}{reason}: engine {info.engine}, {info.precision}, "
            f"{len(info.classes)} classes, {info.tokens_total} tokens at {info.input_size[1]}x{info.input_size[0]}; "
            f"loaded and warm in {time.monotonic() - start_s:.1f} s"
        )

    def _activate(self) -> None:
        if self._runner is not None and self._runner.busy:
            raise ClustvitError("the engine is still busy with the last frame; try again in a moment")
        # The state machine activates after configuring.
        assert self._engine is not None and self._masks is not None and self._latency is not None
        pipeline = FramePipeline(self._engine, self._masks, lambda: self.get_clock().now().nanoseconds, self._latency)
        self._runner = FrameRunner(
            pipeline, lambda: self.parameters, self._on_frame_report, self.get_logger(), self.context.ok
        )
        self._reported = FrameCounts()
        self._first_mask_told = False
        compressed = self.parameters.image_transport == "compressed"
        kind = CompressedImage if compressed else Image
        topic = self.resolve_topic_name("image") + ("/compressed" if compressed else "")
        self._watch = InputWatch(self, topic, f"sensor_msgs/msg/{kind.__name__}")
        self._runner.start()
        self._subscription = self.create_subscription(
            kind, topic, self._on_image, INPUT_QOS,
            event_callbacks=subscription_events(self._watch),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )  # fmt: skip
        mask_topic = self.resolve_topic_name("segmentation/mask")
        self.get_logger().info(f"active: {self._subscription.topic_name} -> {mask_topic}")

    def _deactivate(self) -> None:
        if self._subscription is not None:
            self.destroy_subscription(self._subscription)
            self._subscription = None
        self._watch = None
        if self._runner is not None and not self._runner.stop():
            self.get_logger().warning("the engine is still busy with the last frame; its mask will not be published")

    def _clean_up(self) -> None:
        if self._runner is not None and self._runner.busy:
            raise ClustvitError("the engine is still busy with the last frame; try again in a moment")
        self._runner = None
        self._destroy_publishers()
        self._free_engine()

    def _shut_down(self) -> None:
        self._deactivate()
        if self._runner is None or not self._runner.busy:
            self._clean_up()  # else a hanging engine keeps its memory until the process ends

    def _destroy_publishers(self) -> None:
        for publisher in [*(self._masks.all() if self._masks else []), *([self._stats] if self._stats else [])]:
            self.destroy_lifecycle_publisher(publisher)
        self._masks = self._stats = None

    def _free_engine(self) -> None:
        self._latency = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _why_locked(self) -> str | None:
        if self._state in ("unconfigured", "finalized"):
            return None
        return (
            f"cannot change while the node is {self._state}; deactivate and clean up first "
            f"(`ros2 lifecycle set {self.get_fully_qualified_name()} ...`), or restart with the new value"
        )

    def _check(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        if self._latency is not None:
            self._latency.check(old, new)

    # Frames.

    def _on_image(self, message: Image | CompressedImage) -> None:
        if self._watch is not None and self._runner is not None:
            self._watch.saw_image()
            self._runner.put(Frame(message, self.get_clock().now().nanoseconds))

    def _on_frame_report(self, frame: Frame, report: FrameReport, counts: FrameCounts) -> None:
        if not self._first_mask_told:
            self._first_mask_told = True
            engine = report.engine
            self.get_logger().info(
                f"first mask: {report.mask_size[1]}x{report.mask_size[0]}, {report.age_ms:.1f} ms after the image's "
                f"stamp; engine {engine.total_ms:.1f} ms, {engine.tokens_kept:g} of {engine.tokens_total} tokens"
            )
        stats, engine_ = self._stats, self._engine
        if stats is not None and engine_ is not None and stats.get_subscription_count():
            stats.publish(
                diagnostic_array(
                    frame.message.header, f"{self.get_name()}: frame", engine_.info.device, OK, "segmented",
                    frame_pairs(report, counts),
                )
            )  # fmt: skip

    # Diagnostics, once a second.

    def _report(self) -> None:
        if self._watch is not None:
            self._watch.check(self.parameters.input_timeout_s)
        account = self._runner.account() if self._runner is not None else Account()
        status = self._latency.status if self._latency is not None else BudgetStatus()
        if status.recalibrated and self.parameters.recalibrate:
            self.set_parameters([Parameter("recalibrate", value=False)])
        level, sentence = judge(self._health(account, status.problem()))
        pairs = {"state": self._state, **account.counts.as_pairs()}
        if self._engine is not None:
            pairs.update(engine_pairs(self._engine.info))
        pairs.update(status.as_pairs())
        pairs.update(account.age.as_pairs("age"))
        pairs.update(account.engine.as_pairs("engine"))
        header = Header(stamp=self.get_clock().now().to_msg())
        device = self._engine.info.device if self._engine is not None else ""
        name = f"{self.get_fully_qualified_name().lstrip('/')}: segmentation"
        self._diagnostics.publish(diagnostic_array(header, name, device, level, sentence, pairs))
        self._reported = account.counts

    def _health(self, account: Account, budget_problem: str) -> Health:
        watch = self._watch
        return Health(
            state=self._state,
            fault=self._fault,
            input_topic=watch.topic if watch else "",
            input_silence_s=watch.silence_s if watch else 0.0,
            input_timeout_s=self.parameters.input_timeout_s,
            counts=account.counts,
            recent=account.counts.since(self._reported),
            last_rejection=account.last_rejection,
            last_failure=account.last_failure,
            unstamped=account.unstamped,
            qos_problem=watch.qos_problem if watch else "",
            input_age_s=account.arrival_age_ms / 1000.0,
            budget_problem=budget_problem,
            throttling=throttling() if budget_problem else "",
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the node until it is told to end.

    Returns:
        0 after SIGINT or SIGTERM; 1 when the node could not start.
    """
    return run_node("segmentation", SegmentationNode, _spin, arguments)


def _spin(node: SegmentationNode, executor: SingleThreadedExecutor) -> int:
    if node.parameters.autostart and not node.autostart():
        return 1
    executor.spin()
    return 0


if __name__ == "__main__":
    sys.exit(main())
