# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Deterministic replay: every frame, in order, the same bits each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from clustvit_ros.classes import ClassSet
from clustvit_ros.node.messages import image_message


def replay(client: Any, process: Any, namespace: str, pictures: list[np.ndarray]) -> list[tuple[int, bytes]]:
    """Publish all pictures at once, as a bag played far too fast, and collect (stamp, mask) in order of arrival."""
    reliable = QoSProfile(depth=len(pictures), reliability=ReliabilityPolicy.RELIABLE)
    masks: list[Image] = []
    subscription = client.node.create_subscription(Image, f"{namespace}/segmentation/mask", masks.append, len(pictures))
    publisher = client.node.create_publisher(Image, f"{namespace}/image", reliable)
    client.spin_until(lambda: publisher.get_subscription_count() > 0, "the node's subscription")
    client.spin_until(lambda: client.node.count_publishers(f"{namespace}/segmentation/mask") > 0, "the mask")
    client.spin_for(1.0)  # the node has to find this side, too: what it sends before is lost
    for index, pixels in enumerate(pictures):
        header = Header(frame_id="bag")
        header.stamp.sec = 1000 + index
        publisher.publish(image_message(pixels, "rgb8", header))
    client.spin_until(lambda: len(masks) >= len(pictures), f"{len(pictures)} masks")
    client.node.destroy_publisher(publisher)
    client.node.destroy_subscription(subscription)
    return [(mask.header.stamp.sec, bytes(mask.data)) for mask in masks]


@pytest.mark.ros
def test_a_replay_of_several_cameras_keeps_them_apart(ros_client: Any, start_node: Any) -> None:
    start_node(
        "node.node", "-r", "__ns:=/rig", "-p", "engine:=scripted", "-p", "processing:=every_frame",
        "-p", "cameras:=[front, rear]",
    )  # fmt: skip
    stats = {name: ros_client.collect(DiagnosticArray, f"/rig/{name}/segmentation/stats") for name in ("front", "rear")}
    reliable = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
    cameras = {name: ros_client.node.create_publisher(Image, f"/rig/{name}/image", reliable) for name in stats}
    for camera in cameras.values():
        ros_client.spin_until(lambda camera=camera: camera.get_subscription_count() > 0, "the node's subscription")
    ros_client.spin_for(1.0)  # the node has to find this side, too: what it sends before is lost
    broken = image_message(np.zeros((8, 8, 3), np.uint8), "rgb8", Header(frame_id="rear"))
    broken.encoding = "32FC1"
    for index in range(5):
        header = Header(frame_id="front")
        header.stamp.sec = 1 + index
        cameras["front"].publish(image_message(np.zeros((8, 8, 3), np.uint8), "rgb8", header))
        cameras["rear"].publish(broken)
    diagnostics = ros_client.collect(DiagnosticArray, "/diagnostics")

    def counts(name: str) -> dict[str, str]:
        mine = [s for a in diagnostics for s in a.status if s.name == f"rig/segmentation: segmentation {name}"]
        return {pair.key: pair.value for pair in mine[-1].values} if mine else {}

    ros_client.spin_until(
        lambda: len(stats["front"]) == 5 and counts("rear").get("frames_rejected") == "5", "all ten frames"
    )
    assert not stats["rear"]
    assert [entry.header.stamp.sec for entry in stats["front"]] == [1, 2, 3, 4, 5]
    front = counts("front")
    assert (front["frames_segmented"], front["frames_rejected"], front["frames_failed"]) == ("5", "0", "0")


@pytest.mark.ros
def test_a_bag_played_too_fast_gives_every_mask_bit_for_bit(
    ros_client: Any, start_node: Any, make_toy_model: Any, rng: np.random.Generator
) -> None:
    model = make_toy_model(ClassSet.numbered(5))
    pictures = [rng.integers(0, 256, (96, 128, 3), dtype=np.uint8) for _ in range(60)]
    runs = []
    for run in range(2):
        process = start_node(
            "node.node", "-r", f"__ns:=/replay{run}", "-p", "processing:=every_frame", "-p", f"model:={model}",
            "-p", "device:=cpu", "-p", "latency_budget_ms:=1.0",
        )  # fmt: skip
        runs.append(replay(ros_client, process, f"/replay{run}", pictures))
        assert "latency_budget_ms has no effect: processing is every_frame" in process.output
        process.stop()
    assert [stamp for stamp, _ in runs[0]] == [1000 + index for index in range(60)]
    assert runs[0] == runs[1]
    assert len({mask for _, mask in runs[0]}) > 30, "masks of different pictures differ"
