# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The segmentation node: a thin, managed shell that feeds the newest camera images to an engine and publishes masks.

One executor thread serves parameters, lifecycle and diagnostics and only stores the newest images; one engine thread
decodes, segments and publishes. Neither waits for the other, and engines are loaded in threads of their own.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import CallbackGroup, ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.task import Future
from std_msgs.msg import Header

from clustvit_ros.engine.masks import group_classes
from clustvit_ros.errors import ClustvitError
from clustvit_ros.node.camera import Camera, Frame
from clustvit_ros.node.engine_control import EngineControl, EngineFactory, make_engine
from clustvit_ros.node.filling import FrameFiller
from clustvit_ros.node.frame import MaskPublisher
from clustvit_ros.node.messages import NO_LABEL_INFO, LabelInfo
from clustvit_ros.node.parameter_server import ParameterServer
from clustvit_ros.node.process import RESTART_CODE, ShieldedExecutor, answered, run_node
from clustvit_ros.node.qos import QosWatch
from clustvit_ros.node.status import camera_status, losses_of
from clustvit_ros.policy import BudgetStatus
from clustvit_ros.policy.parameters import CameraParameters, SegmentationParameters

_REPORT_PERIOD_S = 1.0
# Reports: discovery of the clock's publisher takes its time.
_CLOCK_GRACE = 3
# A frame at hand may be finished when the node is deactivated; nobody who asks for that waits longer.
_FINISH_S = 0.8
_FAREWELL_S = 1.0


