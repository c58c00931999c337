# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Everything the node publishes, as a costmap and a user see it: from another process, over DDS."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from robot import Robot, header, mask_of, string
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import String

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.node.messages import image_message

pytestmark = pytest.mark.ros

NAMESPACE = "/whole"
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
CLASSES = ScriptedEngine().info.classes


@pytest.fixture(scope="module")
def robot(ros_client: Any, start_node: Callable[..., Any]) -> Robot:
    """A node that finds a vision_msgs, started with overrides of one topic's QoS."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent / "fake_messages"), prepend=os.pathsep)
        overrides = f"qos_overrides.{NAMESPACE}/segmentation"
        return Robot(
            ros_client, start_node, NAMESPACE, "-p", f"{overrides}/clusters.publisher.reliability:=best_effort",
            "-p", f"{overrides}/clusters.publisher.depth:=3",
        )  # fmt: skip


def stamp(message: Any) -> tuple[int, int]:
    return message.header.stamp.sec, message.header.stamp.nanosec


def labels_of(client: Any, topic: str = f"{NAMESPACE}/segmentation/label_info") -> list[dict[str, Any]]:
    """Join late: the latched label info, and whatever follows."""
    labels: list[dict[str, Any]] = []
    client.node.create_subscription(String, topic, lambda message: labels.append(json.loads(message.data)), LATCHED)
    client.spin_until(lambda: bool(labels), "label info of a late joiner")
    return labels


def expected_mask(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(pixels[..., 1], size[::-1], interpolation=cv2.INTER_NEAREST) >> 6


@pytest.mark.parametrize(("output_size", "size"), [("input", (48, 64)), ("200x400", (200, 400))])
def test_a_consumer_that_joins_late_and_synchronises_gets_every_frame_right(
    robot: Robot, rng: np.random.Generator, output_size: str, size: tuple[int, int]
) -> None:
    assert robot.set(string("output_size", output_size))[0].successful
    robot.segment(image_message(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), "rgb8", header(1)))  # before it came
    names = {int(key): name for key, name in labels_of(robot.client)[-1]["class_map"].items()}
    assert names == dict(enumerate(CLASSES.names))
    confidences = robot.client.collect(Image, f"{NAMESPACE}/segmentation/confidence")
    black = image_message(np.zeros((48, 64, 3), np.uint8), "rgb8", header(2))
    robot.client.send_until(robot.camera, black, lambda: bool(confidences), "match")
    for number in range(20):
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        frame = image_message(pixels, "rgb8", header(1000 * size[0] + number))
        frame.header.stamp.nanosec = 987_654_321 - number
        mask = robot.segment(frame)
        robot.client.spin_until(lambda f=frame: any(stamp(c) == stamp(f) for c in confidences), "confidence")
        confidence = next(c for c in confidences if stamp(c) == stamp(frame))
        assert mask.header == confidence.header == frame.header
        assert (mask.height, mask.width, mask.step) == (confidence.height, confidence.width, confidence.step)
        assert (mask.height, mask.width, mask.encoding, confidence.encoding) == (*size, "mono8", "mono8")
        expected = expected_mask(pixels, size)
        for v, u in rng.integers(0, size, (50, 2)):  # as the costmap layer reads
            assert mask.data[v * mask.width + u] == expected[v, u]
            assert mask.data[v * mask.width + u] in names
        np.testing.assert_array_equal(mask_of(mask), expected)
        assert mask_of(confidence).min() >= 128
    assert robot.set(string("output_size", "input"))[0].successful


def test_groups_agree_in_mask_labels_overlay_and_confidence(robot: Robot, rng: np.random.Generator) -> None:
    labels = labels_of(robot.client)
    before = len(labels)
    overlays = robot.client.collect(Image, f"{NAMESPACE}/segmentation/overlay")
    confidences = robot.client.collect(Image, f"{NAMESPACE}/segmentation/confidence")
    assert robot.set(string("class_groups", "ground: bright, dim; lamp: glare"))[0].successful
    assert robot.set(string("class_groups", "ground: bright, mud"))[0].reason.startswith(
        "class_groups: the model has no"
    )
    pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    frame = image_message(pixels, "rgb8", header(2000))
    robot.client.send_until(robot.camera, frame, lambda: bool(overlays and confidences), "overlay and confidence")
    mask = mask_of(robot.segment(frame))
    expected = np.array([255, 0, 0, 1], np.uint8)[pixels[..., 1] >> 6]
    np.testing.assert_array_equal(mask, expected)
    robot.client.spin_until(lambda: len(labels) > before, "labels of the groups")
    assert labels[-1]["class_map"] == {"0": "ground", "1": "lamp"}
    confidence = next(c for c in confidences if stamp(c) == stamp(frame))
    np.testing.assert_array_equal(mask_of(confidence) == 0, mask == 255)
    overlay = next(o for o in overlays if stamp(o) == stamp(frame))
    drawn = np.frombuffer(overlay.data, np.uint8).reshape(48, 64, 3).astype(int)
    colours = np.array([CLASSES.colours[CLASSES.names.index("bright")], CLASSES.colours[CLASSES.names.index("glare")]])
    for index, colour in enumerate(colours):
        assert np.abs(drawn[mask == index] - (pixels[mask == index] + colour) / 2).max() <= 1
    np.testing.assert_array_equal(drawn[mask == 255], pixels[mask == 255])

    assert robot.set(string("class_groups", ""))[0].successful
    robot.segment(image_message(pixels, "rgb8", header(2001)))
    robot.client.spin_until(lambda: len(labels) == before + 2, "labels of the classes")
    for number in range(3):  # on change only
        robot.segment(image_message(pixels, "rgb8", header(2002 + number)))
    robot.client.spin_for(0.3)
    assert len(labels) == before + 2
    assert labels[-1]["class_map"] == {str(index): name for index, name in enumerate(CLASSES.names)}


def test_compressed_masks_are_lossless(robot: Robot, rng: np.random.Generator) -> None:
    received = robot.client.collect(CompressedImage, f"{NAMESPACE}/segmentation/mask/compressed")
    pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    frame = image_message(pixels, "rgb8", header(3000))
    robot.client.send_until(robot.camera, frame, lambda: bool(received), "compressed mask")
    assert received[0].format == "mono8; png compressed mono8"
    assert received[0].header == frame.header
    decoded = cv2.imdecode(np.frombuffer(received[0].data, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded, pixels[..., 1] >> 6)


def test_more_than_255_classes_are_published_in_two_bytes(
    ros_client: Any,
    start_node: Callable[..., Any],
    make_toy_model: Callable[[ClassSet], Path],
    rng: np.random.Generator,
) -> None:
    pytest.importorskip("torch", reason="needs PyTorch")
    from clustvit_ros.engine import Settings, create_engine

    model = make_toy_model(ClassSet.numbered(400))
    robot = Robot(ros_client, start_node, "/wide", "-p", "engine:=torch", "-p", f"model:={model}", "-p", "device:=cpu")
    compressed = ros_client.collect(CompressedImage, "/wide/segmentation/mask/compressed")
    pixels = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    expected = create_engine(str(model), "torch", "cpu").segment(pixels, Settings()).mask[0]
    mask = robot.segment(image_message(pixels, "rgb8", header(1)))
    assert (mask.encoding, mask.step, mask.is_bigendian) == ("mono16", 256, sys.byteorder == "big")
    found = np.frombuffer(mask.data, np.uint16).reshape(96, 128)
    assert found.max() > 255 and (found == expected).mean() > 0.99
    ros_client.spin_until(lambda: bool(compressed), "a compressed mask")
    assert np.array_equal(cv2.imdecode(np.frombuffer(compressed[-1].data, np.uint8), cv2.IMREAD_UNCHANGED), found)


def test_camera_info_has_the_masks_size_and_the_frames_header(robot: Robot) -> None:
    received = robot.client.collect(CameraInfo, f"{NAMESPACE}/segmentation/camera_info")
    driver = robot.client.image_publisher(f"{NAMESPACE}/camera_info", CameraInfo)
    k = [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0]
    info = CameraInfo(height=48, width=64, k=k, d=[0.5], header=header(3999, "driver"))
    robot.client.send_until(driver, info, lambda: _camera_info_arrives(robot, received), "camera info")
    assert received[-1].header == header(4000)
    assert (received[-1].height, received[-1].width, list(received[-1].k)) == (48, 64, k)
    assert robot.set(string("output_size", "24x128"))[0].successful
    robot.segment(image_message(np.zeros((48, 64, 3), np.uint8), "rgb8", header(4001)))
    robot.client.spin_until(lambda: any(stamp(r) == stamp_of(4001) for r in received), "scaled camera info")
    scaled = next(r for r in received if stamp(r) == stamp_of(4001))
    assert (scaled.height, scaled.width) == (24, 128)
    assert list(scaled.k) == [100.0, 0.0, 64.0, 0.0, 25.0, 12.0, 0.0, 0.0, 1.0]
    assert list(scaled.d) == [0.5]
    assert robot.set(string("output_size", "input"))[0].successful
    # Another camera on the topic: the calibration was not of that one.
    image = image_message(np.zeros((48, 64, 3), np.uint8), "rgb8", header(4002, "other"))
    robot.segment(image)
    robot.client.spin_for(0.3)
    assert not any(stamp(r) == stamp_of(4002) for r in received)
    robot.client.node.destroy_publisher(driver)


def test_a_calibration_goes_with_its_publisher(robot: Robot) -> None:
    received = robot.client.collect(CameraInfo, f"{NAMESPACE}/segmentation/camera_info")
    driver = robot.client.image_publisher(f"{NAMESPACE}/camera_info", CameraInfo)
    info = CameraInfo(height=48, width=64, k=[50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0], header=header(4100))
    robot.client.send_until(driver, info, lambda: _camera_info_arrives(robot, received), "camera info")
    robot.client.node.destroy_publisher(driver)
    robot.client.spin_for(2.3)
    received.clear()
    robot.segment(image_message(np.zeros((48, 64, 3), np.uint8), "rgb8", header(4101)))
    robot.client.spin_for(0.3)
    assert not received


def stamp_of(second: int) -> tuple[int, int]:
    return stamp(type("Message", (), {"header": header(second)}))


def _camera_info_arrives(robot: Robot, received: list[CameraInfo]) -> bool:
    robot.camera.publish(image_message(np.zeros((48, 64, 3), np.uint8), "rgb8", header(4000)))
    robot.client.spin_for(0.05)
    return bool(received)


def qos_offered(client: Any, topic: str) -> Any:
    client.spin_until(lambda: bool(client.node.get_publishers_info_by_topic(topic)), topic)
    return client.node.get_publishers_info_by_topic(topic)[0].qos_profile


def test_qos_overrides_hold_for_their_topic_alone(robot: Robot) -> None:
    offered = {
        name: qos_offered(robot.client, f"{NAMESPACE}/segmentation/{name}").reliability
        for name in ("mask", "confidence", "overlay", "clusters", "camera_info", "mask/compressed", "stats")
    }
    assert offered.pop("clusters") == ReliabilityPolicy.BEST_EFFORT
    assert set(offered.values()) == {ReliabilityPolicy.RELIABLE}
    assert (
        qos_offered(robot.client, f"{NAMESPACE}/segmentation/label_info").durability == DurabilityPolicy.TRANSIENT_LOCAL
    )


def pairs_of(status: Any) -> dict[str, str]:
    return {pair.key: pair.value for pair in status.values}


class Diagnostics:
    """The node's own status, newest last."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self._name = f"{namespace.lstrip('/')}/segmentation: segmentation"
        self._arrays = client.collect(DiagnosticArray, "/diagnostics")

    @property
    def statuses(self) -> list[Any]:
        return [status for array in self._arrays for status in array.status if status.name == self._name]

    def wait_for(self, condition: Callable[[Any], bool], what: str) -> Any:
        seen = len(self.statuses)
        self._client.spin_until(lambda: any(condition(status) for status in self.statuses[seen:]), what)
        return next(status for status in self.statuses[seen:] if condition(status))


