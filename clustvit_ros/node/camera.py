# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""One camera: the topics that it publishes, and those of its masks. The engine behind it is shared."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.lifecycle import LifecycleNode
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2

from clustvit_ros.classes import ClassSet
from clustvit_ros.dds import IMAGE_TOPIC
from clustvit_ros.errors import ImageError
from clustvit_ros.images import Intensities
from clustvit_ros.jpeg import KnownEdges
from clustvit_ros.node.messages import LabelInfo, image_message, label_info_message, scaled_camera_info, stamp_ns
from clustvit_ros.node.points import LabelledPoints, PointsOrder
from clustvit_ros.node.qos import (
    REPLAY_OUTPUT_DEPTH,
    InputWatch,
    QosWatch,
    input_qos,
    latched_qos,
    output_qos,
    overridable,
    overrides_told,
    replay_qos,
)
from clustvit_ros.policy.ledger import Ledger
from clustvit_ros.policy.parameters import SegmentationParameters
from clustvit_ros.policy.plan import FramePace

_OUTPUTS = {
    "mask": Image, "confidence": Image, "overlay": Image, "clusters": Image, "mask/compressed": CompressedImage,
    "camera_info": CameraInfo, "points": PointCloud2, "stats": DiagnosticArray,
}  # fmt: skip
_POINTS_CHECK_S, _LOG_PERIOD_S = 1.0, 5.0
# So long after its last message, a calibration whose publisher is gone is none any more.
_INFO_GONE_S = 2.0


_NUMBERS = itertools.count()


@dataclass
class Fate:
    """What has been decided about a frame; several threads have their part in it.

    Args:
        arrival_s: monotonic seconds of its arrival.
        taken_s: monotonic seconds at which the engine's thread took it; None before.
        expected: the engine had nothing else to do when it came, and was to get it.
        over_rate: there are more frames than `max_rate_hz`, and this is one too many.
        dropped: the engine will not see it.
        left: no mask will be carried to it.
        filled: it got a carried mask, or one was withheld as too late.
        ended: it is settled that it gets no mask: it was rejected, or the engine failed on it.
    """

    arrival_s: float = field(default_factory=time.monotonic)
    taken_s: float | None = None
    expected: bool = False
    over_rate: bool = False
    dropped: bool = False
    left: bool = True
    filled: bool = False
    ended: bool = False


