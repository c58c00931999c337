"""An engine that lives in a thread of its own, whoever calls it.

OpenMP keeps a team of threads for every thread that computes. When a model is loaded by one thread and run by another,
the two teams together outnumber the cores, OpenMP stops spinning, and every parallel step waits for a thread to wake
up: on two cores a frame took 97 ms instead of 55. So one thread makes the engine, warms it and runs it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from clustvit_ros.engine.engine import Engine, EngineInfo, Prediction, Settings
from clustvit_ros.errors import EngineError

T = TypeVar("T")

_END_S = 5.0


class BoundEngine(Engine):
    """Makes an engine in a new thread and forwards every call to it.

    Args:
        make: makes the engine, in its thread.

    Raises:
        Whatever `make` raises.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._closed = False
        # A daemon: a device that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        try:
            self._engine = self._call(make)
        except BaseException:
            self._calls.put(None)
            raise

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def capacities(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """The engine's ladder for images of (height, width) `image_size`."""
        return self._engine.capacities(image_size)

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Warm the engine, in its thread."""
        self._call(lambda: self._engine.warmup(image_size))

    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        return self._call(lambda: self._engine.segment(images, settings))

    def close(self) -> None:
        """Free the engine and end its thread."""
        if not self._closed:
            self._call(self._engine.close)
            self._closed = True
            self._calls.put(None)
            # An interpreter that ends while a thread frees native memory aborts the process.
            self._thread.join(_END_S)

    def _call(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise EngineError("the engine is closed; make a new one")
        future: Future[T] = Future()
        self._calls.put((work, future))
        return future.result()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            work, future = call
            try:
                future.set_result(work())
            except BaseException as error:  # whatever it is belongs to the caller
                future.set_exception(error)
            # Or the last frame's arrays would live until the next one comes.
            del call, work, future
