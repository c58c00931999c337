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
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_WARMUP_CALLS = 2


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
    """Records functions, and moves data between host and device, in one order."""

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
    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy from a host buffer to the device; what is replayed next finds it there."""

    @abc.abstractmethod
    def download(self, target: Tensor, source: Tensor) -> None:
        """Copy to a host buffer what was replayed so far; it is there after `wait`."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Wait for all downloads."""

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """A context in which the caller's operations on the device come before and after what is replayed in it."""
        yield


class CalledAgain(Graph[T]):
    """A function that is called again and whose results go to where the first ones lie."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.outputs = _own(work())

    def replay(self) -> None:
        for target, source in zip(_tensors(self.outputs), _tensors(self._work()), strict=True):
            target.copy_(source)


class EagerRecorder(Recorder):
    """Records nothing: for a CPU, and for a GPU that cannot capture."""

    def record(self, work: Callable[[], T]) -> Graph[T]:
        return CalledAgain(work)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

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
        self._compute = torch.cuda.Stream(device)
        self._copies = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], T]) -> Graph[T]:
        with self.in_order():
            # Libraries choose their kernels and allocate their workspaces in the first calls.
            for _ in range(_WARMUP_CALLS):
                work()
            self._compute.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device in the meantime.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._compute, capture_error_mode="thread_local"):
                outputs = work()
            recorded = _Captured(graph, self._compute, outputs)
            # A captured function has not run yet.
            recorded.replay()
        return recorded

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def upload(self, target: Tensor, source: Tensor) -> None:
        # Not before what was replayed has read the last upload.
        self._copies.wait_stream(self._compute)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        self._compute.wait_stream(self._copies)

    def download(self, target: Tensor, source: Tensor) -> None:
        self._copies.wait_stream(self._compute)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        self._copies.synchronize()

    @contextmanager
    def in_order(self) -> Iterator[None]:
        callers = torch.cuda.current_stream(self._device)
        self._compute.wait_stream(callers)
        with torch.cuda.stream(self._compute):
            yield
        callers.wait_stream(self._compute)


class _Captured(Graph[T]):
    def __init__(self, graph: Any, stream: Any, outputs: T) -> None:
        self._graph, self._stream, self.outputs = graph, stream, outputs

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _own(value: Any) -> Any:
    """The same with tensors of its own, that share memory with nothing."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        items = [_own(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return [_own(item) for item in value] if isinstance(value, list) else value