class SegmentationNode(LifecycleNode):
    """Segments the newest image of each camera, again and again.

    Args:
        engine_factory: makes the engine that parameters name on a device; runs in the engine's thread.
        recovery_pause_s: seconds after a fallback before the device that was asked for is tried again.
        arguments: further arguments of rclpy's Node.

    Raises:
        ConfigError: a start value that its parameter does not accept.
    """

    def __init__(
        self, engine_factory: EngineFactory = make_engine, recovery_pause_s: float = 10.0, **arguments: Any
    ) -> None:
        # Services answer while a transition waits for an engine; one executor thread runs them all.
        self._group = ReentrantCallbackGroup()
        super().__init__("segmentation", **arguments)
        self._answer_change_state = self._service_change_state.callback
        self._service_change_state.callback = self._on_change_state  # type: ignore[assignment]
        self._state = "unconfigured"
        self._fault = self._engine_fault = ""
        self._exit_code = 0
        self._recalibrated: SegmentationParameters | None = None
        self._reports_without_clock = 0
        self._cameras: dict[str, Camera] = {}
        publisher = MaskPublisher(self.get_name(), self.get_logger(), lambda: self.get_clock().now().nanoseconds)
        self._filler = FrameFiller(self._cameras, publisher, self.get_logger(), self.context.ok)
        self._engines = EngineControl(
            self, lambda: self.parameters, self._cameras, engine_factory, recovery_pause_s, self._publish_labels,
            publisher, self._filler, self._end_for_restart,
        )  # fmt: skip
        self._qos = QosWatch(self)
        self._server = ParameterServer(
            self, SegmentationParameters, self._why_locked, self._check_change, self._adopt_change
        )
        for camera in filter(None, self.parameters.cameras):
            self._server.add(f"{camera}.", CameraParameters)
        gone = {".weight": "of several cameras, the one that has waited longest is next"}
        self._server.warn_of_unknown(gone, sys.argv)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Steady, so that diagnostics keep their pace while simulated time stands still.
        self._timer = self.create_timer(_REPORT_PERIOD_S, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME))
        if LabelInfo is None:
            self.get_logger().warning(NO_LABEL_INFO)

    def create_service(self, srv_type: Any, srv_name: str, callback: Any, **arguments: Any) -> Any:
        """As rclpy's, which uses it for the parameter services, too; whoever calls it is answered in any case."""
        return super().create_service(srv_type, srv_name, answered(srv_type, callback, self.has_parameter), **arguments)

    def set_parameters_atomically(self, parameter_list: list[Parameter]) -> SetParametersResult:
        """As rclpy's; what that refuses by itself leaves the types that parameters are described with."""
        result = super().set_parameters_atomically(parameter_list)
        if not result.successful:
            self._server.keep_types(parameter_list)
        return result

    @property
    def default_callback_group(self) -> CallbackGroup:
        """Reentrant: see `__init__`."""
        return self._group

    @property
    def parameters(self) -> SegmentationParameters:
        """The parameters in force."""
        return self._server.current

    def parameters_of(self, camera: str) -> SegmentationParameters:
        """The parameters in force for one camera."""
        tables = self._server.tables
        return tables[f"{camera}."].over(tables[""]) if camera else tables[""]

    def load(self) -> Future:
        """Begin to load the engine; done when that has ended, well or not, which configuring tells."""
        return self._engines.load()

    def autostart(self) -> bool:
        """Configure and activate.

        Returns:
            False when either failed; the log says why.
        """
        success = TransitionCallbackReturn.SUCCESS
        # A manager may have been faster.
        configured = self._state != "unconfigured" or self.trigger_configure() == success
        return configured and (self._state != "inactive" or self.trigger_activate() == success)

    def destroy_node(self) -> None:
        """Leave ROS at once, whatever a thread of the engine still holds."""
        super().destroy_node()
        # rclpy forgets this one, which keeps the DDS participant: the graph shows the node for 20 s after the process
        # ended in the middle of a load, and whoever calls its services then is never answered.
        self._state_machine.destroy_when_not_in_use()

    def close(self) -> int:
        """Stop working in whatever state the node is, and free the engine unless a frame still holds it.

        Returns:
            0: every way to end is a good one, but for the need of a new process.
        """
        self._filler.close()
        finished = self._engines.slot.close(_FINISH_S)
        self._engines.free(_FINISH_S if finished else 0.0)
        return self._exit_code

    async def _on_change_state(
        self, request: ChangeState.Request, response: ChangeState.Response
    ) -> ChangeState.Response:
        transition = request.transition
        configure = transition.label == "configure" or (
            not transition.label and transition.id == Transition.TRANSITION_CONFIGURE
        )
        if configure and self._state == "unconfigured":
            await self.load()
        try:
            return self._answer_change_state(request, response)
        except Exception as error:  # rcl's own type is private to rclpy, and would end the process
            if not self.context.ok():
                raise
            self.get_logger().error(f"transition {transition.id} refused while {self._state}: {error}")
            response.success = False
            return response

    # Lifecycle transitions. rclpy swallows what they raise, so each one reports its own failure.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Create the publishers; the engine is loaded before, or now where nobody waited for it."""
        return self._transition("configuring", "inactive", self._configure, partial(super().on_configure, state))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe to the cameras and begin to publish."""
        return self._transition("activating", "active", partial(self._activate, state))

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe and finish the frame at hand."""
        return self._transition("deactivating", "inactive", self._deactivate, partial(super().on_deactivate, state))

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the engine and the publishers."""
        steps = self._refuse_while_busy, self._free, partial(super().on_cleanup, state)
        return self._transition("cleaning up", "unconfigured", *steps)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free everything, from any state."""
        steps = self._deactivate, self._free, partial(super().on_shutdown, state)
        return self._transition("shutting down", "finalized", *steps)

    def _transition(self, what: str, reached: str, *steps: Callable[[], Any]) -> TransitionCallbackReturn:
        try:
            for step in steps:
                step()
        except Exception as error:  # a managed node must answer its manager, whatever happened
            self._fault = f"{what} failed: {error}"
            if self.context.ok():  # else a signal came in the middle, and every call to ROS fails
                unknown = "" if isinstance(error, ClustvitError) else f"\n{traceback.format_exc().rstrip()}"
                self.get_logger().error(f"{self._fault}{unknown}")
            return TransitionCallbackReturn.FAILURE
        self._state, self._fault = reached, ""
        if what not in ("configuring", "activating") and self.context.ok():  # which say more by themselves
            self.get_logger().info(f"{what} done: {reached}")
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        try:
            self._engines.wait()
            for name in self.parameters.cameras:
                self._cameras[name] = Camera(self, name, self._qos, self.parameters_of(name))
        except BaseException:
            self._free()
            raise

    def _activate(self, state: LifecycleState) -> None:
        self._refuse_while_busy()
        # Before the first frame: publishers drop what comes while they are inactive.
        super().on_activate(state)
        self._publish_labels()
        self._filler.open()
        self._engines.slot.open()
        try:
            topics = [camera.subscribe(self._accept) for camera in self._cameras.values()]
        except Exception:
            self._deactivate()
            super().on_deactivate(state)
            raise
        for camera, topic in zip(self._cameras.values(), topics, strict=True):
            self.get_logger().info(f"active: {topic} -> {camera.mask_topic}")
        self._server.warn_of_unknown_qos()

    def _accept(self, frame: Frame, camera: str) -> None:
        slot, fills = self._engines.slot, self._cameras[camera].parameters.fills
        # In this order: a slot is busy before it is empty.
        idle = slot.empty and not slot.busy
        if self._filler.offer(frame, idle) if fills else not frame.fate.over_rate:
            slot.put(frame, camera)
        else:
            self._filler.give_up(frame)

    def _deactivate(self) -> None:
        for camera in self._cameras.values():
            camera.unsubscribe()
        self._filler.close()
        if not self._engines.slot.close(_FINISH_S):
            self.get_logger().warning("the engine is still busy with the last frame; its mask will not be published")

    def _refuse_while_busy(self) -> None:
        if self._engines.slot.busy:
            raise ClustvitError("the engine is still busy with the last frame; try again in a moment")

    def _free(self) -> None:
        if self._engines.slot.busy:
            self._engines.free(0.0)  # by its own thread, once it returns; publishers are in use until then
            return
        for camera in self._cameras.values():
            camera.destroy()
        self._cameras.clear()
        self._engines.free()

    # Parameters.

    def _why_locked(self) -> str | None:
        if self._state in ("unconfigured", "finalized") and not self._engines.started:
            return None
        state = "loading its model" if self._state == "unconfigured" else self._state
        return (
            f"cannot change while the node is {state}; deactivate and clean up first "
            f"(`ros2 lifecycle set {self.get_fully_qualified_name()} ...`), or restart with the new value"
        )

    def _check_change(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        self._engines.check_change(old, new)

    def _adopt_change(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        self._engines.hold_names(old, new)
        for name, camera in self._cameras.items():
            camera.parameters = self.parameters_of(name)
        self._engines.adopt_change(old, new)
        if self._state == "active" and self._engines.slot.empty and not self._engines.loading:
            self._publish_labels()  # else the engine's thread does, before its next mask

    def _publish_labels(self) -> None:
        session = self._engines.session
        if session is not None:
            parameters = self.parameters
            classes = group_classes(session.engine.info.classes, parameters.class_groups).classes
            header = Header(stamp=self._now())
            for camera in self._cameras.values():
                camera.outputs.publish_labels(classes, parameters.confidence_threshold, header)

    def _end_for_restart(self, reason: str) -> None:
        self._exit_code = RESTART_CODE
        self._fault = f"this process can use its GPU no more, and ends to be started again: {reason}"
        self.get_logger().fatal(self._fault)
        self._report()
        self._diagnostics.wait_for_all_acked(Duration(seconds=_FAREWELL_S))  # else nobody hears of it
        self.context.try_shutdown()

    # Diagnostics, once a second.

    def _report(self) -> None:
        self._engines.check()
        self._qos.check()
        session, parameters = self._engines.session, self.parameters
        budget = session.policy.status if session is not None else BudgetStatus()
        # Once for each table of values: as long as no frame comes, the status is that of an earlier one.
        if (asked := budget.recalibrated) and parameters.recalibrate and asked is not self._recalibrated:
            self._recalibrated = asked
            self.set_parameters([Parameter("recalibrate", value=False)])
        self._tell_engine_fault()
        clock_problem = self._clock_problem()
        array = DiagnosticArray(header=Header(stamp=self._now()))
        for name in parameters.cameras:
            camera, losses = self._cameras.get(name), ""
            if camera is not None and camera.watch is not None:
                losses = losses_of(camera)
                camera.watch.check(parameters.input_timeout_s, losses)
            array.status.append(
                camera_status(
                    name=f"{self.get_fully_qualified_name().lstrip('/')}: segmentation{' ' + name if name else ''}",
                    state=self._state, fault=self._fault,
                    loading=self._engines.loading,
                    info=session.engine.info if session is not None else None, engine_fault=self._engine_fault,
                    budget=budget, parameters=parameters, camera=camera, clock_problem=clock_problem,
                    losses=losses or self._filler.problem_of(name),
                )
            )  # fmt: skip
        self._diagnostics.publish(array)

    def _now(self) -> Time:
        """A stamp for what belongs to no frame: the system's time while simulated time has not begun."""
        now = self.get_clock().now()
        return (now if now.nanoseconds else Clock(clock_type=ClockType.SYSTEM_TIME).now()).to_msg()

    def _clock_problem(self) -> str:
        if self.get_clock().now().nanoseconds:
            if self._reports_without_clock >= _CLOCK_GRACE:
                self.get_logger().info("time comes on /clock")
            self._reports_without_clock = 0
            return ""
        self._reports_without_clock += 1
        if self._reports_without_clock < _CLOCK_GRACE:
            return ""
        problem = (
            "use_sim_time is set and no time comes on /clock, so that ages are unknown; start the simulator or "
            "`ros2 bag play --clock`, or set use_sim_time to false"
        )
        if self._reports_without_clock == _CLOCK_GRACE:
            self.get_logger().warning(problem)
        return problem

    def _tell_engine_fault(self) -> None:
        fault = self._engines.fault
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
    return run_node("segmentation", SegmentationNode, spin, arguments, ShieldedExecutor)


def spin(node: SegmentationNode, executor: SingleThreadedExecutor) -> int:
    """Start the node where it is to start by itself, and serve it until ROS shuts down.

    Returns:
        1 when it could not start.
    """
    if node.parameters.autostart:
        executor.spin_until_future_complete(node.load())
        if node.context.ok() and not node.autostart():
            return 1
    executor.spin()
    return 0


if __name__ == "__main__":
    sys.exit(main())
