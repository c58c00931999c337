# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The segmentation node as a robot sees it: a process on the other side of DDS."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter
from rcl_interfaces.srv import DescribeParameters
from robot import Robot, double, header, integer, mask_of, string
from sensor_msgs.msg import CompressedImage, Image

from clustvit_ros.node.messages import image_message

pytestmark = pytest.mark.ros

NAMESPACE = "/shared"


@pytest.fixture(scope="module")
def robot(ros_client: Any, start_node: Callable[..., Any]) -> Robot:
    """One node for all tests that leave it as they found it; started with an integer for a double."""
    return Robot(ros_client, start_node, NAMESPACE, "-p", "merge_threshold:=1")


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_mask_keeps_the_header_and_is_packed(robot: Robot, pixels: np.ndarray) -> None:
    frame = image_message(pixels, "rgb8", header(2**31 - 1))
    mask = robot.segment(frame)
    assert mask.header == frame.header
    assert (mask.encoding, mask.height, mask.width, mask.step) == ("mono8", 48, 64, 64)
    np.testing.assert_array_equal(mask_of(mask), pixels[..., 1] >> 6)


def test_bad_frames_are_reported_and_the_next_good_one_is_segmented(robot: Robot, pixels: np.ndarray) -> None:
    diagnostics = robot.client.collect(DiagnosticArray, "/diagnostics")
    for number, change in enumerate(
        ({"encoding": "32FC1"}, {"step": 1}, {"height": 0}, {"width": 2**32 - 1}, {"height": 47})
    ):
        bad = image_message(pixels, "rgb8", header(100 + number))
        for field, value in change.items():
            setattr(bad, field, value)
        robot.camera.publish(bad)
        robot.client.spin_for(0.05)
    mask = robot.segment(image_message(pixels, "rgb8", header(200)))
    assert int(robot.stats_of(mask)["frames_rejected"]) >= 1
    assert not [mask for mask in robot.masks if 100 <= mask.header.stamp.sec < 200]
    assert "image not segmented (1 so far)" in robot.process.output

    def told() -> bool:
        statuses = [status for array in diagnostics for status in array.status if status.name.startswith("shared")]
        return any("unusable images" in status.message for status in statuses)

    robot.client.spin_until(told, "diagnostics of bad frames")


def test_padded_rows_do_not_skew_the_mask(robot: Robot, pixels: np.ndarray) -> None:
    frame = image_message(pixels, "rgb8", header(300))
    padded = np.pad(pixels.reshape(48, -1), ((0, 0), (0, 13)), constant_values=255)
    frame.step = padded.shape[1]
    frame.data = image_message(padded, "mono8", header(0)).data
    np.testing.assert_array_equal(mask_of(robot.segment(frame)), pixels[..., 1] >> 6)


def test_integer_is_accepted_for_a_double(robot: Robot, pixels: np.ndarray) -> None:
    assert robot.stats_of(robot.segment(image_message(pixels, "rgb8", header(400))))["merge_threshold"] == "1"
    assert robot.set(integer("merge_threshold", 0))[0].successful
    assert robot.stats_of(robot.segment(image_message(pixels, "rgb8", header(401))))["merge_threshold"] == "0"
    assert robot.set(double("merge_threshold", 1.0))[0].successful


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (double("merge_threshold", 1.5), ["merge_threshold", "0.0", "1.0", "1.5"]),
        (double("merge_threshold", float("nan")), ["merge_threshold", "0.0", "1.0", "nan"]),
        (integer("merge_threshold", 2), ["merge_threshold", "0.0 to 1.0", "2"]),
        (string("merge_threshold", "low"), ["merge_threshold", "0.0 to 1.0", "'low' (string)"]),
        (Parameter(name="merge_threshold"), ["merge_threshold", "cannot be deleted", "0.5"]),
        (integer("token_capacity", -1), ["token_capacity", "0", "1048576"]),
        (string("output_size", "big"), ["output_size", "input, model or HEIGHTxWIDTH"]),
        (string("model", "other"), ["model", "'other' cannot be used", "scripted runs no model"]),
        (string("cameras", "front"), ["cameras", "cannot change while the node runs"]),
        (string("class_groups", "a"), ["class_groups", "GROUP: CLASS, CLASS"]),
        (string("class_groups", "a: dim; b: fog"), ["no class 'fog', expected dark, dim, bright, glare"]),
        (string("device", "cuda"), ["device", "cannot change while the node is active", "ros2 lifecycle set"]),
    ],
)
def test_refusals_name_the_range_and_change_nothing(robot: Robot, parameter: Parameter, words: list[str]) -> None:
    before = robot.get(parameter.name)
    result = robot.set(parameter)[0]
    assert not result.successful
    for word in words:
        assert word in result.reason
    assert robot.get(parameter.name) == before


