# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Keeps an engine in charge of a slot: the first one, the one of another model, the CPU's when a GPU fails, and back.

All of these are one thing: a worker loads a successor beside whatever runs, and takes the slot when it is warm.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from clustvit_ros.engine.engine import Engine
from clustvit_ros.engine.fallback import (
    AS_CONFIGURED,
    FallbackPolicy,
    FaultKind,
    ResilientEngine,
    classify,
    first_line,
    steps_for,
)
from clustvit_ros.engine.worker import DeviceLost, EngineWorker, FrameSlot, RestartNeeded, Session
from clustvit_ros.errors import ConfigError, EngineError, ModelError

T = TypeVar("T")

LOAD_LIMIT_S = 180.0
"""A successor that is not warm after so long is given up."""


@dataclass(eq=False)
class EngineOrder(Generic[T]):
    """An engine that is asked for.

    Args:
        model: name or path of the model.
        make: makes the engine on a device ("auto", "cpu", "cuda", "cuda:N"); runs in the engine's thread.
        assemble: makes what works with the warm engine; runs in the engine's thread.
        device: name of the device asked for. "auto" uses the CPU at once when the GPU fails at the start.
        adapts: whether the engine may fall back; else failed calls are repeated once and nothing more.
        on_end: called in the engine's thread when it is in charge, or with the reason why it will not be.
        first_pause_s: seconds before the first attempt to come back from a fallback.
    """

    model: str
    make: Callable[[str], Engine]
    assemble: Callable[[Engine], Session[T]]
    device: str = "auto"
    adapts: bool = True
    on_end: Callable[[BaseException | None], None] = lambda error: None
    first_pause_s: float = 10.0
    policy: FallbackPolicy | None = field(default=None, init=False)
    """Which step it is on; None until an engine was made."""


