"""What happens to one camera frame: decode, segment, publish. Runs in the worker's thread and keeps no settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CompressedImage, Image

from clustvit_ros.control import Allowance, Misses
from clustvit_ros.ros.compressed import decode_compressed
from clustvit_ros.ros.conversions import decode_image, image_message
from clustvit_ros.ros.latency_control import LatencyControl
from clustvit_ros.ros.overlay import draw_overlay
from clustvit_ros.ros.parameters import SegmentationParameters
from clustvit_ros.ros.replay import FixedLatency
from clustvit_ros.runtime import Engine, Prediction, Stats

OUTPUT_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
"""Reliable and volatile: consumers may ask for less."""

_IMAGE_OUTPUTS = ("mask", "confidence", "overlay", "clusters")


@dataclass(frozen=True)
class Frame:
    """A camera message and when it came.

    Args:
        message: sensor_msgs Image or CompressedImage.
        arrival_ns: node clock, nanoseconds.
    """

    message: Image | CompressedImage
    arrival_ns: int


@dataclass(frozen=True)
class FrameReport:
    """What one frame went through; every duration in milliseconds.

    Args:
        image_size: (height, width) of the camera image.
        mask_size: (height, width) of the mask.
        engine: what the engine did under which settings.
        allowance: the latency settings of this frame.
        deadline_missed: it took longer than its budget.
        misses: of all frames so far, this one included.
        published: the mask went out; only a late one may not.
        confidence_threshold: the threshold in force.
        decode_ms: message to RGB array.
        publish_ms: mask and confidence to messages, handed to DDS.
        arrival_age_ms: from the frame's stamp to its arrival, node clock; 0 when it has none.
        age_ms: from the frame's stamp (from its arrival when it has none) to the publication of the mask, node clock.
        stamped: the frame had a stamp.
    """

    image_size: tuple[int, int]
    mask_size: tuple[int, int]
    engine: Stats
    allowance: Allowance
    deadline_missed: bool
    misses: Misses
    published: bool
    confidence_threshold: float
    decode_ms: float
    publish_ms: float
    arrival_age_ms: float
    age_ms: float
    stamped: bool


class MaskPublishers:
    """The node's image outputs below `segmentation/`.

    Args:
        create: the node's `create_lifecycle_publisher` or `create_publisher`.
        qos: where `qos_overrides` say nothing else.
    """

    def __init__(self, create: Callable[..., Any], qos: QoSProfile = OUTPUT_QOS) -> None:
        overrides = QoSOverridingOptions.with_default_policies
        self._publishers = {
            name: create(Image, f"segmentation/{name}", qos, qos_overriding_options=overrides())
            for name in _IMAGE_OUTPUTS
        }

    def all(self) -> list[Any]:
        """The publishers, to be destroyed."""
        return list(self._publishers.values())

    def wanted(self, name: str) -> bool:
        """True when somebody subscribes to `segmentation/<name>`."""
        return self._publishers[name].get_subscription_count() > 0

    def publish(self, name: str, pixels: np.ndarray, encoding: str, header: Any) -> None:
        """Publish an array on `segmentation/<name>` with the frame's own header."""
        self._publishers[name].publish(image_message(pixels, encoding, header))


class FramePipeline:
    """Turns frames into published masks.

    Args:
        engine: used by one thread at a time.
        publishers: where results go.
        now_ns: node clock, nanoseconds.
        latency: says how many tokens a frame may keep, and learns what that cost.
    """

    def __init__(
        self,
        engine: Engine,
        publishers: MaskPublishers,
        now_ns: Callable[[], int],
        latency: LatencyControl | FixedLatency,
    ) -> None:
        self._engine = engine
        self._latency = latency
        self._publishers = publishers
        self._now_ns = now_ns
        self._palette = engine.info.classes.palette()

    def process(self, frame: Frame, parameters: SegmentationParameters) -> FrameReport:
        """Segment one frame under one set of parameters and publish what is wanted.

        Raises:
            ImageError: the message cannot be segmented.
            Exception: whatever the engine raises.
        """
        start_s = time.perf_counter()
        decode = decode_image if isinstance(frame.message, Image) else decode_compressed
        image = decode(frame.message, parameters.max_image_pixels)
        decode_ms = _since_ms(start_s)

        image_size = (image.shape[0], image.shape[1])
        allowance = self._latency.allow(image_size, parameters)
        settings = parameters.settings(
            self._engine.info.input_size,
            confidence=self._publishers.wanted("confidence"),
            clusters=self._publishers.wanted("clusters"),
        )
        settings = replace(settings, token_capacity=allowance.token_ceiling)
        prediction = self._engine.segment(image, settings)

        start_s = time.perf_counter()
        header = frame.message.header
        mask = prediction.mask[0]
        stamp_ns = header.stamp.sec * 1_000_000_000 + header.stamp.nanosec
        engine_ms, age_ms = prediction.stats.total_ms, self._age_ms(stamp_ns or frame.arrival_ns)
        published = allowance.policy != "drop" or not allowance.is_missed(engine_ms, age_ms)
        if published:
            self._publishers.publish("mask", mask, "mono8" if mask.dtype == np.uint8 else "mono16", header)
            age_ms = self._age_ms(stamp_ns or frame.arrival_ns)
            self._publish_companions(prediction, header)
        publish_ms = _since_ms(start_s)
        missed = allowance.is_missed(engine_ms, age_ms)
        misses = self._latency.observe(allowance, prediction.stats, age_ms, missed)

        if published and self._publishers.wanted("overlay"):
            overlay = draw_overlay(image, mask, self._palette, parameters.overlay_alpha)
            self._publishers.publish("overlay", overlay, "rgb8", header)
        return FrameReport(
            image_size=image_size,
            mask_size=(mask.shape[0], mask.shape[1]),
            engine=prediction.stats,
            allowance=allowance,
            deadline_missed=missed,
            misses=misses,
            published=published,
            confidence_threshold=settings.confidence_threshold,
            decode_ms=decode_ms,
            publish_ms=publish_ms,
            arrival_age_ms=(frame.arrival_ns - stamp_ns) / 1e6 if stamp_ns else 0.0,
            age_ms=age_ms,
            stamped=stamp_ns != 0,
        )

    def use_idle_time(self, idle: Callable[[], bool]) -> None:
        """Do what can wait, as long as `idle()`: see `LatencyControl.use_idle_time`."""
        self._latency.use_idle_time(idle)

    def _publish_companions(self, prediction: Prediction, header: Any) -> None:
        for name, maps in (("confidence", prediction.confidence), ("clusters", prediction.cluster_map)):
            if maps is not None:
                self._publishers.publish(name, maps[0], "mono8", header)

    def _age_ms(self, since_ns: int) -> float:
        return (self._now_ns() - since_ns) / 1e6


def _since_ms(start_s: float) -> float:
    return (time.perf_counter() - start_s) * 1000.0
