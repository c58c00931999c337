# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`fill_frames`: masks carried to the frames that come while the engine is busy, over real topics."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from robot import Robot, double, integer, mask_of
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from clustvit_ros.node.messages import image_message, stamp_ns

pytestmark = pytest.mark.ros

PERIOD_S = 1 / 30
SIZE = (120, 160)
ENGINE_MS = 100


@functools.cache
def plane(seed: int = 0) -> np.ndarray:
    """A textured plane whose brightness bands, the scripted engine's classes, are blobs."""
    rng = np.random.default_rng(seed)
    fine = cv2.GaussianBlur(rng.normal(0.0, 1.0, (400, 900)).astype(np.float32), (0, 0), 2.0)
    broad = cv2.GaussianBlur(rng.normal(0.0, 1.0, (400, 900)).astype(np.float32), (0, 0), 25.0)
    bands = np.digitize(broad, np.quantile(broad, (0.25, 0.5, 0.75))).astype(np.float32)
    grey = 64 * bands + 32 + np.clip(9 * fine / fine.std(), -28, 28)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def view(world: np.ndarray, index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.ascontiguousarray(world[100 : 100 + size[0], 60 + 3 * index : 60 + 3 * index + size[1]])


def boolean(name: str, value: bool) -> Parameter:
    return Parameter(name=name, value=ParameterValue(type=ParameterType.PARAMETER_BOOL, bool_value=value))


class Drive:
    """A node with a slow scripted engine, and a camera before it."""

    def __init__(self, client: Any, start_node: Callable[..., Any], namespace: str, *arguments: str) -> None:
        self.robot = Robot(
            client, start_node, namespace, "-p", f"scripted_latency_ms:={ENGINE_MS}", "-p", "merge_threshold:=1.0",
            "-p", "fill_frames:=true", "-p", "max_filled_frames:=50", *arguments,
        )  # fmt: skip
        self.client, self.sent = client, {}

    def run(self, pictures: Sequence[np.ndarray], headers: Sequence[Any] | None = None) -> list[Image]:
        """Send pictures at the camera's rate; the masks that came meanwhile and soon after."""
        first = len(self.robot.masks)
        next_s = time.monotonic()
        for index, pixels in enumerate(pictures):
            message = image_message(pixels, "rgb8", headers[index] if headers else self.robot.now())
            self.sent[stamp_ns(message)] = pixels
            self.robot.camera.publish(message)
            next_s = max(next_s + PERIOD_S, time.monotonic())  # late by a stall, a camera does not catch up
            self.client.spin_for(max(next_s - time.monotonic(), 0.001))
        self.client.spin_for(3 * ENGINE_MS / 1000)
        return self.robot.masks[first:]

    def warm(self) -> None:
        """The first mask is out, and how long the engine takes is known."""
        self.robot.segment(image_message(view(plane(), 0), "rgb8", self.robot.now()))
        self.run([view(plane(), 0)] * 12)

    def pairs(self, mask: Image) -> dict[str, str]:
        return self.robot.stats_of(mask)

    def right(self, mask: Image) -> float:
        """Share of pixels that are as the engine would have them."""
        return float((mask_of(mask) == self.sent[stamp_ns(mask)][..., 1] >> 6)[4:-4, 4:-4].mean())


@pytest.fixture(scope="module")
def drive(ros_client: Any, start_node: Callable[..., Any]) -> Drive:
    drive = Drive(ros_client, start_node, "/filled")
    drive.warm()
    return drive


def test_every_frame_gets_a_mask_in_order_that_is_right_and_soon(drive: Drive) -> None:
    pictures = [view(plane(), index) for index in range(45)]
    masks = drive.run(pictures)
    stamps = [stamp_ns(mask) for mask in masks]
    assert stamps == sorted(set(stamps))
    assert len(masks) >= 0.9 * len(pictures)
    pairs = [drive.pairs(mask) for mask in masks]
    filled = [p for p in pairs if p["filled"] == "true"]
    assert len(filled) > 0.7 * len(masks)
    assert statistics.median(drive.right(mask) for mask in masks) > 0.97
    # Standing still, the masks that consumers hold would be wrong: each picture is 3 pixels from the one before.
    assert (view(plane(), 0)[..., 1] >> 6 != view(plane(), 12)[..., 1] >> 6).mean() > 0.1
    ages = sorted(float(p["age_ms"]) for p in filled)
    assert ages[len(ages) // 2] < ENGINE_MS / 2
    for p in filled:
        assert p["published"] == "true" and float(p["flow_ms"]) > 0 and int(p["filled_frames"]) >= 1
        assert float(p["filled_age_ms"]) >= 0.9 * 1000 * PERIOD_S
        assert float(p["engine_ms"]) > ENGINE_MS * 0.9  # what the engine's own mask took, which is carried


@pytest.mark.parametrize("limit", [50, 1])
def test_every_frame_is_counted_once(drive: Drive, limit: int) -> None:
    """Also those that are neither filled, the limit being reached, nor in time with their own mask; the limit holds."""
    assert drive.robot.set(integer("max_filled_frames", limit))[0].successful
    before = drive.pairs(drive.robot.segment(image_message(view(plane(), 0), "rgb8", drive.robot.now())))
    masks = drive.run([view(plane(), index) for index in range(30)])
    after = drive.pairs(drive.robot.segment(image_message(view(plane(), 0), "rgb8", drive.robot.now())))

    def change(name: str) -> int:
        return int(after[f"frames_{name}"]) - int(before[f"frames_{name}"])

    fates = ("segmented", "filled", "dropped", "late", "rejected", "failed", "over_rate", "unwatched")
    assert change("received") - sum(map(change, fates)) in (-1, 0, 1)  # the last one was sent until its mask was there
    assert change("filled") > 5
    pairs = [drive.pairs(mask) for mask in masks]
    longest = max(int(p["filled_frames"]) for p in pairs if p["filled"] == "true")
    assert (longest == 1 and len(masks) < 22) if limit == 1 else longest > 1
    assert drive.robot.set(integer("max_filled_frames", 50))[0].successful


def test_what_belongs_to_a_mask_comes_with_the_frames_own_stamp(drive: Drive, ros_client: Any) -> None:
    robot = drive.robot
    names = {"confidence": Image, "clusters": Image, "overlay": Image, "camera_info": CameraInfo}
    others = {name: ros_client.collect(kind, f"/filled/segmentation/{name}") for name, kind in names.items()}
    info = ros_client.node.create_publisher(CameraInfo, "/filled/camera_info", 5)
    ros_client.spin_until(lambda: info.get_subscription_count() > 0)
    calibration = CameraInfo(height=SIZE[0], width=SIZE[1], k=[100.0, 0.0, 80.0, 0.0, 100.0, 60.0, 0.0, 0.0, 1.0])
    for _ in range(10):  # best effort: one may be lost
        info.publish(calibration)
        drive.run([view(plane(), 0)] * 2)
        if others["camera_info"]:
            break
    drive.run([view(plane(), 0)] * 8)
    for messages in others.values():
        messages.clear()
    masks = drive.run([view(plane(), index) for index in range(30)])
    filled = [mask for mask in masks if drive.pairs(mask)["filled"] == "true"]
    assert len(filled) > 15
    for name, messages in others.items():
        by_stamp = {stamp_ns(message): message for message in messages}
        there = [by_stamp[stamp_ns(mask)] for mask in filled if stamp_ns(mask) in by_stamp]
        assert len(there) >= 0.9 * len(filled), name
        for message in there:
            assert message.header.frame_id == "camera"
            assert (message.height, message.width) == SIZE
    overlay = {stamp_ns(message): message for message in others["overlay"]}
    for mask in filled[:5]:
        drawn = np.frombuffer(overlay[stamp_ns(mask)].data, np.uint8).reshape(*SIZE, 3)
        assert np.corrcoef(drawn.mean(axis=2).ravel(), drive.sent[stamp_ns(mask)][..., 0].ravel())[0, 1] > 0.5
    robot.client.node.destroy_publisher(info)


def test_a_mask_is_not_carried_to_another_scene_nor_to_a_blank_picture(drive: Drive) -> None:
    drive.run([view(plane(), index) for index in range(12)])
    other = plane(9)
    for pictures in ([np.zeros((*SIZE, 3), np.uint8)] * 12, [view(other, index) for index in range(12)]):
        masks = drive.run(pictures)
        assert masks
        assert all(drive.right(mask) > 0.9 for mask in masks), [drive.right(mask) for mask in masks]
    drive.robot.process.wait_for_output("an image cannot be followed from the one before")


def test_a_camera_that_changes_its_size_while_a_mask_is_carried(drive: Drive) -> None:
    drive.run([view(plane(), index) for index in range(10)])
    for size in ((100, 200), SIZE):
        masks = drive.run([view(plane(), index, size) for index in range(20)])
        own = [mask for mask in masks if (mask.height, mask.width) == size]
        assert len(own) >= 10
        assert statistics.median(drive.right(mask) for mask in own) > 0.9
        for mask in masks:
            assert drive.sent[stamp_ns(mask)].shape[:2] == (mask.height, mask.width)


def test_stamps_that_repeat_or_go_back_a_little_are_left_out_and_a_new_recording_starts_over(drive: Drive) -> None:
    def at(milliseconds: float) -> Any:
        header = drive.robot.now()
        header.stamp.sec, header.stamp.nanosec = divmod(base_ns + int(milliseconds * 1e6), 1_000_000_000)
        return header

    reports: list[DiagnosticArray] = drive.client.collect(DiagnosticArray, "/diagnostics")
    base_ns = drive.client.node.get_clock().now().nanoseconds + 5_000_000_000
    times = [*range(0, 600, 50), 500, 550, 650, 650, 700, *range(750, 1400, 50)]
    masks = drive.run([view(plane(), index) for index in range(len(times))], [at(time_ms) for time_ms in times])
    stamps = [stamp_ns(mask) for mask in masks]
    assert stamps == sorted(set(stamps)) and len(stamps) > 15
    drive.robot.process.wait_for_output("before its predecessor's, or the same")
    drive.client.spin_until(
        lambda: any("their stamps go back or repeat" in report.status[0].message for report in reports), "a warning"
    )
    masks = drive.run([view(plane(), index) for index in range(20)], [at(50 * i - 60_000) for i in range(20)])
    stamps = [stamp_ns(mask) for mask in masks]
    assert stamps == sorted(set(stamps)) and len(stamps) > 12
    drive.robot.process.wait_for_output("masks start over from here")


def test_without_it_the_engines_masks_alone_are_published_as_ever(drive: Drive) -> None:
    assert drive.robot.set(boolean("fill_frames", False))[0].successful
    drive.run([view(plane(), 0)] * 3)
    start_s = time.monotonic()
    masks = drive.run([view(plane(), index) for index in range(30)])
    assert len(masks) <= (time.monotonic() - start_s) * 1000 / ENGINE_MS + 1
    assert all(drive.right(mask) == 1.0 for mask in masks)
    assert not any("filled" in drive.pairs(mask) for mask in masks)
    assert drive.robot.set(boolean("fill_frames", True))[0].successful
    assert len(drive.run([view(plane(), index) for index in range(30)])) > 20


def test_a_rate_bounds_the_engine_and_not_the_masks(drive: Drive) -> None:
    assert drive.robot.set(double("max_rate_hz", 2.0))[0].successful
    drive.run([view(plane(), 0)] * 3)
    masks = drive.run([view(plane(), index) for index in range(30)])
    pairs = [drive.pairs(mask) for mask in masks]
    assert len(masks) > 20 and sum(p["filled"] == "true" for p in pairs) > 20
    assert drive.robot.set(double("max_rate_hz", 0.0))[0].successful


def test_a_budget_counted_from_the_stamp_judges_filled_masks_too(drive: Drive) -> None:
    reference = Parameter(
        name="budget_reference", value=ParameterValue(type=ParameterType.PARAMETER_STRING, string_value="stamp")
    )
    assert all(r.successful for r in drive.robot.set(reference, double("latency_budget_ms", 1000.0)))
    masks = drive.run([view(plane(), index) for index in range(30)])
    filled = [p for mask in masks if (p := drive.pairs(mask))["filled"] == "true"]
    assert filled and all(p["deadline_missed"] == "false" for p in filled)
    header = [drive.robot.now() for _ in range(20)]
    for index, one in enumerate(header):  # frames that are two seconds old when they arrive
        one.stamp.sec, one.stamp.nanosec = divmod(stamp_ns_of(one) - 60_000_000_000 + index * 50_000_000, 10**9)
    old = drive.run([view(plane(), index) for index in range(20)], header)
    assert old and all(drive.pairs(mask)["deadline_missed"] == "true" for mask in old)
    assert drive.robot.set(double("latency_budget_ms", 0.0))[0].successful


def stamp_ns_of(header: Any) -> int:
    return header.stamp.sec * 10**9 + header.stamp.nanosec


def test_cameras_are_filled_each_from_its_own_masks(ros_client: Any, start_node: Callable[..., Any]) -> None:
    start_node(
        "node.node", "-r", "__ns:=/two", "-p", "engine:=scripted", "-p", f"scripted_latency_ms:={ENGINE_MS}",
        "-p", "merge_threshold:=1.0", "-p", "fill_frames:=true", "-p", "cameras:=[front, rear]",
    )  # fmt: skip
    names = ("front", "rear")
    cameras = {name: ros_client.image_publisher(f"/two/{name}/image") for name in names}
    masks = {name: ros_client.collect(Image, f"/two/{name}/segmentation/mask") for name in names}
    worlds, sent = {name: plane(seed) for seed, name in enumerate(names)}, {}
    for name, camera in cameras.items():  # each side has found the other
        header = Header(stamp=ros_client.node.get_clock().now().to_msg(), frame_id=name)
        first = image_message(view(worlds[name], 0), "rgb8", header)
        ros_client.send_until(camera, first, lambda name=name: bool(masks[name]), f"a mask of {name}")
    ros_client.spin_for(5 * ENGINE_MS / 1000)
    for received in masks.values():
        received.clear()
    next_s, count = time.monotonic(), 40
    for index in range(count):
        for name, camera in cameras.items():
            header = Header(stamp=ros_client.node.get_clock().now().to_msg(), frame_id=name)
            message = image_message(view(worlds[name], index), "rgb8", header)
            sent[name, stamp_ns(message)] = view(worlds[name], index)
            camera.publish(message)
        next_s = max(next_s + PERIOD_S, time.monotonic())  # late by a stall, a camera does not catch up
        ros_client.spin_for(max(next_s - time.monotonic(), 0.001))
    ros_client.spin_for(5 * ENGINE_MS / 1000)
    for name in names:
        stamps = [stamp_ns(mask) for mask in masks[name]]
        assert stamps == sorted(set(stamps)) and len(stamps) > 0.6 * count
        assert {mask.header.frame_id for mask in masks[name]} == {name}
        right = [(mask_of(m) == sent[name, stamp_ns(m)][..., 1] >> 6)[4:-4, 4:-4].mean() for m in masks[name]]
        assert statistics.median(right) > 0.95
