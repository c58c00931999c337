# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Listens to a camera for a moment and says what a segmentation node would make of it, as one line of JSON.

`python -m clustvit_ros.demo.topic_probe TOPIC SECONDS MAX_IMAGE_PIXELS`; `clustvit-ros doctor` starts it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from clustvit_ros.compressed_images import decode_compressed
from clustvit_ros.dds import remove_leftovers
from clustvit_ros.errors import ImageError
from clustvit_ros.images import decode_image

_TYPES = {"sensor_msgs/msg/Image": Image, "sensor_msgs/msg/CompressedImage": CompressedImage}
_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
_NODE = "clustvit_topic_probe"


def probe(topic: str, seconds: float, max_pixels: int) -> dict[str, Any]:
    """What is published on `topic`.

    Args:
        topic: its name, resolved from the root namespace.
        seconds: how long to listen once there is a publisher; as long again is waited for one.
        max_pixels: larger images are refused.

    Returns:
        `publishers` (node, type, reliability, durability), `messages` and `rate_hz`, of the newest message `encoding`,
        `size` (height, width), `bytes`, `stamped` and `age_s`, `errors` (why messages cannot be segmented), and
        `image_topics` where nobody publishes on this one.
    """
    rclpy.init(args=[])
    node = rclpy.create_node(_NODE)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    topic = node.resolve_topic_name(topic)
    result: dict[str, Any] = {"topic": topic, "publishers": [], "messages": 0, "errors": []}
    arrivals_s: list[float] = []

    def on_message(message: Image | CompressedImage) -> None:
        arrivals_s.append(time.monotonic())
        stamp_s = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
        result.update(stamped=stamp_s > 0.0, age_s=time.time() - stamp_s, bytes=len(message.data))
        decode = decode_image if isinstance(message, Image) else decode_compressed
        try:
            pixels = decode(message, max_pixels)
            result.update(size=pixels.shape[:2])
        except ImageError as error:
            if str(error) not in result["errors"] and len(result["errors"]) < 5:
                result["errors"].append(str(error))
        result["encoding"] = getattr(message, "encoding", "") or getattr(message, "format", "")

    deadline_s = time.monotonic() + max(seconds, 2.0)
    while time.monotonic() < deadline_s and not node.count_publishers(topic):
        executor.spin_once(timeout_sec=0.05)
    publishers = node.get_publishers_info_by_topic(topic)
    result["publishers"] = [
        {
            "node": f"{info.node_namespace.rstrip('/')}/{info.node_name}",
            "type": info.topic_type,
            "reliability": info.qos_profile.reliability.name,
            "durability": info.qos_profile.durability.name,
        }
        for info in publishers
    ]
    kinds = [_TYPES[info.topic_type] for info in publishers if info.topic_type in _TYPES]
    if kinds:
        node.create_subscription(kinds[0], topic, on_message, _QOS)
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            executor.spin_once(timeout_sec=0.05)
    result["messages"] = len(arrivals_s)
    if len(arrivals_s) > 1:
        result["rate_hz"] = (len(arrivals_s) - 1) / max(arrivals_s[-1] - arrivals_s[0], 1e-9)
    names = (
        name
        for name, types in node.get_topic_names_and_types()
        if set(types) & set(_TYPES) and name != topic and node.count_publishers(name) and "/segmentation/" not in name
    )
    # Depth, labels and the like are images as well, and seldom called so.
    result["image_topics"] = sorted(names, key=lambda name: ("image" not in name, name))
    node.destroy_node()
    rclpy.try_shutdown()
    return result


def main() -> int:
    """Print what is published on the topic that the command line names."""
    remove_leftovers()
    print(json.dumps(probe(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
