# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`fill_frames` without a node around it: which frames are filled, with what, and how each is counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from sensor_msgs.msg import Image
from test_filling import plane, view
from test_frame import Bench

from clustvit_ros.node.camera import Fate, Frame


class Filling(Bench):
    """A session whose filler is open; frames come one by one, and are followed before the next one comes."""

    def __init__(self, **values: Any) -> None:
        super().__init__("mask", fill_frames=True, **values)
        self.warnings: list[str] = []
        self.logger.warning = lambda text, **_throttle: self.warnings.append(text)  # type: ignore[attr-defined]
        self.filler.open()

    def offer(self, second: int, idle: bool = False, **fate: Any) -> Frame:
        frame = replace(self.frame(view(plane(), second), second), fate=Fate(**fate))
        self.filler.offer(frame, idle)
        time.sleep(0.1)
        return frame

    @property
    def stamps(self) -> list[int]:
        """Seconds of the masks that are out."""
        return [message.header.stamp.sec for message in self.published["mask"].messages]


@pytest.fixture
def filling() -> Iterator[Filling]:
    bench = Filling()
    yield bench
    bench.filler.close()


def test_an_idle_engines_own_mask_is_waited_for_until_the_next_frame_comes(filling: Filling) -> None:
    filling.session.handle(filling.offer(1))
    own = filling.offer(2, idle=True)
    assert filling.stamps == [1], "flow was done before the engine's thread woke up"
    filling.session.handle(own)
    assert filling.stamps == [1, 2]
    filling.offer(3, idle=True)
    filling.offer(4)
    assert filling.stamps == [1, 2, 3, 4], "the engine did something else, and then had no time"
    filling.offer(5, idle=True, over_rate=True)
    assert filling.stamps == [1, 2, 3, 4, 5], "the engine does not get it"
    waiting = filling.offer(6, idle=True)
    filling.filler.give_up(waiting)
    assert not filling.camera.ledger.dropped
    filling.filler.close()
    counts = filling.camera.ledger.counts()
    assert (counts["segmented"], counts["filled"], counts["dropped"]) == (2, 3, 1)


@pytest.mark.parametrize("times_ms", [[33 * index for index in range(24)] * 9, [7] * 200])
def test_a_recording_in_a_loop_or_a_stamp_that_never_moves_ends_no_masks(times_ms: list[int], filling: Filling) -> None:
    start_s, taken_s = time.monotonic() - 0.033 * len(times_ms), []
    for index, time_ms in enumerate(times_ms):
        frame = filling.frame(view(plane(), 0))
        frame.message.header.stamp.nanosec = 1_000_000 * time_ms
        frame = replace(frame, fate=Fate(arrival_s=start_s + 0.033 * index))
        if filling.filler.offer(frame):
            taken_s.append(frame.fate.arrival_s)
    assert max(np.diff(taken_s)) < 1.1 and time.monotonic() - taken_s[-1] < 1.2
    assert "their stamps go back or repeat" in filling.filler.problem_of("")
    assert {"left out" in text for text in filling.warnings} == {True, False}


def test_a_mask_that_comes_after_many_pictures_is_carried_and_one_after_too_many_is_told(
    filling: Filling, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = filling.offer(1)
    for second in range(2, 50):
        filling.filler.offer(filling.frame(view(plane(), second), second))
        time.sleep(0.01)
    filling.session.handle(slow)
    filling.offer(50)
    assert filling.stamps == [1, 50] and not filling.warnings
    monkeypatch.setattr("clustvit_ros.node.filling._MEMORY_FRAMES", 3)
    filling.filler.open()
    slow = filling.offer(51)
    for second in range(52, 56):
        filling.offer(second)
    filling.session.handle(slow)
    filling.offer(56)
    assert filling.stamps == [1, 50, 51]
    assert "the engine's mask came more than 3 pictures after its own" in filling.warnings[-1]


def test_frames_of_a_camera_that_its_subscriber_leaves_are_counted_once() -> None:
    bench = Filling(lazy=True)
    bench.session.handle(bench.offer(1))
    frames = [bench.offer(second) for second in (2, 3)]
    assert bench.stamps == [1, 2, 3]
    bench.published["mask"].subscribers = 0
    for frame in (*frames, bench.frame(view(plane(), 4), 4)):
        bench.session.handle(frame)
    counts = bench.camera.ledger.counts()
    assert (counts["segmented"], counts["filled"], counts["unwatched"]) == (1, 2, 1)
    bench.filler.close()


def test_opencv_has_its_threads_back_when_no_frame_is_filled() -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        bench = Filling()
        bench.offer(1)
        assert cv2.getNumThreads() == 1
        bench.filler.close()
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_a_frame_that_cannot_be_filled_is_given_up_and_later_ones_are_filled(filling: Filling) -> None:
    """A picture of 32,767 columns is one: what OpenCV remaps must have fewer."""
    publish = filling.published["mask"].publish

    def publish_but(message: Image) -> None:
        if message.header.stamp.sec == 2:
            raise ValueError("cannot be filled")
        publish(message)

    filling.published["mask"].publish = publish_but  # type: ignore[method-assign]
    filling.session.handle(filling.offer(1))
    filling.offer(2, taken_s=time.monotonic())  # the engine is at it, and stays there
    for second in range(3, 6):
        filling.offer(second)
    assert filling.stamps == [1, 4, 5]
