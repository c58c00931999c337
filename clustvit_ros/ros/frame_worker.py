"""Newest frame wins: a one-frame slot between the executor and the thread that segments. No ROS in here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class LatestSlot(Generic[T]):
    """Holds at most one item; a newer one replaces an older one that nobody took."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._item: T | None = None
        self._closed = False
        self._received = 0
        self._dropped = 0

    @property
    def received(self) -> int:
        """Items ever put."""
        return self._received

    @property
    def dropped(self) -> int:
        """Items that were replaced or cleared before anybody took them."""
        return self._dropped

    @property
    def idle(self) -> bool:
        """True while nothing waits to be taken and more may come."""
        return self._item is None and not self._closed

    def put(self, item: T) -> None:
        """Store `item` as the newest; never blocks."""
        with self._condition:
            self._received += 1
            self._dropped += self._item is not None
            self._item = item
            self._condition.notify()

    def take(self, timeout_s: float | None = None) -> T | None:
        """Remove and return the item.

        Args:
            timeout_s: seconds to wait for one; None waits for ever.

        Returns:
            The newest item, or None on timeout and once the slot is closed.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._closed or self._item is not None, timeout_s)
            if self._closed:
                return None
            item, self._item = self._item, None
            return item

    def close(self) -> None:
        """Drop what is held and wake whoever waits; later items are counted as dropped."""
        with self._condition:
            self._dropped += self._item is not None
            self._item = None
            self._closed = True
            self._condition.notify_all()

    def reopen(self) -> None:
        """Make a closed slot usable again; the counts go on."""
        with self._condition:
            self._dropped += self._item is not None
            self._item = None
            self._closed = False


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
