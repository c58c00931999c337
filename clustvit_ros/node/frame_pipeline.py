"""What happens to camera frames: decode, segment, publish. Runs in the worker's thread and keeps no settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from clustvit_ros.compressed_images import decode_compressed
from clustvit_ros.engine import Engine, Prediction, Settings, Stats
from clustvit_ros.engine.batching import BatchGain
from clustvit_ros.engine.class_groups import ClassGrouping, group_classes
from clustvit_ros.node.camera_outputs import CameraOutputs
from clustvit_ros.node.conversions import decode_image
from clustvit_ros.node.latency_control import LatencyControl
from clustvit_ros.node.merge_guard import MergeGuard
from clustvit_ros.node.overlay import draw_overlay
from clustvit_ros.node.parameters import SegmentationParameters
from clustvit_ros.node.replay import FixedLatency
from clustvit_ros.policy import Allowance, Misses


@dataclass(frozen=True)
class Frame:
    """A camera message and when it came.

    Args:
        message: sensor_msgs Image or CompressedImage.
        arrival_ns: node clock, nanoseconds.
        camera: whose it is; empty for the only camera.
        camera_info: the newest that had come from the camera by then.
    """

    message: Image | CompressedImage
    arrival_ns: int
    camera: str = ""
    camera_info: CameraInfo | None = None

    @property
    def stamp_ns(self) -> int:
        """Nanoseconds of the message's stamp; 0 when it has none."""
        stamp = self.message.header.stamp
        return stamp.sec * 1_000_000_000 + stamp.nanosec


