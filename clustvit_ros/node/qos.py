# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Quality of service of the node's topics, how users override it, and why a peer or a camera may not be heard."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rclpy.node import Node
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSCompatibility,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
    qos_policy_name_from_kind,
)
from rclpy.qos_overriding_options import QoSOverridingOptions

from clustvit_ros.dds import IMAGE_TOPIC
from clustvit_ros.errors import ConfigError

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:  # Humble's name for the same module
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks

_MAX_SUGGESTIONS = 5


def input_qos() -> QoSProfile:
    """As sensor data, but keep the newest only: it is the one that will be segmented."""
    return QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


def output_qos(depth: int = 5) -> QoSProfile:
    """Reliable and volatile: consumers may ask for less.

    A new profile for every topic: rclpy writes a topic's overrides into the profile that it is given.
    """
    return QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE)


def latched_qos() -> QoSProfile:
    """Reliable and transient local: whoever comes late gets the newest message."""
    return QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


REPLAY_OUTPUT_DEPTH = 200
"""A consumer of a replay (`processing: every_frame`) may fall behind by so many masks."""


def replay_qos() -> QoSProfile:
    """Input of a replay, which loses nothing: the publisher must be reliable as well."""
    return QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE)


def overridable() -> QoSOverridingOptions:
    """History, depth, reliability and durability can be set with `qos_overrides` parameters."""
    kinds = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
    return QoSOverridingOptions(policy_kinds=kinds)


@contextlib.contextmanager
def overrides_told(node: Node, topic: str) -> Iterator[None]:
    """Names the override, and what it may be, where a topic cannot be made because of one.

    Raises:
        ConfigError: instead of rclpy's several errors.
    """
    try:
        yield
    except Exception as error:
        prefix = f"qos_overrides.{node.resolve_topic_name(topic)}."
        given = {name: item.value for name, item in node._parameter_overrides.items() if name.startswith(prefix)}
        if not given:
            raise
        raise ConfigError(
            f"got {', '.join(f'{name} {value!r}' for name, value in given.items())}, expected history keep_last or "
            "keep_all, depth a positive number, reliability reliable or best_effort, durability volatile or "
            f"transient_local ({error})"
        ) from error


class QosWatch:
    """Remembers which topics have peers that DDS refuses to match, until those peers are gone.

    Args:
        node: whose graph and logger to use.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._problems: dict[str, str] = {}

    def problem_of(self, *topics: str) -> str:
        """What is refused on these topics, and the remedy; empty when nothing is."""
        return "; ".join(self._problems[topic] for topic in topics if topic in self._problems)

    def publisher_events(self, topic: str) -> Any:
        """Event callbacks for a publisher on the resolved `topic`."""
        return PublisherEventCallbacks(incompatible_qos=lambda event: self._refused(topic, "publisher", event))

    def subscription_events(self, topic: str) -> Any:
        """Event callbacks for a subscription to the resolved `topic`."""
        return SubscriptionEventCallbacks(incompatible_qos=lambda event: self._refused(topic, "subscription", event))

    def remove(self, topic: str) -> None:
        """The publisher or subscription is gone, and its problems are."""
        self._problems.pop(topic, None)

    def check(self) -> None:
        """Forget problems whose peers have gone; call it from time to time."""
        for topic in list(self._problems):
            if not self._misfits(topic):
                del self._problems[topic]
                self._node.get_logger().info(f"nobody with incompatible QoS is left on {topic}")

    def _refused(self, topic: str, ours: str, event: Any) -> None:
        name = str(qos_policy_name_from_kind(event.last_policy_kind)).rpartition(".")[2]
        peer = "a publisher on" if ours == "subscription" else "a subscriber of"
        does = "offers" if ours == "subscription" else "asks for"
        fate = "is not heard" if ours == "subscription" else "gets no messages"
        self._problems[topic] = (
            f"{peer} {topic} {does} incompatible QoS ({name}) and {fate}; change it there, or set "
            f"qos_overrides.{topic}.{ours}.{name.lower()} here (`ros2 topic info -v {topic}` shows both sides)"
        )
        self._node.get_logger().warning(self._problems[topic])

    def _misfits(self, topic: str) -> bool:
        """One of the node's own endpoints and a peer are still incompatible.

        Both sides as the graph has them: a profile as it was written leaves policies out that DDS fills in.
        """
        publishers = self._node.get_publishers_info_by_topic(topic)
        subscriptions = self._node.get_subscriptions_info_by_topic(topic)
        own = (self._node.get_name(), self._node.get_namespace())
        return any(
            qos_check_compatible(publisher.qos_profile, subscription.qos_profile)[0] == QoSCompatibility.ERROR
            for publisher in publishers
            for subscription in subscriptions
            if own in ((end.node_name, end.node_namespace) for end in (publisher, subscription))
        )


class InputWatch:
    """Notices that no images come on a topic, and finds out from the ROS graph why that may be.

    Args:
        node: whose graph and logger to use.
        topic: resolved name of the image topic.
        type_name: message type of the subscription, e.g. "sensor_msgs/msg/Image".
        qos: knows about publishers that are not heard.
        clock: gives monotonic seconds.
    """

    def __init__(
        self, node: Node, topic: str, type_name: str, qos: QosWatch, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._node, self.topic, self._type_name = node, topic, type_name
        self._qos, self._clock = qos, clock
        self._last_s = clock()
        self._told = self._told_losses = False

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

    def check(self, timeout_s: float, losses: str = "") -> None:
        """Log once per silence longer than `timeout_s`, with what the graph tells, and once when pictures get lost.

        Args:
            timeout_s: seconds without an image that are none too many.
            losses: what of them gets lost, or empty.
        """
        if losses and not self._told_losses:
            self._node.get_logger().warning(f"{self.topic}: {losses}")
        self._told_losses = bool(losses)
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
        transport = "raw" if self._type_name.endswith("CompressedImage") else "compressed"
        if other_types:
            found = ", ".join(other_types)
            remedy = f"set image_transport:={transport} or remap `{IMAGE_TOPIC}`"
            return f"it carries {found}, expected {self._type_name}; {remedy}"
        if publishers:
            return (
                f"{len(publishers)} publisher(s) there, but nothing arrives; check that the camera runs, both sides' "
                f"QoS with `ros2 topic info -v {self.topic}`, and, of large images, that both have the DDS profile"
            )
        sibling = self.topic.removesuffix("/compressed") if transport == "raw" else f"{self.topic}/compressed"
        if self._node.count_publishers(sibling):
            return f"nobody publishes there, but on {sibling}; set image_transport:={transport}"
        elsewhere = [
            name
            for name, types in self._node.get_topic_names_and_types()
            if self._type_name in types and name != self.topic and self._node.count_publishers(name) > 0
            and not {"segmentation", self._node.get_name()} & set(name.split("/")[:-1])
        ]  # fmt: skip
        found = f"; images are published on {', '.join(elsewhere[:_MAX_SUGGESTIONS])}" if elsewhere else ""
        remap = f"`image_topic:=<topic>` of a launch file, else `-r {IMAGE_TOPIC}:=<topic>`"
        return f"nobody publishes there; start the camera or remap with {remap}{found}"
