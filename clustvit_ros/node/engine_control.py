# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The node's engine: which one the parameters ask for, how it is loaded and changed while masks flow, and by what name.

Loading happens in the engine's own thread; the executor's thread only hears of its end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from rclpy.lifecycle import LifecycleNode
from rclpy.parameter import Parameter
from rclpy.task import Future

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import Engine, EngineInfo, ScriptedEngine, check_model, create_engine
from clustvit_ros.engine.exemption import exempt_class_ids
from clustvit_ros.engine.host import EngineHost, EngineOrder
from clustvit_ros.engine.machine import available_bytes
from clustvit_ros.engine.masks import ClassGrouping, group_classes
from clustvit_ros.engine.scripted_engine import proportional
from clustvit_ros.engine.worker import FrameQueue, FrameSlot, RestartNeeded
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.node.camera import Camera, Frame
from clustvit_ros.node.filling import FrameFiller
from clustvit_ros.node.frame import FrameSession, MaskPublisher
from clustvit_ros.policy import Policy
from clustvit_ros.policy.parameters import SegmentationParameters

EngineFactory = Callable[[SegmentationParameters, str], Engine]
"""Makes the engine that parameters name, on a device."""

# What a model's classes are named in: these change together with it.
_NAMED = ("model", "class_groups", "merge_exempt_classes")


def make_engine(parameters: SegmentationParameters, device: str) -> Engine:
    """Make the engine that the parameters name.

    Args:
        parameters: values in force.
        device: name of the device; the CPU where the one that they name has failed.

    Raises:
        ClustvitError: the model cannot be loaded, or the device does not work.
    """
    if parameters.engine == "scripted":
        return ScriptedEngine(latency_ms=proportional(parameters.scripted_latency_ms))
    # A CPU that takes over from a GPU is slow enough without emulating half precision.
    precision = "float32" if device == "cpu" != parameters.device else parameters.precision
    return create_engine(
        parameters.model, parameters.engine, device, parameters.threads, precision, share_cores=parameters.adapts
    )


def check_names(classes: ClassSet, parameters: SegmentationParameters) -> ClassGrouping:
    """The grouping of a model's classes.

    Raises:
        ConfigError: the parameters name a class that the model lacks.
    """
    exempt_class_ids(classes.names, parameters.merge_exempt_classes)
    return group_classes(classes, parameters.class_groups)