def test_several_parameters_change_all_or_none(robot: Robot, pixels: np.ndarray) -> None:
    refused = robot.set_atomically(string("output_size", "10x20"), double("confidence_threshold", 2.0))
    assert not refused.successful
    mask = robot.segment(image_message(pixels, "rgb8", header(500)))
    assert (mask.height, mask.width) == (48, 64)

    accepted = robot.set_atomically(string("output_size", "10x20"), double("confidence_threshold", 0.25))
    assert accepted.successful
    mask = robot.segment(image_message(pixels, "rgb8", header(501)))
    assert (mask.height, mask.width, mask.step) == (10, 20, 20)
    assert robot.stats_of(mask)["confidence_threshold"] == "0.25"
    assert robot.set_atomically(string("output_size", "input"), integer("confidence_threshold", 0)).successful


def test_descriptors_tell_range_and_meaning(robot: Robot) -> None:
    request = DescribeParameters.Request(names=["merge_threshold", "token_capacity"])
    service = f"{NAMESPACE}/segmentation/describe_parameters"
    threshold, capacity = robot.client.call(DescribeParameters, service, request).descriptors
    assert (threshold.floating_point_range[0].from_value, threshold.floating_point_range[0].to_value) == (0.0, 1.0)
    assert (capacity.integer_range[0].from_value, capacity.integer_range[0].to_value) == (0, 1_048_576)
    assert "merged" in threshold.description


def test_companions_come_with_the_masks_stamp_once_subscribed(robot: Robot, pixels: np.ndarray) -> None:
    outputs = {
        name: robot.client.collect(Image, f"{NAMESPACE}/segmentation/{name}")
        for name in ("confidence", "overlay", "clusters")
    }
    frame = image_message(pixels, "rgb8", header(600, "rear"))
    robot.client.send_until(robot.camera, frame, lambda: all(outputs.values()), "confidence, overlay and clusters")
    for name, encoding in (("confidence", "mono8"), ("overlay", "rgb8"), ("clusters", "mono8")):
        message = outputs[name][0]
        assert message.header == frame.header
        assert (message.encoding, message.height, message.width) == (encoding, 48, 64)


def test_newest_frame_wins_under_a_slow_engine(ros_client: Any, start_node: Callable[..., Any]) -> None:
    latency_ms, count = 150, 30
    robot = Robot(ros_client, start_node, "/slow", "-p", f"scripted_latency_ms:={latency_ms}")
    small = np.zeros((8, 8, 3), np.uint8)
    robot.segment(image_message(small, "rgb8", header(1)))
    first = len(robot.masks)
    for number in range(count):
        frame = image_message(small, "rgb8", header(0))
        frame.header.stamp = ros_client.node.get_clock().now().to_msg()
        frame.header.frame_id = str(number)
        robot.camera.publish(frame)
        ros_client.spin_for(1 / 30)
    newest = str(count - 1)
    # Were the newest lost on the way (best effort), the camera would send another.
    ros_client.send_until(
        robot.camera, frame, lambda: bool(robot.masks) and robot.masks[-1].header.frame_id == newest, "newest mask"
    )
    # The first frame may have been sent again, on a busy machine, before its mask was there.
    masks = [mask for mask in robot.masks[first:] if mask.header.frame_id.isdecimal()]
    numbers = [int(mask.header.frame_id) for mask in masks]
    assert numbers == sorted(numbers)
    statistics = robot.stats_of(robot.masks[-1])
    received, segmented, dropped = (int(statistics[f"frames_{name}"]) for name in ("received", "segmented", "dropped"))
    assert dropped > 0
    assert received - segmented - dropped in (0, 1, 2)  # one may be waiting, and another just arrive
    # A queue of 30 frames would be 3.5 s old at its end.
    ages = [float(robot.stats_of(mask)["age_ms"]) for mask in masks[:5]]
    assert max(ages) < 10 * latency_ms