def test_peers_with_incompatible_qos_are_reported_with_the_remedy_until_they_go(robot: Robot) -> None:
    client, diagnostics = robot.client, Diagnostics(robot.client, NAMESPACE)
    topic = f"{NAMESPACE}/segmentation/mask"
    wants_old_masks = client.node.create_subscription(Image, topic, lambda _message: None, LATCHED)
    status = diagnostics.wait_for(lambda s: "incompatible_qos" in pairs_of(s), "the subscriber's QoS")
    problem = pairs_of(status)["incompatible_qos"]
    assert problem.startswith(f"a subscriber of {topic} asks for incompatible QoS (DURABILITY)")
    assert f"qos_overrides.{topic}.publisher.durability" in problem
    frame = image_message(np.zeros((48, 64, 3), np.uint8), "rgb8", robot.now())
    robot.client.send_until(robot.camera, frame, lambda: problem in diagnostics.statuses[-1].message, "a warning")
    assert diagnostics.statuses[-1].level == b"\x01"
    client.node.destroy_subscription(wants_old_masks)
    diagnostics.wait_for(lambda s: "incompatible_qos" not in pairs_of(s), "the end of it")


def test_diagnostics_tell_age_period_and_drops_of_the_input(robot: Robot) -> None:
    diagnostics = Diagnostics(robot.client, NAMESPACE)
    pixels = np.zeros((48, 64, 3), np.uint8)
    for _ in range(10):
        robot.camera.publish(image_message(pixels, "rgb8", robot.now()))
        robot.client.spin_for(0.05)
    status = diagnostics.wait_for(lambda s: any(v.key == "input_period_p50_ms" for v in s.values), "statistics")
    pairs = pairs_of(status)
    assert float(pairs["input_period_p50_ms"]) > 0.0
    assert {"input_age_p95_ms", "input_dropped_recently", "frames_dropped", "frames_received"} <= pairs.keys()


def test_a_camera_with_incompatible_qos_is_reported(ros_client: Any, start_node: Callable[..., Any]) -> None:
    namespace = "/strict"
    process = start_node(
        "node.node", "-r", f"__ns:={namespace}", "-p", "engine:=scripted",
        "-p", f"qos_overrides.{namespace}/image.subscription.reliability:=reliable",
    )  # fmt: skip
    process.wait_for_output("active:")
    diagnostics = Diagnostics(ros_client, namespace)
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    camera = ros_client.node.create_publisher(Image, f"{namespace}/image", best_effort)
    status = diagnostics.wait_for(lambda s: "incompatible QoS" in s.message, "the camera's QoS")
    assert f"a publisher on {namespace}/image offers incompatible QoS (RELIABILITY)" in status.message
    assert f"qos_overrides.{namespace}/image.subscription.reliability" in status.message
    assert "vision_msgs is not installed" in process.output or _has_vision_msgs()
    assert process.output.count("vision_msgs is not installed") <= 1
    ros_client.node.destroy_publisher(camera)


def _has_vision_msgs() -> bool:
    import importlib.util

    return importlib.util.find_spec("vision_msgs") is not None
