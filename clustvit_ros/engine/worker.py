# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The thread that owns an engine, the slot where frames wait for it, and how another engine takes its place.

One thread loads an engine, warms it, runs it and frees it: OpenMP keeps a team of threads for every thread that
computes, and with two teams on two cores a frame took 97 ms instead of 55. So an engine is never handed from thread to
thread. What is handed over is the slot: a successor loads beside the worker in charge, and takes the slot when it is
warm.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from clustvit_ros.engine.engine import Engine
from clustvit_ros.errors import EngineError

_LOG = logging.getLogger(__name__)

T = TypeVar("T")
F = TypeVar("F", contravariant=True)


class DeviceLost(EngineError):
    """The engine's device is of no use any more; another engine must go on with the frame."""


class RestartNeeded(DeviceLost):
    """Nor can this process use it again, by any engine: a new process must go on."""


class Session(Protocol[F]):
    """What is done with an engine; every call comes from the thread that owns it."""

    engine: Engine

    def handle(self, frame: F) -> None:
        """Do everything for one frame; only `DeviceLost` may come out, once the frame is back in the slot."""

    def use_idle_time(self, is_free: Callable[[], bool]) -> None:
        """Do what can wait, as long as `is_free()`."""


class FrameSlot(Generic[T]):
    """Holds the newest frame of each camera until the worker in charge takes it.

    The camera that has waited longest is next: a newer frame takes its predecessor's place in the line.

    Args:
        on_drop: called with every frame that nobody will take, and its camera's name.
    """

    def __init__(self, on_drop: Callable[[T, str], None] = lambda frame, camera: None) -> None:
        self._on_drop = on_drop
        self._condition = threading.Condition()
        self._open = False
        self._busy = False
        self._owner: object | None = None
        self._newest: dict[str, T] = {}

    @property
    def empty(self) -> bool:
        """Whether no frame waits."""
        return not self._newest

    @property
    def busy(self) -> bool:
        """Whether a worker is at a frame."""
        return self._busy

    def peek(self) -> T | None:
        """The frame that is next as things stand; it stays, and a newer one may take its place."""
        with self._condition:
            return self._first()

    def put(self, frame: T, camera: str = "") -> None:
        """Let a frame wait; never blocks."""
        with self._condition:
            if not self._open or not self._store(frame, camera):
                self._on_drop(frame, camera)
                return
            self._condition.notify_all()

    def put_back(self, frame: T, camera: str = "") -> None:
        """Return a frame that was taken, to be the next one."""
        with self._condition:
            self._busy = False
            if not self._open or not self._restore(frame, camera):
                self._on_drop(frame, camera)
            self._condition.notify_all()

    def take(self, owner: object) -> T | None:
        """Wait for the next frame and remove it.

        Args:
            owner: the caller, who works until the slot is handed to another.

        Returns:
            The frame, or None as soon as `owner` is not in charge.
        """
        with self._condition:
            # Not before the worker that was in charge has published its last frame: masks leave in order.
            self._condition.wait_for(lambda: self._owner is not owner or not (self.empty or self._busy))
            if self._owner is not owner:
                return None
            self._busy = True
            return self._next()

    def take_others(self) -> list[T]:
        """Remove what else waits, to be handled together with the frame just taken."""
        with self._condition:
            others = list(self._newest.values())
            self._newest.clear()
            return others

    def done(self) -> None:
        """The frame that was taken is dealt with."""
        with self._condition:
            self._busy = False
            self._condition.notify_all()

    def is_free(self, owner: object) -> bool:
        """Whether `owner` is in charge and nothing waits for it."""
        return self._owner is owner and self.empty and self._open

    def hand_over(self, owner: object | None) -> None:
        """Put another worker in charge; the one before it leaves after the frame that it is at."""
        with self._condition:
            self._owner = owner
            self._condition.notify_all()

    def open(self) -> None:
        """Begin to accept frames."""
        with self._condition:
            self._open = True

    def close(self, timeout_s: float) -> bool:
        """Drop what waits, accept no more, and wait for the frame that a worker is at.

        Returns:
            False when the worker was still at it after `timeout_s` seconds.
        """
        with self._condition:
            self._open = False
            self._clear()
            return self._condition.wait_for(lambda: not self._busy, timeout_s)

    def _store(self, frame: T, camera: str) -> bool:
        if camera in self._newest:
            self._on_drop(self._newest[camera], camera)
        self._newest[camera] = frame
        return True

    def _restore(self, frame: T, camera: str) -> bool:
        if camera in self._newest:
            return False
        self._newest = {camera: frame, **self._newest}
        return True

    def _first(self) -> T | None:
        return next(iter(self._newest.values()), None)

    def _next(self) -> T:
        return self._newest.pop(next(iter(self._newest)))

    def _clear(self) -> None:
        for camera, frame in self._newest.items():
            self._on_drop(frame, camera)
        self._newest.clear()


