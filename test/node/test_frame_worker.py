"""Newest frame wins, nothing is lost uncounted, and the thread outlives bad frames."""

from __future__ import annotations

import threading

from clustvit_ros.node.frame_worker import FrameWorker, LatestSlot

WAIT_S = 10.0


def test_newest_wins_and_drops_are_counted() -> None:
    slot: LatestSlot[int] = LatestSlot()
    for value in range(5):
        slot.put(value)
    assert slot.take(0) == 4
    assert slot.take(0) is None
    assert (slot.received, slot.dropped) == (5, 4)


def test_close_wakes_the_waiting_taker_and_drops_what_is_held() -> None:
    slot: LatestSlot[int] = LatestSlot()
    taken: list[int | None] = []
    thread = threading.Thread(target=lambda: taken.append(slot.take()))
    thread.start()
    slot.close()
    thread.join(WAIT_S)
    assert taken == [None]
    slot.reopen()
    slot.put(1)
    slot.close()
    assert slot.dropped == 1


def test_worker_goes_on_after_a_fault() -> None:
    slot: LatestSlot[str] = LatestSlot()
    handled, faults = [], []
    done = threading.Event()

    def handle(item: str) -> None:
        handled.append(item)
        if item == "bad":
            raise ValueError("bad frame")
        done.set()

    def on_fault(error: Exception) -> None:
        faults.append(str(error))
        slot.put("good")

    worker = FrameWorker(slot, handle, on_fault)
    worker.start()
    slot.put("bad")
    assert done.wait(WAIT_S)
    assert worker.stop(WAIT_S)
    assert (handled, faults) == (["bad", "good"], ["bad frame"])


def test_slow_worker_gets_only_the_newest() -> None:
    slot: LatestSlot[int] = LatestSlot()
    started, go_on, finished = threading.Event(), threading.Event(), threading.Event()
    handled = []

    def handle(item: int) -> None:
        handled.append(item)
        started.set()
        go_on.wait(WAIT_S)
        if item == 9:
            finished.set()

    worker = FrameWorker(slot, handle, lambda error: None)
    worker.start()
    slot.put(0)
    assert started.wait(WAIT_S)
    for value in range(1, 10):
        slot.put(value)
    go_on.set()
    assert finished.wait(WAIT_S)
    assert worker.stop(WAIT_S)
    assert handled == [0, 9]
    assert slot.received == len(handled) + slot.dropped


def test_stop_reports_a_busy_thread() -> None:
    slot: LatestSlot[int] = LatestSlot()
    started, go_on = threading.Event(), threading.Event()

    def handle(_item: int) -> None:
        started.set()
        go_on.wait(WAIT_S)

    worker = FrameWorker(slot, handle, lambda error: None)
    worker.start()
    slot.put(0)
    assert started.wait(WAIT_S)
    assert not worker.stop(timeout_s=0.01)
    assert worker.running
    go_on.set()
    assert worker.stop(WAIT_S)
