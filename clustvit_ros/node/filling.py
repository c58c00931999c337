# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Masks for frames that come while the engine is busy: the newest engine result, carried to them (`fill_frames`).

A thread beside the engine's follows every picture. A frame whose own mask will not be out before the next frame comes
gets a carried one at once. Masks leave in the order of their frames: an engine's mask that has been overtaken is not
published, it is what later frames get, brought forward to the present.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import cv2

from clustvit_ros.engine.carrying import Carrier, carry
from clustvit_ros.engine.machine import compute_beside
from clustvit_ros.errors import ImageError
from clustvit_ros.node.camera import Camera, Frame
from clustvit_ros.node.frame import Decoded, Made, MaskPublisher, decode, is_watched

_LOG_PERIOD_S = 5.0
# Frames that wait to be followed; with more, the oldest goes unfilled.
_MOST_WAITING = 2
# An engine's mask that comes later than so many pictures is not carried; 0.2 MB are kept of each until it comes.
_MEMORY_FRAMES = 128
# Further back, stamps are those of another recording or clock; and a mask is not carried over a longer pause.
_RESTART_S = 1.0
_TOLD_S = 2.0
_SAMPLES = 9
# After so long without a frame the engine may have the core back.
_IDLE_S = 1.0


class _Lane:
    """One camera's frames in their order."""

    def __init__(self, camera: Camera) -> None:
        self.camera = camera
        self.lock = threading.Lock()
        """Held while a mask is published."""
        self.newest_out = -1
        """Number of the newest frame whose mask is out, or withheld for good."""
        # The executor's.
        self.stamp_ns = 0
        self.arrival_s: float | None = None
        self.left_out_s = -math.inf
        # The filling thread's; `engine_s` and `period_s` are only appended to by others.
        self.carrier: Carrier[tuple[Frame, Made]] = Carrier(_MEMORY_FRAMES)
        self.left: tuple[Decoded, float] | None = None
        self.engine_s: deque[float] = deque(maxlen=_SAMPLES)
        self.period_s: deque[float] = deque(maxlen=_SAMPLES)

    def engine_is_in_time(self, frame: Frame) -> bool:
        """Whether the engine's own mask is expected before the camera's next frame."""
        fate = frame.fate
        # Flow may be done before the thread of an idle engine has woken up.
        taken_s = fate.arrival_s if fate.taken_s is None and fate.expected and not fate.dropped else fate.taken_s
        if taken_s is None:
            return False
        if not self.engine_s or not self.period_s:
            return True
        return taken_s + statistics.median(self.engine_s) < fate.arrival_s + statistics.median(self.period_s)


