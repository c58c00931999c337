"""Deterministic replay: every frame, in order, the same bits each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.errors import ConfigError
from clustvit_ros.node.conversions import image_message
from clustvit_ros.node.parameter_spec import build
from clustvit_ros.node.parameters import SegmentationParameters
from clustvit_ros.node.replay import FixedLatency, FrameQueue


def test_queue_keeps_order_and_counts_what_it_cannot_hold() -> None:
    queue: FrameQueue[bytes] = FrameQueue(10, len)
    for item in (b"aaaa", b"bbbb", b"cccc", b"dd"):
        queue.put(item)
    assert (queue.received, queue.dropped, queue.idle) == (4, 1, False)
    assert [queue.take(0.0) for _ in range(4)] == [b"aaaa", b"bbbb", b"dd", None]
    queue.put(b"larger than the limit")
    assert queue.take(0.0) == b"larger than the limit"
    assert queue.idle
    queue.put(b"left")
    queue.close()
    queue.put(b"late")
    assert queue.take() is None
    assert (queue.received, queue.dropped) == (7, 3)
    queue.reopen()
    queue.put(b"again")
    assert queue.take(0.0) == b"again"


def test_latency_settings_are_those_of_the_user() -> None:
    latency = FixedLatency(ScriptedEngine())
    parameters = build(
        SegmentationParameters,
        {"latency_budget_ms": 1, "deadline_policy": "drop", "token_capacity": 7, "processing": "every_frame"},
    )
    allowance = latency.allow((48, 64), parameters)
    assert (allowance.token_ceiling, allowance.budget_ms, allowance.policy) == (7, 0.0, "publish_late")
    with pytest.raises(ConfigError, match="expected 0 while processing is every_frame"):
        latency.check(SegmentationParameters(), parameters)
    latency.check(parameters, parameters)


def replay(client: Any, process: Any, namespace: str, pictures: list[np.ndarray]) -> list[tuple[int, bytes]]:
    """Publish all pictures at once, as a bag played far too fast, and collect (stamp, mask) in order of arrival."""
    reliable = QoSProfile(depth=len(pictures), reliability=ReliabilityPolicy.RELIABLE)
    masks: list[Image] = []
    subscription = client.node.create_subscription(Image, f"{namespace}/segmentation/mask", masks.append, len(pictures))
    publisher = client.node.create_publisher(Image, f"{namespace}/image", reliable)
    client.spin_until(lambda: publisher.get_subscription_count() > 0, "the node's subscription")
    client.spin_until(lambda: client.node.count_publishers(f"{namespace}/segmentation/mask") > 0, "the mask")
    for index, pixels in enumerate(pictures):
        header = Header(frame_id="bag")
        header.stamp.sec = 1000 + index
        publisher.publish(image_message(pixels, "rgb8", header))
    client.spin_until(lambda: len(masks) >= len(pictures), f"{len(pictures)} masks")
    client.node.destroy_publisher(publisher)
    client.node.destroy_subscription(subscription)
    return [(mask.header.stamp.sec, bytes(mask.data)) for mask in masks]


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
        assert "latency_budget_ms has no effect while processing is every_frame" in process.output
        process.stop()
    assert [stamp for stamp, _ in runs[0]] == [1000 + index for index in range(60)]
    assert runs[0] == runs[1]
    assert len({mask for _, mask in runs[0]}) > 30, "masks of different pictures differ"
