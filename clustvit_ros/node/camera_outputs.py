"""What the node publishes for one camera, below `segmentation/`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from clustvit_ros.classes import ClassSet
from clustvit_ros.errors import ImageError
from clustvit_ros.node import label_info
from clustvit_ros.node.camera_info import scaled_camera_info
from clustvit_ros.node.conversions import image_message
from clustvit_ros.node.qos import latched_qos, output_qos, overridable

_KINDS = {
    "mask": Image, "confidence": Image, "overlay": Image, "clusters": Image, "mask/compressed": CompressedImage,
    "camera_info": CameraInfo, "stats": DiagnosticArray,
}  # fmt: skip
# Masks are flat areas: the fastest level already makes them a fiftieth of their size.
_PNG_LEVEL = 1


class CameraOutputs:
    """One camera's publishers.

    Args:
        create: the node's `create_lifecycle_publisher` or `create_publisher`.
        camera: its name comes before `segmentation/`; empty for the only camera.
        events: event callbacks for the publisher on a topic.
        depth: so many messages are kept for consumers that fall behind.
    """

    def __init__(
        self,
        create: Callable[..., Any],
        camera: str = "",
        events: Callable[[str], Any] = lambda topic: None,
        depth: int = 5,
    ) -> None:
        base = f"{camera}/segmentation" if camera else "segmentation"

        def make(name: str, kind: type, qos: Any) -> Any:
            topic = f"{base}/{name}"
            return create(kind, topic, qos, event_callbacks=events(topic), qos_overriding_options=overridable())

        self._publishers = {name: make(name, kind, output_qos(depth)) for name, kind in _KINDS.items()}
        if label_info.AVAILABLE:
            self._publishers["label_info"] = make("label_info", label_info.LabelInfo, latched_qos())
        self._labels: tuple[ClassSet, float] | None = None
        self._labels_lock = threading.Lock()

    def all(self) -> list[Any]:
        """The publishers, to be watched or destroyed."""
        return list(self._publishers.values())

    def wanted(self, name: str) -> bool:
        """True when somebody subscribes to `segmentation/<name>`."""
        return self._publishers[name].get_subscription_count() > 0

    def publish(self, name: str, pixels: np.ndarray, encoding: str, header: Any) -> None:
        """Publish an array on `segmentation/<name>` with the frame's own header."""
        self._publishers[name].publish(image_message(pixels, encoding, header))

    def publish_labels(self, classes: ClassSet, confidence_threshold: float, header: Any) -> None:
        """Publish the label info, unless it is what was published last; any thread may.

        Args:
            classes: of the mask.
            confidence_threshold: below it pixels are unlabelled.
            header: of the first frame that it holds for.
        """
        with self._labels_lock:
            labels = (classes, confidence_threshold)
            if "label_info" in self._publishers and labels != self._labels:
                self._labels = labels
                self._publishers["label_info"].publish(label_info.label_info_message(*labels, header))

    def publish_camera_info(self, info: CameraInfo, size: tuple[int, int], header: Any) -> None:
        """Publish the intrinsics of a mask of (height, width) `size`."""
        self._publishers["camera_info"].publish(scaled_camera_info(info, size, header))

    def publish_compressed(self, mask: np.ndarray, encoding: str, header: Any) -> None:
        """Publish a mask as PNG, in the format string of compressed_image_transport.

        Raises:
            ImageError: OpenCV cannot encode it.
        """
        good, data = cv2.imencode(".png", mask, (cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL))
        if not good:
            raise ImageError(f"mask of {mask.shape} {mask.dtype}: cannot be encoded as PNG")
        message = CompressedImage(header=header, format=f"{encoding}; png compressed {encoding}")
        message.data.frombytes(data.data)
        self._publishers["mask/compressed"].publish(message)

    def publish_stats(self, array: DiagnosticArray) -> None:
        """Publish one frame's statistics."""
        self._publishers["stats"].publish(array)
