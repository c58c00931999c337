# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What the operating system tells about the machine, and how this process behaves on it: memory, threads, waiting.

Everything that is told is read from files that may not exist, and reading never fails: what cannot be read is an empty
text or None.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_ROOT = Path("/")
_POWER_MODE = "var/lib/nvpmodel/status"


def machine_name(root: Path = _ROOT) -> str:
    """The board or processor, e.g. "NVIDIA Jetson Orin Nano" or "AMD EPYC"."""
    board = _read(root / "proc/device-tree/model")
    if board:
        return board
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def power_mode(root: Path = _ROOT) -> str:
    """What decides the clocks: Jetson's power mode, the CPU's governor, the GPU's bounds, which `jetson_clocks` moves.

    E.g. "pmode:0002, schedutil, gpu 306-624 MHz".
    """
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    clocks = [
        f"gpu {low // 1_000_000}-{high // 1_000_000} MHz"
        for gpu in _gpu_clocks(root)
        if (low := _read_int(gpu / "min_freq")) is not None and (high := _read_int(gpu / "max_freq")) is not None
    ]
    return ", ".join(filter(None, (_read(root / _POWER_MODE), governor, *clocks)))


def throttling(root: Path = _ROOT) -> str:
    """Why the platform makes this machine slower than its user set it, in a sentence; empty when nothing says so."""
    return "; ".join(filter(None, (_hot_zones(root), *_cooled(root), _limited_clock(root))))


def available_bytes(root: Path = _ROOT) -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if name == "MemAvailable" and number and number[0].isdigit():
            return int(number[0]) * 1024
    return None


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(_affinity()) or os.cpu_count() or 1


def busy_seconds(root: Path = _ROOT) -> float | None:
    """Seconds since boot that the processors which this process may run on have computed, summed, for all processes.

    A resolution of 10 ms; None where the system does not tell.
    """
    allowed = {f"cpu{number}" for number in _affinity()}
    ticks = found = 0
    for line in _read(root / "proc/stat").splitlines():
        name, *fields = line.split()
        if name in allowed and len(fields) >= 7 and all(field.isdigit() for field in fields):
            user, nice, system, _idle, _iowait, irq, soft_irq = map(int, fields[:7])
            ticks += user + nice + system + irq + soft_irq
            found += 1
    return ticks / os.sysconf("SC_CLK_TCK") if found else None


def others_seconds() -> float | None:
    """Seconds that these processors have computed for other processes; None where the system does not tell."""
    busy_s = busy_seconds()
    return None if busy_s is None else busy_s - time.process_time()


def _affinity() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):  # systems other than Linux
        return set()


def _hot_zones(root: Path) -> str:
    hot = []
    for zone in _glob(root / "sys/class/thermal", "thermal_zone*"):
        temperature = _read_int(zone / "temp")
        for kind in _glob(zone, "trip_point_*_type"):
            # `active` trips start fans; these two slow the machine down.
            if _read(kind) not in ("passive", "hot"):
                continue
            limit = _read_int(kind.with_name(kind.name.replace("_type", "_temp")))
            if temperature is not None and limit and 0 < limit <= temperature:
                name = _read(zone / "type") or zone.name
                hot.append(f"{name} at {temperature / 1000:.0f} °C, limit {limit / 1000:.0f} °C")
                break
    return f"thermal throttling ({', '.join(hot)})" if hot else ""


def _cooled(root: Path) -> Iterator[str]:
    """What the platform's heat or power guard holds back on a Jetson now, and a GPU below the clock set for it."""
    for device in _glob(root / "sys/class/thermal", "cooling_device*"):
        kind = _read(device / "type")
        if ("throttle" in kind or "gpu" in kind) and (_read_int(device / "cur_state") or 0) > 0:
            yield f"{kind} is active"
    for gpu in _gpu_clocks(root):
        now, least = _read_int(gpu / "cur_freq"), _read_int(gpu / "min_freq")
        if now and least and now < least:
            yield f"GPU clock at {now // 1_000_000} MHz, set to at least {least // 1_000_000} MHz"