class FrameFiller:
    """Fills frames of all cameras of a node.

    Args:
        cameras: name -> camera; lanes are made for those that are there when they are first asked for.
        publisher: publishes masks.
        logger: an rclpy logger.
        context_ok: False once ROS is shutting down: publishing then fails, and that is no fault.
    """

    def __init__(
        self, cameras: Mapping[str, Camera], publisher: MaskPublisher, logger: Any, context_ok: Callable[[], bool]
    ) -> None:
        self._cameras, self._publisher = cameras, publisher
        self._logger, self._context_ok = logger, context_ok
        self._lanes: dict[str, _Lane] = {}
        self._opencv_threads = cv2.getNumThreads()
        self._condition = threading.Condition()
        self._jobs: deque[tuple[_Lane, Frame, Made | None, bool]] = deque()
        self._thread: threading.Thread | None = None
        self._open = False
        self.used = False
        """Whether a frame may have been filled since `open`; until then, masks are in order by themselves."""

    def open(self) -> None:
        """Begin with cameras that are new, or start over."""
        with self._condition:
            self._lanes = {name: _Lane(camera) for name, camera in self._cameras.items()}
            self._jobs.clear()
            self._open, self.used = True, False

    def close(self) -> None:
        """Fill no more frames, and end the thread."""
        with self._condition:
            self._open, thread, self._thread = False, self._thread, None
            left, self._jobs = list(self._jobs), deque()
            self._condition.notify_all()
        for _, frame, result, _ in left:
            if result is None:
                self._leave(frame)
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)
        for lane in self._lanes.values():
            self._leave_waiting(lane)

    def offer(self, frame: Frame, engine_is_idle: bool = False) -> bool:
        """Take notice of a frame that has arrived, before anybody else gets it.

        Args:
            frame: the frame.
            engine_is_idle: whether it would be the engine's next, at once.

        Returns:
            False for a frame that the engine is not to get: there are more than `max_rate_hz`, or its mask would come
            after that of a later one.
        """
        lane = self._lanes.get(frame.camera)
        if lane is None or not lane.camera.parameters.fills or not is_watched(lane.camera):
            return not frame.fate.over_rate
        arrival_s, before_s = frame.fate.arrival_s, lane.arrival_s
        behind_s = (lane.stamp_ns - frame.stamp_ns) / 1e9
        # Also where all that came for so long has been left out: a short recording in a loop, a stamp that never moves.
        restarts = before_s is not None and arrival_s - before_s > _RESTART_S
        if frame.stamp_ns and lane.stamp_ns and behind_s >= 0.0:
            name = f"{frame.camera}: " if frame.camera else ""
            restarts |= behind_s > _RESTART_S
            if not restarts:
                lane.left_out_s = arrival_s
                self._logger.warning(
                    f"{name}an image's stamp is {1000 * behind_s:.1f} ms before its predecessor's, or the same: it is "
                    "left out, masks come in the order of stamps; does a second camera publish on this topic?",
                    throttle_duration_sec=_LOG_PERIOD_S,
                )
                return False
            self._logger.warning(
                f"{name}stamps went back by {behind_s:.1f} s: masks start over from here",
                throttle_duration_sec=_LOG_PERIOD_S,
            )
        self.used, lane.stamp_ns, lane.arrival_s = True, frame.stamp_ns, arrival_s
        if before_s is not None and not restarts:
            lane.period_s.append(arrival_s - before_s)
        frame.fate.expected = engine_is_idle and not frame.fate.over_rate
        self._put(lane, frame, None, restarts)
        return not frame.fate.over_rate

    def problem_of(self, camera: str) -> str:
        """Why frames of a camera were left out of late, in a sentence; empty where none were."""
        lane = self._lanes.get(camera)
        if lane is None or time.monotonic() - lane.left_out_s > _TOLD_S:
            return ""
        return (
            "images are left out, their stamps go back or repeat, and masks come in the order of stamps (fill_frames): "
            "does a second camera publish on this topic, or a recording in a loop?"
        )

    def give_up(self, frame: Frame) -> None:
        """The engine will not see this frame; it is dropped unless it gets a carried mask."""
        fate = frame.fate
        with self._condition:
            fate.dropped = True
            dropped = fate.left
        if dropped:
            self._cameras[frame.camera].ledger.drop(fate.over_rate)

    @contextmanager
    def turn(self, frame: Frame) -> Iterator[bool]:
        """While an engine's mask is published: gives whether it may be, or has been overtaken."""
        lane = self._lanes.get(frame.camera)
        if lane is None:
            yield True
            return
        with lane.lock:
            is_next = frame.number > lane.newest_out
            yield is_next
            if is_next:
                lane.newest_out = frame.number

    def end(self, frame: Frame) -> bool:
        """Settle that a frame gets no carried mask any more.

        Returns:
            Whether it has got one, and been counted, before.
        """
        with self.turn(frame):
            frame.fate.ended = True
        return frame.fate.filled

    def learn(self, frame: Frame, result: Made) -> None:
        """An engine is done with a frame: what it made is carried from now on."""
        lane = self._lanes.get(frame.camera)
        if lane is not None and lane.camera.parameters.fills:
            if frame.fate.taken_s is not None:
                lane.engine_s.append(time.monotonic() - frame.fate.taken_s)
            self._put(lane, frame, result, False)

    def _put(self, lane: _Lane, frame: Frame, result: Made | None, restarts: bool) -> None:
        surplus: Frame | None = None
        with self._condition:
            if self._open:
                if result is None:
                    frame.fate.left = False
                    waiting = [job for job in self._jobs if job[0] is lane and job[2] is None]
                    if len(waiting) >= _MOST_WAITING:
                        self._jobs.remove(waiting[0])
                        surplus = waiting[0][1]
                self._jobs.append((lane, frame, result, restarts))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="filling", daemon=True)
                    self._thread.start()
                self._condition.notify_all()
        if surplus is not None:
            self._leave(surplus)

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._condition.wait_for(self._is_called, _IDLE_S):
                    self._occupy(False)
                    self._condition.wait_for(self._is_called)
                if self._thread is not threading.current_thread():
                    self._occupy(False)
                    return
                lane, frame, result, restarts = self._jobs.popleft()
            self._occupy(True)
            try:
                if result is not None:
                    self._adopt(lane, frame, result)
                else:
                    self._follow(lane, frame, restarts)
            except Exception as error:  # one frame's fault is no reason to leave the others unfilled
                self._leave(frame)
                if self._context_ok():
                    self._logger.error(
                        f"a frame could not be filled: {type(error).__name__}: {error}",
                        throttle_duration_sec=_LOG_PERIOD_S,
                    )

    def _is_called(self) -> bool:
        return bool(self._jobs) or self._thread is not threading.current_thread()

    def _occupy(self, one_core: bool) -> None:
        """Take one core beside the engine, which has the others, or leave all of them to it."""
        compute_beside(int(one_core))
        cv2.setNumThreads(1 if one_core else self._opencv_threads)  # of the whole process

    def _adopt(self, lane: _Lane, frame: Frame, result: Made) -> None:
        if not lane.carrier.adopt(frame.number, (frame, result)) and lane.carrier.has_forgotten(frame.number):
            name = f"{frame.camera}: " if frame.camera else ""
            self._logger.warning(
                f"{name}fill_frames: the engine's mask came more than {_MEMORY_FRAMES} pictures after its own, and is "
                "not carried; bound what the engine does (latency_budget_ms, input_scale), or the camera's rate",
                throttle_duration_sec=_LOG_PERIOD_S,
            )

    def _follow(self, lane: _Lane, frame: Frame, restarts: bool) -> None:
        if restarts:
            lane.carrier.forget()
            self._leave_waiting(lane)
        try:
            one = decode(frame, lane.camera, lane.camera.parameters)
        except ImageError:
            self._leave(frame)  # whoever segments it says what is wrong with it
            return
        left, lane.left = lane.left, None
        if left is not None:
            # The engine is not done with it, and now it is too late for that: masks leave in order.
            self._fill(lane, *left)
        start_s = time.perf_counter()
        followed = lane.carrier.see(frame.number, one.image)
        flow_ms = (time.perf_counter() - start_s) * 1000.0
        if not followed:
            name = f"{frame.camera}: " if frame.camera else ""
            self._logger.warning(
                f"{name}an image cannot be followed from the one before (another scene, another size, or nothing to be "
                "seen): frames are filled again after the engine's next mask",
                throttle_duration_sec=_LOG_PERIOD_S,
            )
        if lane.engine_is_in_time(frame):
            lane.left = one, flow_ms
        else:
            self._fill(lane, one, flow_ms)

    def _fill(self, lane: _Lane, one: Decoded, flow_ms: float) -> None:
        frame, source, parameters = one.frame, lane.carrier.source, lane.camera.parameters
        if source is None or source.carried >= parameters.max_filled_frames or not parameters.fills:
            self._leave(frame)
            return
        (origin, result), start_s = source.result, time.perf_counter()
        maps = carry(result.masks, source.motion, result.plan.parameters.confidence_threshold)
        flow_ms += (time.perf_counter() - start_s) * 1000.0
        with lane.lock:
            overtaken = frame.number <= lane.newest_out or frame.fate.ended
            if not overtaken:
                age_ms, publish_ms = self._publisher.publish(one, result.plan, maps, 0, result.grouping, engine_ms=0.0)
                lane.newest_out, frame.fate.filled = frame.number, True
        if overtaken:  # by the engine, with this frame or a later one
            self._leave(frame)
            return
        source.carried += 1
        missed, mask = result.misses.judge(result.plan, None, age_ms), maps.mask[0]
        record = replace(
            result.record, outcome="filled" if publish_ms is not None else "late", filled=True,
            filled_frames=source.carried, filled_age_ms=(frame.time_ns - origin.time_ns) / 1e6, flow_ms=flow_ms,
            image_size=(one.image.shape[0], one.image.shape[1]),
            mask_size=(mask.shape[0], mask.shape[1]), batch=1, deadline_missed=missed,
            deadline_misses=result.misses.total, decode_ms=one.decode_ms, publish_ms=publish_ms or 0.0,
            arrival_age_ms=frame.arrival_age_ms or 0.0, age_ms=age_ms, stamped=frame.stamp_ns != 0,
        )  # fmt: skip
        ledger = lane.camera.ledger
        ledger.add(record)
        if lane.camera.outputs.wanted("stats"):
            self._publisher.publish_stats(one, result.device, "filled", ledger.frame_pairs(record))
        if publish_ms is not None:
            self._publisher.publish_views(one, maps, 0, result.grouping)

    def _leave(self, frame: Frame) -> None:
        """A frame is not filled: it is the engine's, or dropped."""
        with self._condition:
            frame.fate.left = True
            dropped = frame.fate.dropped
        if dropped:
            self._cameras[frame.camera].ledger.drop(frame.fate.over_rate)

    def _leave_waiting(self, lane: _Lane) -> None:
        waiting, lane.left = lane.left, None
        if waiting is not None:
            self._leave(waiting[0].frame)