class FrameQueue(FrameSlot[T]):
    """Holds every frame in order of arrival, whichever camera it is from.

    Args:
        on_drop: as for `FrameSlot`.
        limit_bytes: memory that waiting frames may take; what comes when it is full is dropped.
        bytes_of: the memory that a frame takes, as far as that is known when it comes.
    """

    def __init__(self, on_drop: Callable[[T, str], None], limit_bytes: int, bytes_of: Callable[[T], int]) -> None:
        super().__init__(on_drop)
        self._limit_bytes, self._bytes_of = limit_bytes, bytes_of
        self._queue: deque[tuple[str, T, int]] = deque()
        self._held_bytes = 0

    @property
    def empty(self) -> bool:
        return not self._queue

    def take_others(self) -> list[T]:
        """Nothing: each frame of a replay is segmented by itself, so that masks repeat bit for bit."""
        return []

    def _store(self, frame: T, camera: str) -> bool:
        size = self._bytes_of(frame)
        # A single frame above the limit is still a frame to be segmented.
        if self._queue and self._held_bytes + size > self._limit_bytes:
            return False
        self._queue.append((camera, frame, size))
        self._held_bytes += size
        return True

    def _restore(self, frame: T, camera: str) -> bool:
        size = self._bytes_of(frame)
        self._queue.appendleft((camera, frame, size))
        self._held_bytes += size
        return True

    def _first(self) -> T | None:
        return self._queue[0][1] if self._queue else None

    def _next(self) -> T:
        _, frame, size = self._queue.popleft()
        self._held_bytes -= size
        return frame

    def _clear(self) -> None:
        for camera, frame, _ in self._queue:
            self._on_drop(frame, camera)
        self._queue.clear()
        self._held_bytes = 0


class EngineWorker(Generic[T]):
    """A thread with one engine: loads and warms it, takes frames while it is in charge of the slot, and frees it.

    Args:
        load: makes the session and its warm engine.
        slot: slot that frames wait in.
        on_loaded: called in the worker's thread when loading has ended; puts the worker in charge, or leaves it out.
        on_frame: called in the worker's thread after each frame.
        on_lost: called in the worker's thread when the device is lost, after the engine has been freed.
    """

    def __init__(
        self, load: Callable[[], Session[T]], slot: FrameSlot[T], on_loaded: Callable[[EngineWorker[T]], None],
        on_frame: Callable[[EngineWorker[T]], None], on_lost: Callable[[EngineWorker[T], DeviceLost], None],
    ) -> None:  # fmt: skip
        self._load, self._slot = load, slot
        self._on_loaded, self._on_frame, self._on_lost = on_loaded, on_frame, on_lost
        self.session: Session[T] | None = None
        """None while it loads, when loading failed, and once the engine is freed."""
        self.error: BaseException | None = None
        """Why loading failed."""
        # A daemon: a device that hangs must not keep a process alive that was told to end.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread's end.

        Returns:
            False when it was still running after `timeout_s` seconds.
        """
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.session = self._load()
        except BaseException as error:  # whatever it is, it belongs to whoever asked for the engine
            self.error = error
        lost: DeviceLost | None = None
        self._on_loaded(self)
        if self.session is not None:
            lost = self._serve(self.session)
            engine, self.session = self.session.engine, None
            engine.close()
            del engine
        if lost is not None:
            self._on_lost(self, lost)

    def _serve(self, session: Session[T]) -> DeviceLost | None:
        while (frame := self._slot.take(self)) is not None:
            try:
                session.handle(frame)
            except DeviceLost as error:
                return error
            except Exception:  # a fault of ours: the thread must outlive whatever one frame does
                _LOG.exception("a frame was lost")
            del frame  # or its pixels would live until the next one comes
            self._slot.done()
            self._on_frame(self)
            try:
                session.use_idle_time(lambda: self._slot.is_free(self))
            except Exception:
                _LOG.exception("work between frames failed")
        return None