def _gpu_clocks(root: Path) -> list[Path]:
    """Folders of the clocks of a Jetson's GPU; other GPUs have none there."""
    names = (".gpu", ".ga10b", ".gv11b", "gpu-gpc-0")
    return [path for path in _glob(root / "sys/class/devfreq", "*") if path.name.endswith(names)]


def _limited_clock(root: Path) -> str:
    if _read(root / _POWER_MODE):
        return ""  # the CPU's limit is that of the power mode, as it was chosen
    for policy in _glob(root / "sys/devices/system/cpu/cpufreq", "policy*"):
        limit, maximum = _read_int(policy / "scaling_max_freq"), _read_int(policy / "cpuinfo_max_freq")
        if limit and maximum and limit < maximum:
            return f"CPU clock limited to {limit / 1e6:.1f} of {maximum / 1e6:.1f} GHz"
    return ""


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _read_int(path: Path) -> int | None:
    try:
        return int(_read(path))
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \t\r\n\0")
    except OSError:
        return ""


# glibc's <malloc.h>; 32 MB is the largest threshold that it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 * 1024 * 1024


def keep_freed_memory() -> None:
    """Let malloc reuse the memory of one image for the next.

    By default glibc gives buffers of an image's size back to the system and gets them anew, page by page, for every
    message, copy and activation: ten times the cost of copying an image. Does nothing where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 4 * _KEPT_BYTES)


def return_freed_memory() -> None:
    """Give the system what loading left behind: as much as the weights took, which `keep_freed_memory` would keep.

    Does nothing where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


WINDOW_S = 1.0
"""Over so long the others' use of cores is averaged."""
# What others did long ago says nothing about the next frame: a window of so many seconds counts only if this process
# computed for this share of it, as it does with frames that take seconds.
_LONG_S, _AT_WORK = 3.0, 0.5
# A core of which others use more than the first share is left to them; when they use less than the second, it is taken
# back. Waiting costs several times what a thread brings, so a third is enough.
_LEAVE, _TAKE_BACK = 0.35, 0.2