@dataclass(frozen=True)
class Frame:
    """A camera message and when it came.

    Args:
        message: sensor_msgs Image or CompressedImage.
        arrival_ns: nanoseconds of the node's clock.
        camera: name of the camera that it is from; empty for the only one.
        camera_info: the newest calibration that had come from the camera by then.
        points: to be fulfilled with its mask where labelled points are wanted.
        number: larger than that of every frame before.
        fate: what has been decided about it.
    """

    message: Image | CompressedImage
    arrival_ns: int
    camera: str = ""
    camera_info: CameraInfo | None = None
    points: PointsOrder | None = None
    number: int = field(default_factory=_NUMBERS.__next__)
    fate: Fate = field(default_factory=Fate)
    _image: list[np.ndarray | str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def image(self, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """Its picture, decoded once, by whichever thread needs it first: at a second look, damage passes for a scene.

        Raises:
            ImageError: it cannot be decoded, whoever asks.
        """
        with self._lock:
            if not self._image:
                try:
                    self._image.append(decode())
                except ImageError as error:
                    self._image.append(str(error))
            image = self._image[0]
        if isinstance(image, str):
            raise ImageError(image)
        return image

    @property
    def held_bytes(self) -> int:
        """The memory that it takes while it waits, with the cloud that waits for its mask."""
        return len(self.message.data) + (0 if self.points is None else self.points.cloud_bytes)

    @cached_property
    def stamp_ns(self) -> int:
        """Nanoseconds of the message's stamp; 0 when it has none."""
        return stamp_ns(self.message)

    @property
    def time_ns(self) -> int:
        """When it was taken, as far as that is known: its stamp, or its arrival when it has none."""
        return self.stamp_ns or self.arrival_ns

    @cached_property
    def arrival_age_ms(self) -> float | None:
        """Milliseconds from the stamp to the arrival, negative for one in the future; None without stamp or clock."""
        return (self.arrival_ns - self.stamp_ns) / 1e6 if self.stamp_ns and self.arrival_ns else None

    def age_ms(self, now_ns: int) -> float:
        """Milliseconds since it was taken, or since its arrival while the node's clock (`now_ns`) tells no time."""
        if not self.arrival_ns:
            return (time.monotonic() - self.fate.arrival_s) * 1000.0
        return (now_ns - self.time_ns) / 1e6


class Outputs:
    """One camera's publishers, below one name.

    Args:
        create: the node's `create_lifecycle_publisher` or `create_publisher`.
        base: what comes before the topics' own names.
        events: gives event callbacks for the publisher on a topic.
        depth: how many messages are kept for consumers that fall behind.
    """

    def __init__(
        self, create: Callable[..., Any], base: str = "segmentation",
        events: Callable[[str], Any] = lambda topic: None, depth: int = 5,
    ) -> None:  # fmt: skip
        def make(name: str, kind: type, qos: Any) -> Any:
            topic = f"{base}/{name}"
            return create(kind, topic, qos, event_callbacks=events(topic), qos_overriding_options=overridable())

        self._publishers = {name: make(name, kind, output_qos(depth)) for name, kind in _OUTPUTS.items()}
        if LabelInfo is not None:
            self._publishers["label_info"] = make("label_info", LabelInfo, latched_qos())
        self._labels: tuple[ClassSet, float] | None = None
        self._labels_lock = threading.Lock()

    def all(self) -> list[Any]:
        """The publishers, to be watched or destroyed."""
        return list(self._publishers.values())

    def wanted(self, name: str) -> bool:
        """Whether somebody subscribes to `segmentation/<name>`."""
        return self._publishers[name].get_subscription_count() > 0

    @property
    def watched(self) -> bool:
        """Whether somebody subscribes to anything that comes with a frame."""
        return any(self.wanted(name) for name in _OUTPUTS)

    def publish(self, name: str, message: Any) -> None:
        """Publish a message on `segmentation/<name>`."""
        self._publishers[name].publish(message)

    def publish_pixels(self, name: str, pixels: np.ndarray, encoding: str, header: Any) -> None:
        """Publish an array on `segmentation/<name>` with the frame's own header."""
        self._publishers[name].publish(image_message(pixels, encoding, header))

    def publish_labels(self, classes: ClassSet, confidence_threshold: float, header: Any) -> None:
        """Publish the label info, unless it is what was published last; any thread may.

        Args:
            classes: classes of the mask.
            confidence_threshold: confidence below which pixels are unlabelled.
            header: header of the first frame that it holds for.
        """
        with self._labels_lock:
            labels, publisher = (classes, confidence_threshold), self._publishers.get("label_info")
            # What a lifecycle publisher gets while the node is inactive is lost, and must not count as told.
            if publisher is not None and labels != self._labels and getattr(publisher, "is_activated", True):
                self._labels = labels
                publisher.publish(label_info_message(*labels, header))

    def publish_camera_info(
        self, info: CameraInfo, image_size: tuple[int, int], size: tuple[int, int], header: Any
    ) -> None:
        """Publish the intrinsics of a mask of (height, width) `size`, whose image had `image_size`."""
        self._publishers["camera_info"].publish(scaled_camera_info(info, image_size, size, header))


class Camera:
    """A camera's topics and what became of its frames.

    Args:
        node: has the topics; publishers are made at once, subscriptions by `subscribe`.
        name: comes before the topics' names; empty for the only camera.
        qos: told about peers with incompatible QoS.
        parameters: values in force for its frames; replaced as a whole when they change.
    """

    def __init__(self, node: LifecycleNode, name: str, qos: QosWatch, parameters: SegmentationParameters) -> None:
        self._node, self._qos = node, qos
        self.name = name
        self._prefix = f"{name}/" if name else ""
        self.parameters = parameters
        self.outputs = Outputs(
            self._create_publisher, f"{self._prefix}{node.get_name()}",
            lambda topic: qos.publisher_events(node.resolve_topic_name(topic)),
            **({} if parameters.adapts else {"depth": REPLAY_OUTPUT_DEPTH}),
        )  # fmt: skip
        self._subscriptions: list[Any] = []
        self._on_frame: Callable[[Frame, str], None] = lambda frame, camera: None
        self._pace = FramePace()
        self._camera_info: CameraInfo | None = None
        self._info_came_s = 0.0
        self._image_kind: tuple[Any, ...] | None = None
        self._points: LabelledPoints | None = None
        self._points_checked_s = 0.0
        self.intensities = Intensities()
        """Of its 16-bit images."""
        self.known_edges = KnownEdges()
        """Of its JPEG images."""
        self.watch: InputWatch | None = None
        """Of the image topic; None while there is no subscription."""
        self.ledger = Ledger()
        """Its frames since it was subscribed to."""

    @property
    def mask_topic(self) -> str:
        """The resolved name."""
        return self._node.resolve_topic_name(f"{self._prefix}{self._node.get_name()}/mask")

    def subscribe(self, on_frame: Callable[[Frame, str], None]) -> str:
        """Begin to hand frames, and the camera's name, to `on_frame`.

        Returns:
            The resolved topic that they come from.
        """
        compressed = self.parameters.image_transport == "compressed"
        topic = f"{self._image_topic}/compressed" if compressed else self._image_topic
        kind = CompressedImage if compressed else Image
        self._on_frame = on_frame
        self.ledger = Ledger()
        self.watch = InputWatch(self._node, topic, f"sensor_msgs/msg/{kind.__name__}", self._qos)
        # First: a frame that comes at once should find its calibration.
        self._listen(CameraInfo, self._beside("camera_info"), self._on_camera_info, input_qos())
        self._listen(kind, topic, self._on_image, self._input_qos())
        self._follow_points(time.monotonic())
        return topic

    def unsubscribe(self) -> None:
        """End the subscriptions; what came of them stays."""
        for subscription in self._subscriptions:
            self._qos.remove(subscription.topic_name)
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
        self._end_points()
        self.watch = None

    def destroy(self) -> None:
        """Give the publishers back; not while a frame is being published."""
        self.unsubscribe()
        for publisher in self.outputs.all():
            self._qos.remove(publisher.topic_name)
            self._node.destroy_lifecycle_publisher(publisher)

    def qos_problems(self) -> tuple[str, str]:
        """Peers that DDS refuses to match: cameras that are not heard, and consumers that hear nothing."""
        inputs = (subscription.topic_name for subscription in self._subscriptions)
        outputs = (publisher.topic_name for publisher in self.outputs.all())
        return self._qos.problem_of(*inputs), self._qos.problem_of(*outputs)

    def _create_publisher(self, kind: type, topic: str, *arguments: Any, **options: Any) -> Any:
        with overrides_told(self._node, topic):
            return self._node.create_lifecycle_publisher(kind, topic, *arguments, **options)

    def _listen(self, kind: type, topic: str, callback: Callable[[Any], None], profile: Any) -> None:
        with overrides_told(self._node, topic):
            subscription = self._node.create_subscription(
                kind, topic, callback, profile,
                event_callbacks=self._qos.subscription_events(topic), qos_overriding_options=overridable(),
            )  # fmt: skip
        self._subscriptions.append(subscription)

    def _input_qos(self) -> Any:
        return input_qos() if self.parameters.adapts else replay_qos()

    @property
    def _image_topic(self) -> str:
        topic = self._node.resolve_topic_name(f"{self._prefix}{IMAGE_TOPIC}")
        # Whoever names the compressed topic itself means that camera.
        return topic.removesuffix("/compressed") if self.parameters.image_transport == "compressed" else topic

    def _beside(self, name: str) -> str:
        """A topic beside the image's, as image_transport has `camera_info`, unless it is remapped."""
        own = f"{self._prefix}{name}"
        resolved = self._node.resolve_topic_name(own)
        remapped = resolved != self._node.resolve_topic_name(own, only_expand=True)
        return resolved if remapped else f"{self._image_topic.rpartition('/')[0]}/{name}"

    def _follow_points(self, now_s: float) -> LabelledPoints | None:
        """Listen to clouds, or to depth where no cloud is published, as long as somebody subscribes to points."""
        if not self.outputs.wanted("points"):
            self._end_points()
        elif now_s - self._points_checked_s > _POINTS_CHECK_S:
            self._points_checked_s = now_s
            cloud, depth = self._beside("points"), self._beside("depth")
            by_depth = not self._node.count_publishers(cloud) and self._node.count_publishers(depth) > 0
            topic = depth if by_depth else cloud
            if self._points is None or self._points.topic != topic:
                self._end_points()
                self._points_checked_s = now_s
                ledger, publish = self.ledger, lambda message: self.outputs.publish("points", message)
                self._points = LabelledPoints(
                    topic, lambda: self.parameters, publish, lambda *fate: self._report_points(ledger, *fate)
                )
                self._listen(Image if by_depth else PointCloud2, topic, self._points.add_cloud, self._input_qos())
        return self._points

    def _end_points(self) -> None:
        points, self._points, self._points_checked_s = self._points, None, 0.0
        if points is not None:
            points.close()
            for subscription in [each for each in self._subscriptions if each.topic_name == points.topic]:
                self._subscriptions.remove(subscription)
                self._qos.remove(points.topic)
                self._node.destroy_subscription(subscription)

    def _report_points(self, ledger: Ledger, fate: str, problem: str) -> None:
        ledger.add_points(fate, problem)
        if problem and self._node.context.ok():
            name = f"{self.name}: " if self.name else ""
            self._node.get_logger().warning(f"{name}no labelled points: {problem}", throttle_duration_sec=_LOG_PERIOD_S)

    def _on_camera_info(self, message: CameraInfo) -> None:
        self._camera_info, self._info_came_s, self._image_kind = message, time.monotonic(), None

    def _calibration(self, message: Image | CompressedImage, now_s: float) -> CameraInfo | None:
        """The newest calibration, unless it is of a camera that is gone or has changed since it came."""
        kind = (message.header.frame_id, getattr(message, "height", 0), getattr(message, "width", 0))
        before, self._image_kind = self._image_kind, kind
        if self._camera_info is None:
            return None
        reason = ""
        if before not in (None, kind):
            was, now = (f"{width}x{height} of {frame_id!r}" for frame_id, height, width in (before, kind))
            reason = f"images changed from {was} to {now}"
        elif now_s - self._info_came_s > _INFO_GONE_S:
            self._info_came_s = now_s
            reason = "" if self._node.count_publishers(self._beside("camera_info")) else "its publisher is gone"
        if reason:
            self._camera_info = None
            name = f"{self.name}: " if self.name else ""
            self._node.get_logger().warning(
                f"{name}the camera_info that came is dropped until another comes: {reason}",
                throttle_duration_sec=_LOG_PERIOD_S,
            )
        return self._camera_info

    def _on_image(self, message: Image | CompressedImage) -> None:
        if self.watch is None:
            return
        points, info = self._follow_points(time.monotonic()), self._calibration(message, time.monotonic())
        order = points.order(message.header, info) if points is not None else None
        frame = Frame(message, self._node.get_clock().now().nanoseconds, self.name, info, order)
        self.watch.saw_image()
        now_s = frame.fate.arrival_s
        self.ledger.receive(now_s, frame.arrival_age_ms, frame.stamp_ns)
        rate_hz = self.parameters.max_rate_hz if self.parameters.adapts else 0.0
        frame.fate.over_rate = not self._pace.admits(now_s, rate_hz)
        self._on_frame(frame, self.name)
