# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Labelled points over DDS, and against the simulated camera's exact world."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from clouds import SECOND_NS, SIZE, cloud, depth_image, header, labelled, positions_of, scene
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import qos_profile_sensor_data
from robot import Robot, mask_of
from sensor_msgs.msg import CameraInfo, Image, PointCloud2

from clustvit_ros.demo.camera import camera_info_message
from clustvit_ros.node.messages import image_message

pytestmark = pytest.mark.ros


class Rig(Robot):
    """A robot with a cloud or a depth image beside its camera, and somebody who wants labelled points."""

    def __init__(self, client: Any, start_node: Any, namespace: str, topic: str, *arguments: str) -> None:
        self.source = client.node.create_publisher(
            PointCloud2 if topic.endswith("points") else Image, f"{namespace}/{topic}", qos_profile_sensor_data
        )
        self.info = client.node.create_publisher(CameraInfo, f"{namespace}/camera_info", qos_profile_sensor_data)
        super().__init__(client, start_node, namespace, *arguments)
        self.points = client.collect(PointCloud2, f"{namespace}/segmentation/points")

    def drive(self, make: Callable[[int], Any], enough: Callable[[], bool], pixels: np.ndarray) -> None:
        """Send images, each with its calibration and what `make` gives for its stamp, until it is enough."""
        deadline_s = time.monotonic() + 60.0
        while not enough():
            assert time.monotonic() < deadline_s, self.process.output
            image = image_message(pixels, "rgb8", self.now())
            self.info.publish(camera_info_message(pixels.shape[:2], 40.0, image.header))
            self.camera.publish(image)
            self.source.publish(make(image.header.stamp.sec * SECOND_NS + image.header.stamp.nanosec))
            self.client.spin_for(0.05)


@pytest.mark.parametrize("topic", ["points", "depth"])
def test_a_node_labels_what_lies_beside_its_camera_while_somebody_wants_it(
    topic: str, ros_client: Any, start_node: Any, rng: np.random.Generator
) -> None:
    positions, pixels = scene(rng), rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    rig = Rig(ros_client, start_node, f"/{topic}_rig", topic)

    def make(stamp: int) -> Any:
        return cloud(positions, stamp_ns=stamp) if topic == "points" else depth_image(positions[..., 2], "32FC1", stamp)

    rig.drive(make, lambda: len(rig.points) >= 3, pixels)
    for message in rig.points:
        np.testing.assert_array_equal(labelled(message)["label"], pixels[..., 1] >> 6)
        np.testing.assert_allclose(positions_of(message), positions, atol=0.0 if topic == "points" else 1e-3)
        assert any(mask.header == message.header for mask in rig.masks)
    assert len({message.header.stamp.nanosec for message in rig.points}) == len(rig.points)
    assert rig.source.get_subscription_count() == 1
    for subscription in list(ros_client.node.subscriptions):
        if subscription.topic_name.endswith(f"/{topic}_rig/segmentation/points"):
            ros_client.node.destroy_subscription(subscription)
    rig.drive(make, lambda: rig.source.get_subscription_count() == 0, pixels)
    last = {pair.key: pair.value for pair in rig.stats[-1].status[0].values}
    assert int(last["points_published"]) >= 3
    again = ros_client.collect(PointCloud2, f"/{topic}_rig/segmentation/points")
    rig.drive(make, lambda: bool(again), pixels)


def test_frames_whose_masks_were_carried_to_them_get_points_too(
    ros_client: Any, start_node: Any, rng: np.random.Generator
) -> None:
    positions, pixels = scene(rng, (48, 64)), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    rig = Rig(
        ros_client, start_node, "/filled_rig", "points", "-p", "scripted_latency_ms:=300.0", "-p", "fill_frames:=true"
    )

    def filled() -> list[Any]:
        told = [(each.header, {pair.key: pair.value for pair in each.status[0].values}) for each in rig.stats]
        stamps = [head.stamp for head, pairs in told if pairs.get("filled") == "true"]
        return [each for each in rig.points if each.header.stamp in stamps]

    rig.drive(lambda stamp: cloud(positions, stamp_ns=stamp), lambda: len(filled()) >= 3, pixels)
    for message in filled():
        mask = next(each for each in rig.masks if each.header == message.header)
        np.testing.assert_array_equal(labelled(message)["label"], mask_of(mask))