def test_compressed_input(ros_client: Any, start_node: Callable[..., Any], pixels: np.ndarray) -> None:
    start_node(
        "node.node", "-r", "__ns:=/packed", "-r", "image:=camera/color", "-p", "engine:=scripted",
        "-p", "image_transport:=compressed",
    )  # fmt: skip
    camera = ros_client.image_publisher("/packed/camera/color/compressed", CompressedImage)
    masks = ros_client.collect(Image, "/packed/segmentation/mask")
    frame = CompressedImage(header=header(1), format="png")
    frame.data.frombytes(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
    ros_client.send_until(camera, frame, lambda: bool(masks), "mask of a compressed image")
    np.testing.assert_array_equal(mask_of(masks[0]), pixels[..., 1] >> 6)
    assert masks[0].header == frame.header


def test_a_lazy_node_works_from_the_first_frame_after_a_subscription(
    ros_client: Any, start_node: Callable[..., Any], pixels: np.ndarray
) -> None:
    start_node("node.node", "-r", "__ns:=/idle", "-p", "engine:=scripted")
    camera = ros_client.image_publisher("/idle/image")
    diagnostics = ros_client.collect(DiagnosticArray, "/diagnostics")

    def is_idle() -> bool:
        return any(
            "nobody subscribes to an output" in status.message and status.level == b"\0"
            for array in diagnostics for status in array.status if status.name.startswith("idle/")
        )  # fmt: skip

    ros_client.send_until(camera, image_message(pixels, "rgb8", header(1)), is_idle, "an idle node")
    stats: list[DiagnosticArray] = []
    ros_client.node.create_subscription(DiagnosticArray, "/idle/segmentation/stats", stats.append, 5)
    ros_client.send_until(camera, image_message(pixels, "rgb8", header(2)), lambda: bool(stats), "statistics")
    pairs = {pair.key: int(pair.value) for pair in stats[0].status[0].values if pair.key.startswith("frames_")}
    assert pairs["frames_segmented"] == 1
    assert pairs["frames_unwatched"] > 0
    assert pairs["frames_received"] - pairs["frames_unwatched"] - pairs["frames_dropped"] in (1, 2)  # one may wait


def test_a_rate_bounds_what_the_engine_gets(ros_client: Any, start_node: Callable[..., Any]) -> None:
    robot = Robot(ros_client, start_node, "/paced", "-p", "max_rate_hz:=10")
    small, seconds = np.zeros((8, 8, 3), np.uint8), 2.0
    robot.segment(image_message(small, "rgb8", header(1)))
    robot.masks.clear()
    start_s = time.monotonic()
    while (elapsed_s := time.monotonic() - start_s) < seconds:
        robot.camera.publish(image_message(small, "rgb8", robot.now()))
        ros_client.spin_for(1 / 40)
    assert 0.5 * 10 * elapsed_s < len(robot.masks) <= 10 * elapsed_s + 2
    counts = robot.stats_of(robot.masks[-1])
    assert int(counts["frames_over_rate"]) > 3  # a loaded machine sends fewer
    assert robot.set(double("max_rate_hz", 0.0))[0].successful
    before = int(counts["frames_over_rate"])
    later = robot.stream(small, 5)
    assert int(later[-1]["frames_over_rate"]) - before <= 1
