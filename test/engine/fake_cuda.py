# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A stand-in for `torch.cuda` on a CPU's tensors, that keeps to CUDA's documented rules of stream capture.

What a thread does while it captures is written down and done again, on the same memory, by every replay. A device-wide
wait anywhere in the process, or reading a value back, spoils every capture under way. A replay that reads memory which
nobody holds any more is an illegal access. Everything is done at once, but streams and the host are taken to be at work
at the same time unless a wait orders them: what touches the memory of an `Inlet`, or pinned memory, without such an
order is a race.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import types
import weakref
from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
SPOILED = "CUDA error: operation failed due to a previous error during capture"
ILLEGAL = "CUDA error: an illegal memory access was encountered"
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.44 GiB"
TOTAL_BYTES = 8_000_000_000
# Their result is a value or a shape that the host waits for.
_READ_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


class FakeCuda:
    """The device.

    Attributes:
        calls: how often each kind of call was made: captures, replays, device-wide and stream waits, waits for an event
            that was not over for sure, waits between streams.
        races: operations that may have met memory which another stream, or the host, was still at.
        collisions: which thread waited for the whole device while another one captured.
        fails: kind of call -> error text of every further one.
        allocator_breaks: whether a failed capture leaves the allocator unusable, as in PyTorch up to 2.8.
        total_bytes: the device's memory.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.collisions: list[str] = []
        self.fails: dict[str, str] = {}
        self.allocator_breaks = False
        self.total_bytes = TOTAL_BYTES
        self._lock, self._local = threading.RLock(), threading.local()
        self._captures: set[_Graph] = set()
        self._broken = False
        self.races: list[str] = []
        self.host = _Clock("host")
        self._default = _Stream(self)
        # Of memory that streams and the host share, by address: who made it, and its accesses since. It is held.
        self._born: dict[int, tuple[str, int]] = {}
        self._shared: dict[int, _Shared] = {}

    def install(self, monkeypatch) -> None:
        """Take the place of `torch.cuda`."""
        empty, as_array = torch.empty, Tensor.numpy

        def allocate(*arguments, pin_memory=False, **options):
            tensor = empty(*arguments, **options)
            if pin_memory:
                self._share(tensor, pinned=True)
            return tensor

        def numpy(tensor):
            shared = self._shared.get(_address(tensor))
            if shared is not None and shared.pinned:
                self._touch(shared, self.host, True, "the host")
            return as_array(tensor)

        with torch.device("meta"):
            empty(1)  # this way of choosing a device looks its functions up once: before they are replaced
        monkeypatch.setattr(torch, "empty", allocate)
        monkeypatch.setattr(Tensor, "numpy", numpy)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self._share(tensor, pinned=False))
        replacements = {
            "Stream": lambda device=None: _Stream(self), "stream": self._in_stream,
            "current_stream": lambda device=None: getattr(self._local, "stream", self._default),
            "synchronize": lambda device=None: self.whole_device("device wait"),
            "empty_cache": lambda: self.whole_device("empty_cache"), "CUDAGraph": lambda: _Graph(self),
            "graph_pool_handle": lambda: (0, 1), "Event": lambda enable_timing=False: _Event(self),
            "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=self.total_bytes),
            "is_current_stream_capturing": lambda: getattr(self._local, "capturing", None) is not None,
        }  # fmt: skip
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    def call(self, kind: str) -> None:
        """Count a call; it fails if it is meant to."""
        with self._lock:
            self.calls[kind] += 1
        if kind in self.fails:
            raise RuntimeError(self.fails[kind])

    def whole_device(self, kind: str) -> None:
        """A call that waits for everything on the device."""
        self.call(kind)
        with self._lock:
            if self._captures:
                for capture in self._captures:
                    capture.invalid = True
                self.collisions.append(f"{kind} by {threading.current_thread().name}")
                raise RuntimeError(NOT_PERMITTED)
        if self._broken:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp")

    @contextlib.contextmanager
    def _in_stream(self, stream):
        before = getattr(self._local, "stream", self._default)
        self._local.stream = stream
        try:
            with _Watch(self):
                yield
        finally:
            self._local.stream = before

    def _share(self, tensor: Tensor, pinned: bool) -> None:
        """Watch memory from now on."""
        address = _address(tensor)
        if address not in self._shared:
            born = None if pinned else self._born.get(address)
            self._shared[address] = _Shared(tensor.untyped_storage(), pinned, born)

    def ran(self, func, args, outputs) -> None:
        """An operation of the current stream, or of the host where it is on pinned memory and waits for its end."""
        if getattr(self._local, "capturing", None) is not None:
            return  # done by replays
        name = func.overloadpacket.__name__
        read = [_address(tensor) for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
        shared = {address: self._shared[address] for address in read if address in self._shared}
        if not shared and name != "zeros":
            return
        made = {_address(tensor) for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)}
        by_host = any(memory.pinned for memory in shared.values()) and not (name == "copy_" and args[2:] == (True,))
        clock = self.host if by_host else torch.cuda.current_stream().clock
        with self._lock:
            clock.join(self.host)
            clock.tick()
            for address in made.difference(read):
                self._born[address] = clock.name, clock.times[clock.name]
        if name.endswith("_") or not made.issubset(read):  # a view touches nothing
            for address, memory in shared.items():
                self._touch(memory, clock, name.endswith("_") and address == read[0], f"{name} on {clock.name}")

    def _touch(self, memory: _Shared, clock: _Clock, writes: bool, who: str) -> None:
        with self._lock:
            clock.tick()
            before = [memory.written, *(memory.read.items() if writes else ())]
            if any(time > clock.times[name] for name, time in filter(None, before)):
                self.races.append(f"{who} {'writes' if writes else 'reads'} too early")
            if writes:
                memory.written, memory.read = (clock.name, clock.times[clock.name]), {}
            else:
                memory.read[clock.name] = clock.times[clock.name]


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for weights in a library's own layout."""
    return 0 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class _Clock:
    """What a stream, or the host, comes after: a count of operations for each of them."""

    def __init__(self, name: str) -> None:
        self.name, self.times = name, Counter()

    def tick(self) -> None:
        self.times[self.name] += 1

    def join(self, other: _Clock) -> None:
        self.times |= other.times


