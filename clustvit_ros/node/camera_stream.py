"""One camera: what comes from it, and where its masks go. The engine behind it is shared."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rclpy.lifecycle import LifecycleNode
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from clustvit_ros.node.camera_outputs import CameraOutputs
from clustvit_ros.node.diagnostics import FrameCounts
from clustvit_ros.node.frame_pipeline import Frame
from clustvit_ros.node.input_watch import InputWatch
from clustvit_ros.node.parameters import SegmentationParameters
from clustvit_ros.node.qos import QosWatch, input_qos, overridable
from clustvit_ros.node.replay import REPLAY_OUTPUT_DEPTH, replay_qos
from clustvit_ros.policy import TopicStatistics


class CameraStream:
    """A camera's topics.

    Args:
        node: has the topics; publishers are made at once, subscriptions by `subscribe`.
        camera: comes before the topics' names; empty for the only camera.
        qos: told about peers with incompatible QoS.
        lossless: topics lose nothing, see `replay`.
    """

    def __init__(self, node: LifecycleNode, camera: str, qos: QosWatch, lossless: bool) -> None:
        self._node, self._qos, self._lossless = node, qos, lossless
        self.camera = camera
        self._prefix = f"{camera}/" if camera else ""
        self.outputs = CameraOutputs(
            node.create_lifecycle_publisher,
            camera,
            lambda topic: qos.publisher_events(node.resolve_topic_name(topic)),
            **({"depth": REPLAY_OUTPUT_DEPTH} if lossless else {}),
        )
        self._subscriptions: list[Any] = []
        self._on_frame: Callable[[Frame], None] = lambda frame: None
        self._camera_info: CameraInfo | None = None
        self.watch: InputWatch | None = None
        """Of the image topic; None while there is no subscription."""
        self.statistics = TopicStatistics()
        """Of the images that arrive."""
        self.reported = FrameCounts()
        """As the latest diagnostics had them."""
        self.first_mask_told = False

    @property
    def mask_topic(self) -> str:
        """The resolved name."""
        return self._node.resolve_topic_name(f"{self._prefix}segmentation/mask")

    def subscribe(self, parameters: SegmentationParameters, on_frame: Callable[[Frame], None]) -> str:
        """Begin to hand frames to `on_frame`.

        Returns:
            The resolved topic that they come from.
        """
        compressed = parameters.image_transport == "compressed"
        image_topic = self._node.resolve_topic_name(f"{self._prefix}image")
        topic = f"{image_topic}/compressed" if compressed else image_topic
        kind = CompressedImage if compressed else Image
        self._on_frame = on_frame
        self.statistics, self.reported, self.first_mask_told = TopicStatistics(), FrameCounts(), False
        self.watch = InputWatch(self._node, topic, f"sensor_msgs/msg/{kind.__name__}", self._qos)
        profile = replay_qos() if self._lossless else input_qos()
        # First: a frame that comes at once should find its calibration.
        self._listen(CameraInfo, self._camera_info_topic(image_topic), self._on_camera_info, input_qos())
        self._listen(kind, topic, self._on_image, profile)
        return topic

    def unsubscribe(self) -> None:
        """End the subscriptions; what came of them stays."""
        for subscription in self._subscriptions:
            self._qos.remove(subscription.topic_name)
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
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

    def take_messages(self) -> None:
        """Handle what has arrived; for callbacks that keep the executor long."""
        for subscription in self._subscriptions:
            with subscription.handle:
                while (taken := subscription.handle.take_message(subscription.msg_type, subscription.raw)) is not None:
                    subscription.callback(taken[0])

    def _listen(self, kind: type, topic: str, callback: Callable[[Any], None], profile: Any) -> None:
        subscription = self._node.create_subscription(
            kind, topic, callback, profile,
            event_callbacks=self._qos.subscription_events(topic), qos_overriding_options=overridable(),
        )  # fmt: skip
        self._subscriptions.append(subscription)

    def _camera_info_topic(self, image_topic: str) -> str:
        """Beside the image, as image_transport has it, unless it is remapped."""
        own = f"{self._prefix}camera_info"
        resolved = self._node.resolve_topic_name(own)
        remapped = resolved != self._node.resolve_topic_name(own, only_expand=True)
        return resolved if remapped else f"{image_topic.rpartition('/')[0]}/camera_info"

    def _on_camera_info(self, message: CameraInfo) -> None:
        self._camera_info = message

    def _on_image(self, message: Image | CompressedImage) -> None:
        if self.watch is None:
            return
        frame = Frame(message, self._node.get_clock().now().nanoseconds, self.camera, self._camera_info)
        self.watch.saw_image()
        stamp_ns = frame.stamp_ns
        self.statistics.add(time.monotonic(), (frame.arrival_ns - stamp_ns) / 1e6 if stamp_ns else None)
        self._on_frame(frame)
