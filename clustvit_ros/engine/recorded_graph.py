# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Functions of fixed shapes, recorded once and replayed: as CUDA graphs, or by calling them again.

A CUDA graph launches hundreds of kernels at once, always the same ones on the same memory. So what a recorded function
reads must lie in buffers that stay where they are, and what it returns is overwritten by the next replay.
`CalledAgain` has exactly this behaviour without a GPU: everything but the capture itself runs, and is tested, on a CPU.

While any thread captures, nothing in the process may wait for the whole device: that spoils the capture, and the other
thread's call fails as well. So captures are made one at a time, frames wait for their own stream alone, and what must
touch the whole device, such as giving memory back, waits for `CAPTURE_LOCK`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

CAPTURE_LOCK = threading.RLock()
"""Held while a thread captures, or does what would spoil a capture."""

_WARMUP_CALLS = 2
_HOST_MEMORY_BYTES = 512_000_000
# Of the device's memory, which on a Jetson is everybody's.
_MEMORY_SHARE = 4


class Graph(abc.ABC, Generic[T]):
    """A recorded function.

    Attributes:
        outputs: what it returned; its tensors are overwritten by every replay.
    """

    outputs: T

    @abc.abstractmethod
    def replay(self) -> None:
        """Compute `outputs` from what the function's buffers hold now."""


class Recorder(abc.ABC):
    """Records functions, and moves data between host and device.

    Functions and downloads come one after another. What is sent to the device may overtake them: `release` and
    `receive` say where it must not.
    """

    memory_bytes: int = _HOST_MEMORY_BYTES
    """What recordings and their buffers may take; whoever holds them forgets those not used for longest."""

    @abc.abstractmethod
    def record(self, work: Callable[[], T]) -> Graph[T]:
        """Record a function of fixed shapes that reads static buffers alone.

        Args:
            work: called several times; returns tensors, or tuples of tensors and plain values.

        Raises:
            RuntimeError: the device cannot record it.
        """

    @abc.abstractmethod
    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device can copy from and to while the host goes on."""

    @abc.abstractmethod
    def send(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Begin to copy from a host buffer to the device, beside what was replayed since the latest `release`.

        Returns:
            What waits until the host buffer may be written again.
        """

    def release(self) -> None:  # noqa: B027 (most send at once)
        """What was sent has been read by what was replayed so far, and may be overwritten after it."""

    def receive(self) -> None:  # noqa: B027 (most send at once)
        """What is replayed from now on comes after everything that was sent so far."""

    @abc.abstractmethod
    def download(self, target: Tensor, source: Tensor) -> None:
        """Copy to a host buffer what was replayed so far; it is there after `wait`."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Wait for all downloads."""

    def check(self) -> None:  # noqa: B027 (most have nothing to be checked)
        """After a failed recording: is the device still usable?

        Raises:
            RuntimeError: it is not.
        """

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """A context in which the caller's operations on the device come before and after what is replayed in it."""
        yield


class CalledAgain(Graph[T]):
    """A function that is called again and whose results go to where the first ones lie."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.outputs = rebuilt(work(), Tensor.clone)  # its own, that share memory with nothing

    def replay(self) -> None:
        for target, source in zip(tensors_of(self.outputs), tensors_of(self._work()), strict=True):
            target.copy_(source)


class EagerRecorder(Recorder):
    """Records nothing: for a CPU, and for a GPU that cannot capture."""

    def record(self, work: Callable[[], T]) -> Graph[T]:
        return CalledAgain(work)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def send(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        target.copy_(source)
        return lambda: None

    def download(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def wait(self) -> None:
        pass


class CudaRecorder(Recorder):
    """Captures CUDA graphs that share one pool of memory: they run one after another, never at the same time.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream, self._copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._sent, self._released = torch.cuda.Event(), torch.cuda.Event()
        self._pool = torch.cuda.graph_pool_handle()
        self.memory_bytes = torch.cuda.get_device_properties(device).total_memory // _MEMORY_SHARE

    def record(self, work: Callable[[], T]) -> Graph[T]:
        with CAPTURE_LOCK, self.in_order():
            # Libraries choose their kernels and allocate their workspaces in the first calls.
            for _ in range(_WARMUP_CALLS):
                work()
            self._stream.synchronize()
            recorded = _Captured(*self._capture(work), work)
            # A captured function has not run yet.
            recorded.replay()
            self.release()
        return recorded

    def _capture(self, work: Callable[[], T]) -> tuple[Any, T]:
        # Not by `torch.cuda.graph`: it waits for the device and collects garbage, which holds up whatever else runs.
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # what it destroys may be forbidden during a capture
        try:
            # Other threads may use the device in the meantime.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph, outputs

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def send(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        self._copies.wait_event(self._released)
        target.record_stream(self._copies)  # its memory may be given away while the copy is under way
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        self._sent = torch.cuda.Event()
        self._sent.record(self._copies)
        return self._sent.synchronize

    def release(self) -> None:
        self._released.record(self._stream)

    def receive(self) -> None:
        self._stream.wait_event(self._sent)

    def download(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        self._stream.synchronize()

    def check(self) -> None:
        # Several PyTorch versions count a failed capture as going on: freeing and allocating memory then fails.
        with CAPTURE_LOCK:
            torch.cuda.empty_cache()
            torch.ones(8, device=self._device).sum().item()

    @contextmanager
    def in_order(self) -> Iterator[None]:
        callers = torch.cuda.current_stream(self._device)
        if callers == self._stream:
            yield
            return
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            yield
        callers.wait_stream(self._stream)


@dataclasses.dataclass(eq=False)
class Inlet:
    """Where arrays enter the device: a static buffer there, and two in host memory, used in turn.

    The one that is written is not the one that the device may still be copying from; where it is, after a call that
    was broken off, the host waits.

    Args:
        recorder: moves the data.
        target: (n, ...), buffer on the device.
    """

    recorder: Recorder
    target: Tensor
    hosts: list[tuple[Tensor, Callable[[], None]]] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(self.target.shape)
        self.hosts = [(self.recorder.host_buffer(shape, self.target.dtype), lambda: None) for _ in range(2)]

    def send(self, rows: np.ndarray) -> None:
        """Begin to copy (up to n, ...) `rows`; what the buffer has more of them repeats the first one."""
        (host, wait), other = self.hosts
        wait()
        array = host.numpy()
        array[: len(rows)], array[len(rows) :] = rows, rows[0]
        self.hosts = [other, (host, self.recorder.send(self.target, host))]


class _Captured(Graph[T]):
    def __init__(self, graph: Any, outputs: T, work: Callable[[], T]) -> None:
        self._graph, self.outputs = graph, outputs
        # The graph reads the memory of whatever the function holds on to.
        self._work = work

    def replay(self) -> None:
        self._graph.replay()


def held_bytes(value: Any) -> int:
    """Memory of the tensors in a record of buffers and graphs; what they share is counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(value)}.values())


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, records and graphs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Graph):
        return tensors_of(value.outputs)
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, (tuple, list)) else []


def rebuilt(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples with other tensors in the places of theirs; plain values stay."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        items = [rebuilt(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return [rebuilt(item, change) for item in value] if isinstance(value, list) else value