def test_what_is_wrong_with_clouds_is_told_once_and_counted(
    ros_client: Any, start_node: Any, rng: np.random.Generator
) -> None:
    positions, pixels = scene(rng), rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    rig = Rig(ros_client, start_node, "/bad_rig", "points")
    statuses = ros_client.collect(DiagnosticArray, "/diagnostics")

    def told() -> bool:
        found = [each for array in statuses for each in array.status if each.name.startswith("bad_rig/")]
        return any("no labelled points" in each.message and each.level == b"\x01" for each in found)

    def refused() -> int:
        pairs = [pair for array in rig.stats for pair in array.status[0].values]
        return max((int(pair.value) for pair in pairs if pair.key == "points_refused"), default=0)

    def throttled() -> bool:
        return refused() > 2 * rig.process.output.count("no labelled points")

    bad = functools.partial(cloud, positions, frame_id="lidar")
    rig.drive(lambda stamp: bad(stamp_ns=stamp), lambda: told() and throttled(), pixels)
    assert "frame_id: got 'lidar', expected the image's, 'camera'" in rig.process.output
    counted = refused()
    rig.drive(lambda stamp: bad(stamp_ns=stamp), lambda: len(rig.masks) >= counted, pixels)
    rig.drive(lambda stamp: cloud(positions, stamp_ns=stamp), lambda: bool(rig.points), pixels)


def test_each_camera_of_several_has_points_of_its_own(
    ros_client: Any, start_node: Any, rng: np.random.Generator
) -> None:
    start_node("node.node", "-r", "__ns:=/pair_rig", "-p", "engine:=scripted", "-p", "cameras:=front,rear")
    names, positions = ("front", "rear"), {"front": scene(rng), "rear": scene(rng) * 2}
    clouds = {
        name: ros_client.node.create_publisher(PointCloud2, f"/pair_rig/{name}/points", qos_profile_sensor_data)
        for name in names
    }
    cameras = {name: ros_client.image_publisher(f"/pair_rig/{name}/image") for name in names}
    found = {name: ros_client.collect(PointCloud2, f"/pair_rig/{name}/segmentation/points") for name in names}
    deadline_s = time.monotonic() + 60.0
    while not all(found.values()):
        assert time.monotonic() < deadline_s
        stamp = ros_client.node.get_clock().now().nanoseconds
        for level, name in enumerate(names):
            pixels = np.full((*SIZE, 3), 64 * level, np.uint8)
            cameras[name].publish(image_message(pixels, "rgb8", header(stamp, name)))
            clouds[name].publish(cloud(positions[name], stamp_ns=stamp, frame_id=name))
        ros_client.spin_for(0.05)
    for level, name in enumerate(names):
        assert found[name][0].header.frame_id == name
        assert set(np.unique(labelled(found[name][0])["label"])) == {level}
        np.testing.assert_array_equal(positions_of(found[name][0]), positions[name])


@pytest.mark.slow
def test_points_of_a_simulated_drive_are_the_worlds_with_the_masks_labels(ros_client: Any, start_node: Any) -> None:
    pytest.importorskip("panda3d", reason="needs the renderer of the simulated world")
    name = "/drive"
    arguments = ("-r", f"__ns:={name}", "-r", "image:=image_raw", "-p", "model:=sim_tiny")
    start_node("node.node", *arguments).wait_for_output("active:")
    images, clouds = ("segmentation/mask", "ground_truth"), ("points", "segmentation/points")
    topics = {**dict.fromkeys(images, Image), **dict.fromkeys(clouds, PointCloud2)}
    start_node(
        "demo.camera", "-r", f"__ns:={name}", "-p", "source:=sim:5", "-p", "rate_hz:=3", "-p", "publish_points:=true",
        "-p", "width:=320", "-p", "height:=240",
    )  # fmt: skip
    found = {topic: ros_client.collect(kind, f"{name}/{topic}") for topic, kind in topics.items()}
    ros_client.spin_until(lambda: len(found["segmentation/points"]) >= 10, "labelled points")

    def of(topic: str, like: Any) -> Any:
        return next((each for each in found[topic] if each.header == like.header), None)

    compared = 0
    for message in found["segmentation/points"]:
        world, mask, truth = (of(topic, message) for topic in ("points", "segmentation/mask", "ground_truth"))
        if world is None or mask is None or truth is None:
            continue
        compared += 1
        labels = labelled(message)["label"]
        np.testing.assert_array_equal(labels, mask_of(mask))
        right = mask_of(mask) == mask_of(truth)
        np.testing.assert_array_equal(labels[right], mask_of(truth)[right])
        assert right.mean() > 0.8
        exact = np.frombuffer(world.data, np.uint32).reshape(world.height, world.width, 3)
        np.testing.assert_array_equal(positions_of(message).view(np.uint32), exact)
        assert np.isnan(positions_of(message)).any(), "the sky"
    assert compared >= 5