class OthersMeter:
    """How many cores other processes use.

    Args:
        others_s: seconds that they have computed; None where the system does not tell.
        clock: gives monotonic seconds.
    """

    def __init__(
        self, others_s: Callable[[], float | None] = others_seconds, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._others_s, self._clock = others_s, clock
        self._start = clock(), others_s()
        self._cores: float | None = None

    def cores(self) -> float | None:
        """Cores that they used on average in the last window of a second or more; None while nobody knows."""
        (start_s, before_s), now_s = self._start, self._clock()
        if now_s - start_s >= WINDOW_S:
            after_s = self._others_s()
            self._start = now_s, after_s
            known = before_s is not None and after_s is not None
            self._cores = max(after_s - before_s, 0.0) / (now_s - start_s) if known else None  # type: ignore[operator]
        return self._cores


_beside_cores = 0


def compute_beside(cores: int) -> None:
    """Say how many cores this process uses beside its engine; an engine that shares cores leaves them alone.

    With `fill_frames`, `sim_tiny` on two of two cores fell from 15 to 10 frames a second; on one it kept 14 of them.
    """
    global _beside_cores
    _beside_cores = cores


class CoreShare:
    """Counts what other processes compute, and says how many threads are left.

    Threads of one operation wait for each other at its end. When another process takes a core from one of them, all
    wait, a few hundred times in a frame: with two threads on two cores, one of which another process burned, frames of
    50 ms took 270 ms; with one thread 66 ms, as without that process. So an engine leaves to others the cores they use.

    Args:
        most: threads when nobody else computes.
        cores: how many this process may run on.
        busy_s: seconds that these cores have computed, for whomever; None where the system does not tell.
        own_s: seconds of these that were for this process.
        clock: gives monotonic seconds.
    """

    def __init__(
        self, most: int, cores: int | None = None, busy_s: Callable[[], float | None] = busy_seconds,
        own_s: Callable[[], float] = time.process_time, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._most = most
        self._cores = usable_cores() if cores is None else cores
        self._busy_s, self._own_s, self._clock = busy_s, own_s, clock
        self._threads = most
        self._window = self._read()
        self.others = 0.0
        """Cores that others used in the last window."""

    def threads(self) -> int:
        """Threads to compute the next frame with, 1 to `most`; to be asked before every frame."""
        elapsed_s = self._clock() - self._window[0]
        if elapsed_s < WINDOW_S:
            return self._threads
        (started_s, busy_s, own_s), self._window = self._window, self._read()
        now_s, busy_now_s, own_now_s = self._window
        if busy_s is None or busy_now_s is None:
            return self._threads
        if elapsed_s > _LONG_S and own_now_s - own_s < _AT_WORK * elapsed_s:
            return self._threads
        self.others = max((busy_now_s - busy_s - (own_now_s - own_s)) / (now_s - started_s), 0.0)
        self._threads = min(max(self._threads, self._left(_TAKE_BACK)), self._left(_LEAVE))
        return self._threads

    def _left(self, share: float) -> int:
        """Threads for the cores of which others use at most `share`."""
        return min(max(int(self._cores - _beside_cores - self.others + share), 1), self._most)

    def _read(self) -> tuple[float, float | None, float]:
        return self._clock(), self._busy_s(), self._own_s()


_PR_SET_NAME = 15  # <linux/prctl.h>


class CoreTeam:
    """Gives the threads of one operation a core each, while they are as many as this process has cores.

    After a pause the system may wake them all on one core, and spreads them only after some milliseconds of work; until
    then each waits for what another on its core has to compute first. On two virtual cores, frames of 10 ms that came 5
    times a second took 22 to 25 ms; with a core for each thread, 11 at most. Where threads are fewer than cores, the
    system places them: it knows which cores nobody uses.

    OpenMP makes a team of threads for each thread that computes, and which these are is told by the name that they
    inherit. So a team is to be made before its thread has computed anything; of one made later nothing is known, and
    its threads are left alone.

    Args:
        compute: an operation of the calling thread in which so many threads take part; makes those that are missing,
            and no others.
        threads: how many to make at first.
    """

    def __init__(self, compute: Callable[[int], object], threads: int) -> None:
        self._compute = compute
        self._owner = threading.get_native_id()
        self._allowed: set[int] = set()
        self._home: set[int] = set()
        """The core that the others leave to the thread that computes; empty while the system places all of them."""
        self._gather(threads)

    def resize(self, threads: int) -> None:
        """Place the threads, of which operations have so many from now on; before the first call the system does."""
        members = self._gather(threads)
        self._allowed, self._home = _affinity(), set()
        cores = [self._allowed] * len(members)
        if 1 < threads == len(self._allowed) == len(members) + 1:
            self._home, *cores = ({core} for core in sorted(self._allowed))
        for member, allowed in zip(members, cores, strict=True):
            _place(member, allowed)

    def _gather(self, threads: int) -> list[int]:
        """The other threads of the team, after those that were missing have been made."""
        name, mark = _thread_name(self._owner), f"team-{self._owner}"
        _name_this_thread(mark)
        try:
            self._compute(threads)
        finally:
            _name_this_thread(name)
        return [task for task in _own_tasks() if task != self._owner and _thread_name(task) == mark]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Compute on the core that the others leave; afterwards the calling thread may move as before."""
        if not self._home or _affinity() != self._allowed or threading.get_native_id() != self._owner:
            yield
            return
        _place(self._owner, self._home)
        try:
            yield
        finally:
            _place(self._owner, self._allowed)


def _own_tasks() -> list[int]:
    return [int(path.name) for path in _glob(_ROOT / "proc/self/task", "*")]


def _thread_name(task: int) -> str:
    return _read(_ROOT / f"proc/self/task/{task}/comm")


def _name_this_thread(name: str) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _place(task: int, cores: set[int]) -> None:
    # A core may have been taken from this process, and a thread may have ended: the system places it then.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(task, cores)