class EngineControl:
    """Loads, changes and frees the engine of a node.

    Args:
        node: logs, keeps the parameters, and gets what the engine's thread has to say.
        parameters: gives the values in force.
        cameras: name -> camera; filled in when the node is configured.
        factory: makes engines; runs in the engine's thread.
        recovery_pause_s: seconds after a fallback before the device that was asked for is tried again.
        on_change: called in the executor's thread when another model has taken over.
        publisher: publishes masks.
        filler: carries masks on to frames that the engine does not get to.
        on_restart: called in the executor's thread, with the reason, when only a new process can go on.
    """

    def __init__(
        self, node: LifecycleNode, parameters: Callable[[], SegmentationParameters], cameras: Mapping[str, Camera],
        factory: EngineFactory, recovery_pause_s: float, on_change: Callable[[], None], publisher: MaskPublisher,
        filler: FrameFiller, on_restart: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._publisher, self._filler = publisher, filler
        self._node, self._parameters, self._cameras = node, parameters, cameras
        self._factory, self._recovery_pause_s = factory, recovery_pause_s
        self._on_change, self._on_restart = on_change, on_restart
        self._restart: RestartNeeded | None = None
        self.slot: FrameSlot[Frame] = FrameSlot()
        """Where frames wait; a new one for every load."""
        self._host: EngineHost[Frame] = EngineHost(self.slot)
        self._order: EngineOrder[Frame] | None = None
        self._ended: deque[tuple[EngineOrder[Frame], BaseException | None]] = deque()
        self._has_ended = threading.Event()
        self._error: BaseException | None = None
        self._loaded: Future | None = None
        self._told_model = ""
        self._told_idle: frozenset[str] = frozenset()
        self._classes: ClassSet | None = None
        self._before: list[Parameter] = []
        self._guard = node.create_guard_condition(self._hear)

    @property
    def session(self) -> FrameSession | None:
        """What works with the engine in charge; None while there is none."""
        session = self._host.session
        assert session is None or isinstance(session, FrameSession)
        return session

    @property
    def started(self) -> bool:
        """Whether an engine is loaded or on its way."""
        return self._loaded is not None

    @property
    def loading(self) -> str:
        """What is on its way, in words, or empty."""
        return f"loading model {self._parameters().model}" if self._host.loading else ""

    @property
    def fault(self) -> str:
        """Why the engine does not run as it was asked to, or empty."""
        return self._host.fault

    def load(self) -> Future:
        """Begin to load the engine that the parameters name, unless that was done.

        Returns:
            Done, by the executor, when loading has ended, well or not; `wait` tells which.
        """
        if self._loaded is None:
            self._loaded, self.slot = Future(), self._make_slot()
            self._host = EngineHost(
                self.slot, lambda e: self._say(f"warming {e.info.model} up on {e.info.device}"),
                on_restart=self._need_restart,
            )  # fmt: skip
            self._start()
        return self._loaded

    def wait(self) -> None:
        """Wait for the end of loading.

        Raises:
            Exception: why there is no engine.
        """
        self.load()
        self._has_ended.wait()
        self._hear()
        if self._error is not None:
            raise self._error

    def check(self) -> None:
        """Watch over what takes long; to be called about once a second."""
        self._host.check()

    def free(self, timeout_s: float = 5.0) -> None:
        """Free the engine, whatever it was about to do; one that hangs is left to its thread."""
        self._order = self._classes = None
        self._host.close(timeout_s)
        loaded, self._loaded, self._error, self._told_model = self._loaded, None, None, ""
        if loaded is not None and not loaded.done():
            loaded.set_result(None)

    def check_change(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        """Refuse values that engine or model cannot do; a matter of moments.

        Raises:
            ConfigError: what cannot be done, and why.
        """
        session = self.session
        if session is None:
            return
        if new.model == self._host.model:  # of another one, nobody knows yet what it can hold
            session.policy.check(old, new)
            self._classes = None
        elif new.model != old.model:
            if new.engine == "scripted":
                raise ConfigError(
                    f"model: {new.model!r} cannot be used, engine scripted runs no model; restart with engine torch"
                )
            self._classes = self._check_successor(new)
        # While another model is on its way, names are those of that one.
        check_names(self._classes or session.engine.info.classes, new)
        if new.model != old.model and not self._host.loading:
            self._before = [self._node.get_parameter(name) for name in _NAMED]

    def hold_names(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        """Have classes named as before until another model takes over; to be called before frames see new values."""
        session = self.session
        if session is not None and new.model not in (old.model, self._host.model):
            session.named = session.named or old

    def adopt_change(self, old: SegmentationParameters, new: SegmentationParameters) -> None:
        """Start what other values ask for, or give it up where they ask for what runs; once frames see them."""
        session = self.session
        if new.model == old.model and new.class_groups != old.class_groups and session is not None:
            classes = session.engine.info.classes
            self._tell_groups(classes, check_names(classes, new))
        if new.model == old.model and session is not None:
            self._tell_idle(new, session.engine.info)
        if new.model == old.model or not self.started:
            return
        self._order = None  # what was on its way is given up, which is no failure
        self._host.cancel()
        kept, session = self._host.keep(new.model), self.session
        if session is not None:  # another one than above if it took over meanwhile
            session.named = None if kept else session.named or old
        if kept:  # perhaps since a moment ago, and nobody has heard of it
            self._see_in_charge(new.model)
        else:
            self._start()

    def _tell_groups(self, classes: ClassSet, grouping: ClassGrouping) -> None:
        if grouping.table is not None:
            self._say(f"{len(classes)} classes become {', '.join(grouping.classes.names)}")
        if grouping.ungrouped:
            self._node.get_logger().warning(
                f"class_groups: {', '.join(grouping.ungrouped)} are in no group; their pixels become 255 (unlabelled)"
            )

    def _tell_idle(self, parameters: SegmentationParameters, info: EngineInfo) -> None:
        """Log what has no effect, once for as long as it stays so."""
        idle: dict[str, None] = {}
        for each in (parameters, *(camera.parameters for camera in self._cameras.values())):
            idle |= dict.fromkeys(each.without_effect(info.merges))
        for sentence in idle:
            if sentence not in self._told_idle:
                self._node.get_logger().warning(sentence)
        self._told_idle = frozenset(idle)

    def _start(self) -> None:
        parameters, start_s = self._parameters(), time.monotonic()
        model = "" if parameters.engine == "scripted" else f" with model {parameters.model}, device {parameters.device}"
        self._say(f"loading engine {parameters.engine}{model}")
        if not model and parameters.model != SegmentationParameters.model:
            self._node.get_logger().warning(f"model {parameters.model} has no effect: the engine scripted runs none")
        self._has_ended.clear()

        def end(error: BaseException | None) -> None:
            if order is self._order:  # else another one was asked for meanwhile
                self._ended.append((order, error))
                self._has_ended.set()
                self._guard.trigger()

        order: EngineOrder[Frame] = EngineOrder(
            model=parameters.model, make=lambda device: self._factory(parameters, device),
            assemble=lambda engine: self._assemble(engine, start_s), device=parameters.device, adapts=parameters.adapts,
            on_end=end, first_pause_s=self._recovery_pause_s,
        )  # fmt: skip
        self._order = order
        self._host.start(order)

    def _assemble(self, engine: Engine, start_s: float) -> FrameSession:
        """What works with an engine; runs in the engine's thread, under the parameters in force by then."""
        node, parameters, info = self._node, self._parameters(), engine.info
        logger = node.get_logger()
        grouping = check_names(info.classes, parameters)
        self._told_idle = frozenset()
        self._tell_idle(parameters, info)
        self._tell_groups(info.classes, grouping)
        reason = f" ({info.device_reason})" if info.device_reason else ""
        self._say(
            f"{info.model} runs on {info.device}{reason}: engine {info.engine_told}, {info.precision}, "
            f"{len(info.classes)} classes, {info.tokens_total} tokens at {info.input_size[1]}x{info.input_size[0]}; "
            f"loaded and warm in {time.monotonic() - start_s:.1f} s"
        )
        return FrameSession(
            engine, Policy(engine, logger), self._cameras, self.slot, self._publisher, self._filler, logger,
            node.context.ok,
        )  # fmt: skip

    def _need_restart(self, error: RestartNeeded) -> None:
        self._restart = error
        self._guard.trigger()

    def _hear(self) -> None:
        """In the executor's thread: an engine took over, or cannot be had, by this process or at all."""
        restart, self._restart = self._restart, None
        if restart is not None:
            self._on_restart(str(restart))
        while self._ended:
            order, error = self._ended.popleft()
            if order is not self._order:
                continue
            self._error = error
            if error is None:
                self._see_in_charge(order.model)
                continue
            if self._told_model:
                self._node.get_logger().error(self._why_not(order.model, error))
                # At once: class names of one model are not those of the other.
                self._node.set_parameters_atomically(self._before)
            self._end_load()

    def _see_in_charge(self, model: str) -> None:
        self._error = self._classes = None
        if self._told_model not in ("", model):
            self._say(f"model {model} takes over from {self._told_model}")
            self._on_change()
        self._told_model = model
        self._has_ended.set()
        self._end_load()

    def _end_load(self) -> None:
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_result(None)

    def _check_successor(self, new: SegmentationParameters) -> ClassSet | None:
        """Everything about a model that a moment tells; its classes, None where they are not known yet."""
        if self._factory is not make_engine:
            return None
        try:
            (classes, needed), free = check_model(new.model), available_bytes()
            if free is not None and free < needed:
                raise ConfigError(
                    f"loading it beside the running model takes about {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are "
                    "free; deactivate and clean up first, or restart with it"
                )
            check_names(classes, new)
            return classes
        except ClustvitError as error:
            message = self._why_not(new.model, error)
            self._node.get_logger().error(message)
            raise ConfigError(message) from error

    def _why_not(self, model: str, error: BaseException) -> str:
        detail = str(error) if isinstance(error, ClustvitError) else f"{type(error).__name__}: {error}"
        return f"model: {model!r} cannot be used ({detail}); {self._host.model} stays in use"

    def _make_slot(self) -> FrameSlot[Frame]:
        def drop(frame: Frame, _camera: str) -> None:
            self._filler.give_up(frame)

        parameters = self._parameters()
        if parameters.adapts:
            return FrameSlot(drop)
        return FrameQueue(drop, parameters.queue_limit_mb * 1_000_000, lambda frame: frame.held_bytes)

    def _say(self, text: str) -> None:
        self._node.get_logger().info(text)