@dataclasses.dataclass
class _Shared:
    storage: object
    pinned: bool
    written: tuple[str, int] | None
    read: dict[str, int] = dataclasses.field(default_factory=dict)


class _Watch(TorchDispatchMode):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self._cuda.ran(func, args, outputs)
        return outputs


class _Stream:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.clock = _Clock(f"stream {id(self)}")
        self.clock.join(cuda.host)

    def wait_stream(self, other) -> None:
        self._cuda.call("wait between streams")
        self.clock.join(other.clock)

    def wait_event(self, event) -> None:
        self.clock.join(event.clock)

    def synchronize(self) -> None:
        self._cuda.call("stream wait")
        for capture in self._cuda._captures:
            if capture.stream is self:
                capture.invalid = True
                raise RuntimeError(NOT_PERMITTED)
        self._cuda.host.join(self.clock)


class _Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._time_s, self.clock = 0.0, _Clock("event")

    def record(self, stream=None) -> None:
        self._time_s, self.clock = time.perf_counter(), _Clock("event")
        self.clock.join((stream or torch.cuda.current_stream()).clock)

    def synchronize(self) -> None:
        if not self.clock.times <= self._cuda.host.times:
            self._cuda.call("event wait")
        self._cuda.host.join(self.clock)

    def elapsed_time(self, other: _Event) -> float:
        return (other._time_s - self._time_s) * 1000.0


class _Graph(TorchDispatchMode):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda
        self.stream, self.invalid = None, False
        self._made: dict[int, Tensor] = {}
        self._calls: list[tuple] = []

    def capture_begin(self, pool=None, capture_error_mode="global") -> None:
        assert capture_error_mode == "thread_local", "else whatever another thread does spoils it"
        self.stream = torch.cuda.current_stream()
        with self._cuda._lock:
            self._cuda._captures.add(self)
        self._cuda._local.capturing = self
        self._cuda.calls["capture"] += 1
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        self._cuda._local.capturing = None
        with self._cuda._lock:
            self._cuda._captures.discard(self)
        if self.invalid:
            self._cuda._broken = self._cuda.allocator_breaks
            raise RuntimeError(SPOILED)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        error = NOT_PERMITTED if func.overloadpacket.__name__ in _READ_BACK else self._cuda.fails.get("capture")
        if error:
            self.invalid = error == NOT_PERMITTED
            raise RuntimeError(error)
        outputs = func(*args, **kwargs)
        self._calls.append((func, tree_map(self._hold, args), tree_map(self._hold, kwargs), outputs))
        for made in tree_leaves(outputs):
            if isinstance(made, Tensor):
                self._made[id(made)] = made  # the graph's own memory
        return outputs

    def replay(self) -> None:
        self._cuda.call("replay")
        for func, args, kwargs, outputs in self._calls:
            again = func(*tree_map(_held, args), **tree_map(_held, kwargs))
            for target, source in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(target, Tensor) and target.data_ptr() != source.data_ptr():
                    target.copy_(source)

    def _hold(self, value):
        """What the graph did not make itself, others must keep."""
        if not isinstance(value, Tensor) or id(value) in self._made:
            return value
        return weakref.ref(value)


def _held(value):
    if not isinstance(value, weakref.ref):
        return value
    tensor = value()
    if tensor is None:
        raise RuntimeError(ILLEGAL)
    return tensor
