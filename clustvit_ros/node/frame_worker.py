"""Newest frame wins: a slot for each camera between the executor and the thread that segments. No ROS in here."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from clustvit_ros.policy import FairScheduler

T = TypeVar("T")

# Cameras that are triggered together arrive one after the other: each image takes the executor a few milliseconds.
_TOGETHER_S = 0.005


class LatestSlot(Generic[T]):
    """Holds at most one item for each camera; a newer one replaces an older one that nobody took.

    A camera whose last frame came together with another's is waited for, for 5 ms at most: only when both are there
    can the scheduler choose between them, or a batch be made of them.

    Args:
        scheduler: says whose turn it is; None where there is one camera, which then has no name.
        clock: monotonic seconds.
    """

    def __init__(self, scheduler: FairScheduler | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler or FairScheduler({"": 1.0})
        self._clock = clock
        self._condition = threading.Condition()
        self._items: dict[str, T] = {}
        self._closed = False
        self._received: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._arrived_s: dict[str, float] = {}
        self._partners: dict[str, set[str]] = {}

    @property
    def received(self) -> int:
        """Items ever put."""
        return self._received.total()

    @property
    def dropped(self) -> int:
        """Items that were replaced or cleared before anybody took them."""
        return self._dropped.total()

    @property
    def idle(self) -> bool:
        """True while nothing waits to be taken and more may come."""
        return not self._items and not self._closed

    def counts_of(self, camera: str) -> tuple[int, int]:
        """A camera's items: (received, dropped)."""
        return self._received[camera], self._dropped[camera]

    def put(self, item: T, camera: str = "") -> None:
        """Store `item` as the camera's newest; never blocks."""
        with self._condition:
            self._received[camera] += 1
            if self._closed:
                self._dropped[camera] += 1
                return
            self._dropped[camera] += camera in self._items
            self._items[camera] = item
            self._note_arrival(camera)
            self._condition.notify()

    def take(self, timeout_s: float | None = None) -> T | None:
        """Remove and return the item of the camera whose turn it is.

        Args:
            timeout_s: seconds to wait for one; None waits for ever.

        Returns:
            The item, or None on timeout and once the slot is closed.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._closed or bool(self._items), timeout_s)
            missing = {partner for camera in self._items for partner in self._partners[camera]} - self._items.keys()
            if missing:
                self._condition.wait_for(lambda: self._closed or missing <= self._items.keys(), _TOGETHER_S)
            if not self._items:
                return None
            return self._items.pop(self._scheduler.choose(self._items))

    def take_rest(self) -> list[T]:
        """Remove and return what waits as well, to be handled together with the item just taken."""
        with self._condition:
            for camera in self._items:
                self._scheduler.join(camera)
            rest = list(self._items.values())
            self._items.clear()
            return rest

    def served(self, camera: str, age_ms: float) -> None:
        """Tell the scheduler how long an item took from its arrival to its publication."""
        with self._condition:
            self._scheduler.served(camera, age_ms)

    def set_weight(self, camera: str, weight: float) -> None:
        """Change a camera's share of turns."""
        with self._condition:
            self._scheduler.set_weight(camera, weight)

    def close(self) -> None:
        """Drop what is held and wake whoever waits; later items are counted as dropped."""
        with self._condition:
            self._clear()
            self._closed = True
            self._condition.notify_all()

    def reopen(self) -> None:
        """Make a closed slot usable again; the counts go on."""
        with self._condition:
            self._clear()
            self._closed = False

    def _clear(self) -> None:
        self._dropped.update(self._items.keys())
        self._items.clear()

    def _note_arrival(self, camera: str) -> None:
        now_s, previous_s = self._clock(), self._arrived_s.get(camera)
        self._partners[camera] = {
            other
            for other, arrived_s in self._arrived_s.items()
            if previous_s is not None and other != camera and abs(arrived_s - previous_s) <= _TOGETHER_S
        }
        self._arrived_s[camera] = now_s


class FrameWorker(Generic[T]):
    """One thread that handles the newest item of a slot, again and again.

    Args:
        slot: where items come from.
        handle: called in the worker's thread with each item.
        on_fault: called in the worker's thread with every exception that `handle` raises; the worker goes on.
    """

    def __init__(self, slot: LatestSlot[T], handle: Callable[[T], None], on_fault: Callable[[Exception], None]) -> None:
        self._slot = slot
        self._handle = handle
        self._on_fault = on_fault
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """True between `start` and the end of the thread."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; does nothing when it runs already."""
        if self.running:
            return
        self._slot.reopen()
        # Daemon: an engine call that hangs must not keep a process alive that was told to end.
        self._thread = threading.Thread(target=self._run, name="segmentation-worker", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End the thread after the item it works on.

        Returns:
            False when it was still busy after `timeout_s` seconds.
        """
        self._slot.close()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._slot.take()) is not None:
            try:
                self._handle(item)
            except Exception as error:  # the thread must outlive whatever one frame does
                self._on_fault(error)