class EngineHost(Generic[T]):
    """Starts workers and decides which of them is in charge.

    Args:
        slot: slot that frames wait in.
        on_loading: called with the engine that has been made, before it is warmed.
        clock: gives monotonic seconds.
        on_restart: called in an engine's thread when only a new process can go on; nothing is loaded any more then.
    """

    def __init__(
        self,
        slot: FrameSlot[T],
        on_loading: Callable[[Engine], None] = lambda engine: None,
        clock: Callable[[], float] = time.monotonic,
        on_restart: Callable[[RestartNeeded], None] = lambda error: None,
    ) -> None:
        self._slot, self._on_loading, self._clock, self._on_restart = slot, on_loading, clock, on_restart
        self._lock = threading.RLock()
        self._current: EngineWorker[T] | None = None
        self._successor: EngineWorker[T] | None = None
        self._began_s = 0.0
        self._order: EngineOrder[T] | None = None
        self._wanted: EngineOrder[T] | None = None

    @property
    def session(self) -> Session[T] | None:
        """What works with the engine in charge; None while there is none."""
        worker = self._current
        return worker.session if worker is not None else None

    @property
    def model(self) -> str:
        """Name or path of the model in charge; empty while there is none."""
        return self._order.model if self._order is not None else ""

    @property
    def loading(self) -> bool:
        """Whether an engine that was asked for is on its way."""
        return self._wanted is not None

    @property
    def fault(self) -> str:
        """Why the engine does not run as it was asked to, in a sentence; empty while it does."""
        order = self._order
        if order is None or order.policy is None:
            return ""
        if self._current is None and not self._slot.busy and self._successor is None:
            return f"no engine runs: {order.policy.cause}; another attempt is made in {order.policy.pause_left_s:.0f} s"
        session = self.session
        return session.engine.fault if session is not None else order.policy.fault

    def start(self, order: EngineOrder[T]) -> None:
        """Load an engine beside the one in charge; an engine that was still loading is given up."""
        with self._lock:
            self.cancel()
            self._wanted = order
            self._begin(order, lambda: self._load(order, order.device))

    def cancel(self) -> None:
        """Give up the engine that is loading; its thread frees it."""
        with self._lock:
            wanted, self._wanted, self._successor = self._wanted, None, None
        if wanted is not None:
            wanted.on_end(EngineError("its loading was cancelled"))

    def keep(self, model: str) -> bool:
        """Give up what is loading if `model` is in charge.

        Returns:
            False when another model is in charge.
        """
        with self._lock:
            kept = self.model == model
            if kept:
                self.cancel()
            return kept

    def check(self) -> None:
        """Give up what takes too long, and try again what failed; to be called about once a second."""
        with self._lock:
            successor, order = self._successor, self._order
            if successor is not None and self._clock() - self._began_s > LOAD_LIMIT_S:
                self._successor = None
                self._end(successor, EngineError(f"it was not warm after {LOAD_LIMIT_S:.0f} s"))
            stranded = successor is None and self._current is None and order is not None
            if stranded and order is not None and order.policy is not None and order.policy.due:
                self._begin(order, lambda: self._load(order, order.device))

    def close(self, timeout_s: float = 5.0) -> bool:
        """Free everything.

        Returns:
            False when the engine in charge was still busy after `timeout_s` seconds; it is freed when it returns.
        """
        self.cancel()
        with self._lock:
            current, self._current, self._order = self._current, None, None
            self._slot.hand_over(None)
        return current is None or current.join(timeout_s)

    def _begin(self, order: EngineOrder[T], load: Callable[[], Session[T]]) -> None:
        self._began_s = self._clock()
        # Set under the lock that `_on_loaded` takes first.
        self._successor = EngineWorker(
            load, self._slot,
            on_loaded=lambda worker: self._on_loaded(worker, order),
            on_frame=lambda worker: self._on_frame(worker, order),
            on_lost=lambda worker, error: self._on_lost(worker, order, error),
        )  # fmt: skip

    def _load(self, order: EngineOrder[T], device: str, image_size: tuple[int, int] | None = None) -> Session[T]:
        while True:
            try:
                made = order.make(device)
            except (ConfigError, ModelError):
                raise  # no fault of the device
            except Exception as error:  # whatever a device raises
                if device == "cpu" or order.device != "auto" or not order.adapts:
                    raise
                self._policy_of(order, on_cpu=False).fall_to_cpu(error)
                device = "cpu"
                continue
            policy = self._policy_of(order, made.info.device.startswith("cpu"))
            reason = f"fell back from {order.device}: {policy.cause}" if policy.step.on_cpu else ""
            engine = ResilientEngine(made, policy, reason)
            del made
            try:
                self._check_wanted(order)
                self._on_loading(engine)
                engine.warmup(image_size)
                self._check_wanted(order)
                return order.assemble(engine)
            except RestartNeeded:
                engine.close()
                raise
            except DeviceLost:
                engine.close()
                device = "cpu"
            except BaseException:
                engine.close()
                raise

    def _check_wanted(self, order: EngineOrder[T]) -> None:
        """End a load that was given up before it takes more time from the engine in charge."""
        with self._lock:
            if order is not self._wanted and order is not self._order:
                raise EngineError("its loading was given up")

    def _load_again(self, order: EngineOrder[T], image_size: tuple[int, int] | None) -> Session[T]:
        """An engine on the device that was asked for, while the CPU's goes on."""
        made = order.make(order.device)
        try:
            if made.info.device.startswith("cpu"):
                raise EngineError(made.info.device_reason or "the device asked for was not to be had")
            made.warmup(image_size)
            assert order.policy is not None  # it fell back before
            return order.assemble(ResilientEngine(made, order.policy))
        except BaseException:
            made.close()
            raise

    def _policy_of(self, order: EngineOrder[T], on_cpu: bool) -> FallbackPolicy:
        if order.policy is None:
            steps = steps_for(on_cpu) if order.adapts else (AS_CONFIGURED,)
            order.policy = FallbackPolicy(steps, self._clock, order.first_pause_s)
        return order.policy

    def _on_loaded(self, worker: EngineWorker[T], order: EngineOrder[T]) -> None:
        if worker.error is not None and self._needs_restart(worker.error):
            return
        with self._lock:
            if worker is not self._successor:
                return  # given up meanwhile: it is not in charge, and frees its engine
            self._successor = None
            if worker.error is None:
                policy, session = order.policy, worker.session
                on_cpu = session is None or session.engine.info.device.startswith("cpu")
                if policy is not None and policy.step.on_cpu and not on_cpu:
                    policy.come_back()
                self._current, self._order = worker, order
                self._slot.hand_over(worker)
        self._end(worker, worker.error)

    def _needs_restart(self, error: BaseException) -> bool:
        """Whether an error leaves this process without a device; whoever can end it is told."""
        needed = error if isinstance(error, RestartNeeded) else None
        if needed is None and isinstance(error, Exception) and classify(error) is FaultKind.STICKY:
            needed = RestartNeeded(first_line(error))
        if needed is not None:
            with self._lock:
                self._current, self._order, self._successor = None, None, None
            self._on_restart(needed)
            self.cancel()
        return needed is not None

    def _end(self, worker: EngineWorker[T], error: BaseException | None) -> None:
        with self._lock:
            wanted, self._wanted = self._wanted, None
            order = self._order
            if error is not None and wanted is None and order is not None and order.policy is not None:
                order.policy.cannot_come_back(error)
            if error is not None and wanted is not None and self._current is None and order is not None:
                # The engine before it was lost meanwhile.
                self._begin(order, lambda: self._load(order, "cpu"))
        if wanted is not None:
            wanted.on_end(error)

    def _on_frame(self, worker: EngineWorker[T], order: EngineOrder[T]) -> None:
        policy = order.policy
        if policy is None or not policy.due:
            return
        if not policy.step.on_cpu:
            policy.come_back()
            return
        with self._lock:
            if self._successor is None and worker is self._current and worker.session is not None:
                image_size = getattr(worker.session.engine, "image_size", None)
                self._begin(order, lambda: self._load_again(order, image_size))

    def _on_lost(self, worker: EngineWorker[T], order: EngineOrder[T], error: DeviceLost) -> None:
        if self._needs_restart(error):
            return
        with self._lock:
            if worker is not self._current:
                return
            self._current = None
            if self._successor is None:
                self._begin(order, lambda: self._load(order, "cpu"))
