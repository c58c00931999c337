"""How many threads to compute with, when other processes want cores too.

Threads of one operation wait for each other at its end. When another process takes a core from one of them, all wait,
a few hundred times in a frame: with two threads on two cores, one of which another process burned, frames of 50 ms took
270 ms; with one thread 66 ms, as without that process. So an engine leaves to others the cores they use.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from clustvit_ros.engine.machine import busy_seconds, usable_cores

WINDOW_S = 1.0
"""Over so long the others' use of cores is averaged."""
# What others did long ago says nothing about the next frame: a window of so many seconds counts only if this process
# computed for this share of it, as it does with frames that take seconds.
_LONG_S, _AT_WORK = 3.0, 0.5
# A core of which others use more than the first share is left to them; when they use less than the second, it is taken
# back. Waiting costs several times what a thread brings, so a third is enough.
_LEAVE, _TAKE_BACK = 0.35, 0.2


class CoreShare:
    """Counts what other processes compute, and says how many threads are left.

    Args:
        most: threads when nobody else computes.
        cores: how many this process may run on.
        busy_s: seconds that these cores have computed, for whomever; None where the system does not tell.
        own_s: of these, seconds for this process.
        clock: in seconds.
    """

    def __init__(
        self,
        most: int,
        cores: int | None = None,
        busy_s: Callable[[], float | None] = busy_seconds,
        own_s: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
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
        return min(max(int(self._cores - self.others + share), 1), self._most)

    def _read(self) -> tuple[float, float | None, float]:
        return self._clock(), self._busy_s(), self._own_s()
