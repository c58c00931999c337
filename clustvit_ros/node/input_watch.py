"""Notices that no images come, and finds out from the ROS graph why that may be."""

from __future__ import annotations

import time
from collections.abc import Callable

from rclpy.node import Node

from clustvit_ros.node.qos import QosWatch

_MAX_SUGGESTIONS = 5


class InputWatch:
    """Watches one image subscription.

    Args:
        node: whose graph and logger to use.
        topic: the resolved topic name.
        type_name: the message type, e.g. "sensor_msgs/msg/Image".
        qos: knows about publishers that are not heard.
        clock: monotonic seconds.
    """

    def __init__(
        self, node: Node, topic: str, type_name: str, qos: QosWatch, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._node = node
        self.topic = topic
        self._type_name = type_name
        self._clock = clock
        self._last_s = clock()
        self._told = False
        self._qos = qos

    @property
    def silence_s(self) -> float:
        """Seconds since the newest image, or since the watch began."""
        return self._clock() - self._last_s

    def saw_image(self) -> None:
        """Call with every image that arrives."""
        self._last_s = self._clock()
        if self._told:
            self._told = False
            self._node.get_logger().info(f"images arrive again on {self.topic}")

    def check(self, timeout_s: float) -> None:
        """Log once per silence longer than `timeout_s`, with what the graph tells."""
        if self._told or self.silence_s <= timeout_s:
            return
        self._told = True
        self._node.get_logger().warning(f"no image on {self.topic} for {self.silence_s:.1f} s: {self._explain()}")

    def _explain(self) -> str:
        problem = self._qos.problem_of(self.topic)
        if problem:
            return problem
        publishers = self._node.get_publishers_info_by_topic(self.topic)
        other_types = sorted({info.topic_type for info in publishers} - {self._type_name})
        if other_types:
            found = ", ".join(other_types)
            return f"it carries {found}, expected {self._type_name}; remap `image` or set image_transport"
        if publishers:
            return (
                f"{len(publishers)} publisher(s) there, but nothing arrives; check that the camera runs, and both "
                f"sides' QoS with `ros2 topic info -v {self.topic}`"
            )
        elsewhere = [
            name
            for name, types in self._node.get_topic_names_and_types()
            if self._type_name in types and name != self.topic and self._node.count_publishers(name) > 0
            and "/segmentation/" not in name
        ]  # fmt: skip
        found = f"; images are published on {', '.join(elsewhere[:_MAX_SUGGESTIONS])}" if elsewhere else ""
        return f"nobody publishes there; start the camera or remap with `-r image:=<topic>`{found}"