@dataclass(frozen=True)
class DecodedFrame:
    """A frame that can be segmented.

    Args:
        frame: the message.
        parameters: in force for it.
        image: (H, W, 3) uint8 RGB.
        settings: what the engine is to do with it, the token ceiling aside.
        decode_ms: message to RGB array.
    """

    frame: Frame
    parameters: SegmentationParameters
    image: np.ndarray
    settings: Settings
    decode_ms: float

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True)
class FrameReport:
    """What one frame went through; every duration in milliseconds.

    Args:
        image_size: (height, width) of the camera image.
        mask_size: (height, width) of the mask.
        batch: so many images were segmented together.
        engine: what the engine did under which settings; its times are those of the batch.
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
    batch: int
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


class FramePipeline:
    """Turns frames into published masks, with one engine.

    Args:
        engine: used by one thread at a time.
        outputs: camera -> where its results go.
        now_ns: node clock, nanoseconds.
        latency: says how many tokens a frame may keep, and learns what that cost.
        gain: what batching brings with this engine; None where frames are never batched.
    """

    def __init__(
        self,
        engine: Engine,
        outputs: Mapping[str, CameraOutputs],
        now_ns: Callable[[], int],
        latency: LatencyControl | FixedLatency,
        gain: BatchGain | None = None,
    ) -> None:
        self._engine = engine
        self._latency = latency
        self._outputs = outputs
        self._now_ns = now_ns
        self.guard = MergeGuard(engine)
        self._batches = gain is not None and gain.worthwhile

    def process(self, frame: Frame, parameters: SegmentationParameters) -> FrameReport:
        """Segment one frame under one set of parameters and publish what is wanted.

        Raises:
            ImageError: the message cannot be segmented.
            Exception: whatever the engine raises.
        """
        return self.segment([self.decode(frame, parameters)])[0]

    def may_batch(self, parameters: SegmentationParameters) -> bool:
        """Frames that wait may go together: it is faster, and no budget is set, which bounds each frame by itself."""
        return self._batches and not parameters.latency_budget_ms

    def decode(self, frame: Frame, parameters: SegmentationParameters) -> DecodedFrame:
        """Turn a message into an image, with the settings that its parameters and subscribers ask for.

        Raises:
            ImageError: the message cannot be segmented.
        """
        start_s = time.perf_counter()
        decode = decode_image if isinstance(frame.message, Image) else decode_compressed
        image = decode(frame.message, parameters.max_image_pixels)
        decode_ms = _since_ms(start_s)
        outputs = self._outputs[frame.camera]
        settings = parameters.settings(
            self._engine.info.input_size,
            confidence=outputs.wanted("confidence"),
            clusters=outputs.wanted("clusters"),
        )
        return DecodedFrame(frame, parameters, image, settings, decode_ms)

    @staticmethod
    def batches_of(frames: Sequence[DecodedFrame]) -> list[list[DecodedFrame]]:
        """Put frames together that one engine call can serve: same size, same settings."""
        batches: dict[tuple[tuple[int, int], Settings], list[DecodedFrame]] = {}
        for frame in frames:
            batches.setdefault((frame.image_size, frame.settings), []).append(frame)
        return list(batches.values())

    def segment(self, frames: Sequence[DecodedFrame]) -> list[FrameReport]:
        """Segment frames of one size under the same settings in one call, and publish what is wanted.

        Raises:
            Exception: whatever the engine raises.
        """
        first = frames[0]
        grouping = group_classes(self._engine.info.classes, first.parameters.class_groups)
        allowance = self._latency.allow(first.image_size, self.guard.parameters_for(first.image_size, first.parameters))
        cameras, images = [frame.frame.camera for frame in frames], [frame.image for frame in frames]
        settings = replace(first.settings, token_capacity=allowance.token_ceiling)
        settings = self.guard.settings_for(settings, cameras, first.image_size)
        result = self._engine.segment(images[0] if len(images) == 1 else images, settings)
        self.guard.saw(cameras, images, settings, result)
        prediction = grouping.apply(result)
        return [
            self._publish(frame, _nth(prediction, index), allowance, grouping, len(frames))
            for index, frame in enumerate(frames)
        ]

    def use_idle_time(self, idle: Callable[[], bool]) -> None:
        """Do what can wait, as long as `idle()`: see `LatencyControl.use_idle_time` and `MergeGuard.use_idle_time`."""
        self.guard.use_idle_time(idle)
        self._latency.use_idle_time(idle)

    def _publish(
        self, decoded: DecodedFrame, prediction: Prediction, allowance: Allowance, grouping: ClassGrouping, batch: int
    ) -> FrameReport:
        start_s = time.perf_counter()
        frame, parameters, outputs = decoded.frame, decoded.parameters, self._outputs[decoded.frame.camera]
        header, stamp_ns = frame.message.header, frame.stamp_ns
        mask = prediction.mask[0]
        mask_size = (mask.shape[0], mask.shape[1])
        encoding = "mono8" if mask.dtype == np.uint8 else "mono16"
        engine_ms, age_ms = prediction.stats.total_ms, self._age_ms(stamp_ns or frame.arrival_ns)
        published = allowance.policy != "drop" or not allowance.is_missed(engine_ms, age_ms)
        if published:
            outputs.publish_labels(grouping.classes, parameters.confidence_threshold, header)
            outputs.publish("mask", mask, encoding, header)
            age_ms = self._age_ms(stamp_ns or frame.arrival_ns)
            for name, maps in (("confidence", prediction.confidence), ("clusters", prediction.cluster_map)):
                if maps is not None:
                    outputs.publish(name, maps[0], "mono8", header)
            if frame.camera_info is not None:
                outputs.publish_camera_info(frame.camera_info, mask_size, header)
        publish_ms = _since_ms(start_s)
        missed = allowance.is_missed(engine_ms, age_ms)
        misses = self._latency.observe(allowance, prediction.stats, age_ms, missed, learn=batch == 1)

        if published and outputs.wanted("mask/compressed"):
            outputs.publish_compressed(mask, encoding, header)
        if published and outputs.wanted("overlay"):
            overlay = draw_overlay(decoded.image, mask, grouping.classes.palette(), parameters.overlay_alpha)
            outputs.publish("overlay", overlay, "rgb8", header)
        return FrameReport(
            image_size=decoded.image_size,
            mask_size=mask_size,
            batch=batch,
            engine=prediction.stats,
            allowance=allowance,
            deadline_missed=missed,
            misses=misses,
            published=published,
            confidence_threshold=parameters.confidence_threshold,
            decode_ms=decoded.decode_ms,
            publish_ms=publish_ms,
            arrival_age_ms=(frame.arrival_ns - stamp_ns) / 1e6 if stamp_ns else 0.0,
            age_ms=age_ms,
            stamped=stamp_ns != 0,
        )

    def _age_ms(self, since_ns: int) -> float:
        return (self._now_ns() - since_ns) / 1e6


def _nth(prediction: Prediction, index: int) -> Prediction:
    """One image's part of a batch's prediction."""
    part = slice(index, index + 1)
    return replace(
        prediction,
        mask=prediction.mask[part],
        confidence=None if prediction.confidence is None else prediction.confidence[part],
        cluster_map=None if prediction.cluster_map is None else prediction.cluster_map[part],
    )


def _since_ms(start_s: float) -> float:
    return (time.perf_counter() - start_s) * 1000.0
