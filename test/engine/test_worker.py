# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Newest frame wins, nothing is lost uncounted, and one worker at a time is in charge."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.engine.worker import DeviceLost, EngineWorker, FrameQueue, FrameSlot

WAIT_S = 10.0


@pytest.fixture
def drops() -> Counter[str]:
    return Counter()


@pytest.fixture
def slot(drops: Counter[str]) -> Iterator[FrameSlot[int]]:
    slot: FrameSlot[int] = FrameSlot(lambda _frame, camera: drops.update([camera]))
    slot.open()
    slot.hand_over("me")
    yield slot
    slot.hand_over(None)  # or workers would wait for ever


def take(slot: FrameSlot, count: int = 1) -> list:
    taken = []
    for _ in range(count):
        taken.append(slot.take("me"))
        slot.done()
    return taken


def test_newest_wins_and_drops_are_counted(slot: FrameSlot[int], drops: Counter[str]) -> None:
    for value in range(5):
        slot.put(value)
    assert take(slot) == [4] and slot.empty
    assert drops.total() == 4
    slot.put(5)
    assert slot.close(0.0)
    slot.put(6)
    assert drops.total() == 6
    slot.open()
    slot.put(7)
    assert take(slot) == [7]


def test_the_camera_that_has_waited_longest_is_next_and_none_starves(slot: FrameSlot, drops: Counter[str]) -> None:
    served: Counter[str] = Counter()
    for turn in range(30):
        # One camera is three times as fast, and its frames are always the newest.
        for name in ("fast", "slow", "fast", "fast"):
            slot.put((name, turn), name)
        served[take(slot)[0][0]] += 1
    assert served == {"fast": 15, "slow": 15}
    assert drops["fast"] > 4 * drops["slow"]
    assert slot.take_others() and slot.empty


def test_a_frame_that_is_put_back_is_next_unless_a_newer_one_has_come(slot: FrameSlot, drops: Counter[str]) -> None:
    slot.put(1, "front")
    taken = slot.take("me")
    slot.put(2, "rear")
    slot.put_back(taken, "front")
    assert take(slot, 2) == [1, 2] and not drops
    slot.put(3, "front")
    slot.put_back(1, "front")
    assert take(slot) == [3] and drops == {"front": 1}


def test_a_queue_keeps_order_and_counts_what_it_cannot_hold(drops: Counter[str]) -> None:
    queue: FrameQueue[bytes] = FrameQueue(lambda _frame, camera: drops.update([camera]), 10, len)
    queue.open()
    queue.hand_over("me")
    for item, camera in ((b"aaaa", "front"), (b"bbbb", "rear"), (b"cccc", "front"), (b"dd", "rear")):
        queue.put(item, camera)
    assert drops == {"front": 1}
    first = queue.take("me")
    queue.put_back(first, "front")
    assert queue.take_others() == []
    assert take(queue, 3) == [b"aaaa", b"bbbb", b"dd"] and queue.empty
    queue.put(b"larger than the limit")
    assert take(queue) == [b"larger than the limit"]
    queue.put(b"left", "rear")
    queue.close(0.0)
    assert drops == {"front": 1, "rear": 1}


class Session:
    """Notes what it handles; blocks, fails or loses its device on demand."""

    def __init__(self, slot: FrameSlot[str]) -> None:
        self.engine = ScriptedEngine()
        self.slot = slot
        self.handled: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.idle_calls = 0

    def handle(self, frame: str) -> None:
        if frame == "lost":
            self.slot.put_back("saved")
            raise DeviceLost("gone")
        self.handled.append(frame)
        self.go_on.wait(WAIT_S)

    def use_idle_time(self, is_free: Callable[[], bool]) -> None:
        self.idle_calls += 1


def start(slot: FrameSlot[str], session: Session, charge: bool = True) -> tuple[EngineWorker[str], list]:
    heard: list = []

    def loaded(worker: EngineWorker[str]) -> None:
        heard.append(worker.error)
        if charge:
            slot.hand_over(worker)

    worker = EngineWorker(lambda: session, slot, loaded, lambda _w: None, lambda _w, error: heard.append(str(error)))
    return worker, heard


def wait_for(condition: Callable[[], bool]) -> None:
    event = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if condition():
            return
        event.wait(0.005)
    pytest.fail("not in time")


def test_a_slow_worker_gets_only_the_newest_and_frees_its_engine_when_replaced(slot, drops) -> None:
    session = Session(slot)
    session.go_on.clear()
    worker, heard = start(slot, session)
    slot.put("first")
    wait_for(lambda: session.handled == ["first"])
    for name in ("second", "third", "fourth"):
        slot.put(name)
    assert slot.busy and not slot.close(0.01), "a busy worker is told"
    slot.open()
    slot.put("fourth")
    successor = Session(slot)
    _, _ = start(slot, successor)
    wait_for(lambda: worker.session is None or slot.busy)
    assert successor.handled == [], "not before its predecessor's last frame is out"
    session.go_on.set()
    wait_for(lambda: successor.handled == ["fourth"])
    assert worker.join(WAIT_S) and worker.session is None
    assert session.handled == ["first"] and session.idle_calls == 1 and heard == [None]
    slot.hand_over(None)


def test_a_lost_device_leaves_the_frame_for_the_next(slot: FrameSlot[str]) -> None:
    worker, heard = start(slot, Session(slot))
    slot.put("lost")
    assert worker.join(WAIT_S)
    assert heard == [None, "gone"]
    successor = Session(slot)
    start(slot, successor)
    wait_for(lambda: successor.handled == ["saved"])
    slot.hand_over(None)


def test_a_worker_that_is_not_put_in_charge_ends_by_itself(slot: FrameSlot[str]) -> None:
    session = Session(slot)
    worker, _ = start(slot, session, charge=False)
    assert worker.join(WAIT_S)
    slot.put("frame")
    assert session.handled == []
