# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The way of a frame: decode, plan, segment, publish, learn, and one record of it. Runs in the engine's thread."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import CompressedImage, Image

from clustvit_ros.compressed_images import decode_compressed
from clustvit_ros.engine import Engine, Prediction
from clustvit_ros.engine.engine import OVERTAKEN, FrameRecord
from clustvit_ros.engine.masks import ClassGrouping, Groups, draw_overlay, group_classes
from clustvit_ros.engine.worker import DeviceLost, FrameSlot
from clustvit_ros.errors import ClustvitError, ImageError
from clustvit_ros.images import decode_image
from clustvit_ros.node.camera import Camera, Frame
from clustvit_ros.node.messages import calibrated_size, diagnostic_status, png_message
from clustvit_ros.policy import Plan, Policy
from clustvit_ros.policy.ledger import OK
from clustvit_ros.policy.parameters import SegmentationParameters
from clustvit_ros.policy.plan import Misses

if TYPE_CHECKING:
    from clustvit_ros.node.filling import FrameFiller

_LOG_PERIOD_S, _OTHER_CLOCK_S = 5.0, 60.0  # no camera is as slow as the latter


@dataclass(frozen=True)
class Decoded:
    """A frame that can be segmented.

    Args:
        frame: the message.
        camera: the camera that it is from.
        parameters: values in force for it.
        image: (H, W, 3) uint8 RGB, upright.
        wants: whether confidence and cluster maps are wanted.
        watched: False when nobody is to get anything of it.
        decode_ms: milliseconds from message to array.
    """

    frame: Frame
    camera: Camera
    parameters: SegmentationParameters
    image: np.ndarray
    wants: tuple[bool, bool]
    watched: bool
    decode_ms: float


def is_watched(camera: Camera) -> bool:
    """Whether somebody is to get something of a camera's frames, or they are segmented in any case."""
    return not (camera.parameters.lazy and camera.parameters.adapts) or camera.outputs.watched


def decode(frame: Frame, camera: Camera, parameters: SegmentationParameters) -> Decoded:
    """Get a frame's picture, upright: everything up to the publisher sees it so.

    Raises:
        ImageError: the message holds none that can be segmented.
    """
    start_s, message = time.perf_counter(), frame.message
    to_bytes = lambda pixels: camera.intensities.within(parameters.intensity_range)(pixels)  # noqa: E731

    def read() -> np.ndarray:
        if isinstance(message, Image):
            return decode_image(message, parameters.max_image_pixels, to_bytes)
        return decode_compressed(message, parameters.max_image_pixels, to_bytes, camera.known_edges.is_scene)

    # What is kept is not turned: the parameter may change before another thread asks for it.
    image = turned(frame.image(read), parameters.rotate)
    wants = frame.points is not None or camera.outputs.wanted("confidence"), camera.outputs.wanted("clusters")
    return Decoded(frame, camera, parameters, image, wants, is_watched(camera), _since_ms(start_s))


@dataclass(frozen=True)
class Made:
    """What an engine made of one frame, and how.

    Args:
        masks: maps of that frame alone, in the classes that are published.
        plan: how it was made.
        grouping: classes of the mask.
        record: the frame's record.
        device: name of the device that made it.
        misses: counts masks that missed the plan's budget.
    """

    masks: Prediction
    plan: Plan
    grouping: ClassGrouping
    record: FrameRecord
    device: str
    misses: Misses


class MaskPublisher:
    """Publishes masks and what belongs to them.

    Args:
        node_name: what statistics are called after.
        logger: an rclpy logger.
        now_ns: gives nanoseconds of the node's clock.
    """

    def __init__(self, node_name: str, logger: Any, now_ns: Callable[[], int]) -> None:
        self._status_name, self._logger, self._now_ns = f"{node_name}: frame", logger, now_ns

    def publish(
        self, one: Decoded, plan: Plan, masks: Prediction, index: int, grouping: ClassGrouping, engine_ms: float
    ) -> tuple[float, float | None]:
        """Publish what consumers wait for.

        Args:
            one: the frame.
            plan: how its mask was made.
            masks: maps of a batch.
            index: which of them are the frame's.
            grouping: classes of the mask.
            engine_ms: milliseconds in the engine.

        Returns:
            The mask's age, and the milliseconds that this took; None when it was too late to be published.
        """
        start_s = time.perf_counter()
        outputs, header, degrees = one.camera.outputs, one.frame.message.header, one.parameters.rotate
        mask = turned(masks.mask[index], degrees)
        age_ms = self.age_ms(one.frame)
        if plan.parameters.deadline_policy == "drop" and plan.is_missed(engine_ms, age_ms):
            return age_ms, None
        outputs.publish_labels(grouping.classes, plan.parameters.confidence_threshold, header)
        outputs.publish_pixels("mask", mask, _encoding(mask), header)
        age_ms = self.age_ms(one.frame)
        for name, maps in (("confidence", masks.confidence), ("clusters", masks.cluster_map)):
            if maps is not None:
                outputs.publish_pixels(name, turned(maps[index], degrees), "mono8", header)
        if one.frame.camera_info is not None:
            image_size = (one.image.shape[0], one.image.shape[1])
            calibrated = calibrated_size(one.frame.camera_info)
            if calibrated != image_size and all(calibrated):
                self._logger.warning(
                    "camera_info is for images of {}x{}, binning and region of interest applied, and the images have "
                    "{}x{}: it is passed on for the mask as it is; calibrate the camera at the size that it "
                    "publishes".format(*calibrated[::-1], *image_size[::-1]),
                    throttle_duration_sec=_LOG_PERIOD_S,
                )
            outputs.publish_camera_info(one.frame.camera_info, image_size, (mask.shape[0], mask.shape[1]), header)
        return age_ms, _since_ms(start_s)

    def publish_views(self, one: Decoded, masks: Prediction, index: int, grouping: ClassGrouping) -> None:
        """Publish what is for people and recordings, or made from the mask elsewhere, which no budget counts."""
        outputs, header, degrees = one.camera.outputs, one.frame.message.header, one.parameters.rotate
        mask = turned(masks.mask[index], degrees)
        if one.frame.points is not None and masks.confidence is not None:
            one.frame.points.fulfil(mask, turned(masks.confidence[index], degrees))
        if outputs.wanted("mask/compressed"):
            outputs.publish("mask/compressed", png_message(mask, _encoding(mask), header))
        if outputs.wanted("overlay"):
            image = turned(one.image, degrees)
            overlay = draw_overlay(image, mask, grouping.classes.palette(), one.parameters.overlay_alpha)
            outputs.publish_pixels("overlay", overlay, "rgb8", header)

    def publish_stats(self, one: Decoded, device: str, what: str, pairs: Mapping[str, str]) -> None:
        """Publish a frame's statistics.

        Args:
            one: the frame.
            device: name of the device that made its mask.
            what: what happened to it, in a word.
            pairs: keys and values.
        """
        status = diagnostic_status(self._status_name, device, OK, what, pairs)
        one.camera.outputs.publish("stats", DiagnosticArray(header=one.frame.message.header, status=[status]))

    def age_ms(self, frame: Frame) -> float:
        """Milliseconds since a frame's stamp, or since its arrival when it has none."""
        return frame.age_ms(self._now_ns())


class FrameSession:
    """Turns frames into published masks with one engine; a frame that cannot be segmented is counted, never fatal.

    Args:
        engine: warm engine.
        policy: plans its calls.
        cameras: name -> camera.
        slot: where further frames wait, to be taken into a batch.
        publisher: publishes masks.
        filler: carries masks on to frames that the engine does not get to.
        logger: an rclpy logger.
        context_ok: False once ROS is shutting down: publishing then fails, and that is no fault.
    """

    def __init__(
        self, engine: Engine, policy: Policy, cameras: Mapping[str, Camera], slot: FrameSlot[Frame],
        publisher: MaskPublisher, filler: FrameFiller, logger: Any, context_ok: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.engine, self.policy = engine, policy
        self._cameras, self._slot, self._publisher, self._filler = cameras, slot, publisher, filler
        self._logger, self._context_ok = logger, context_ok
        self._grouping: tuple[Groups | None, ClassGrouping] = None, ClassGrouping(engine.info.classes)
        # Of each camera: what the engine is ready for while nobody subscribes.
        self._ready: dict[str, tuple[Any, SegmentationParameters]] = {}
        engine.look_ahead(self._upcoming)
        self.named: SegmentationParameters | None = None
        """Values that name classes as this engine's model has them, while those in force are for its successor."""

    def handle(self, frame: Frame) -> None:
        """Segment a frame, and others that may share its engine call, and publish what is wanted.

        Raises:
            DeviceLost: another engine must go on with what is back in the slot.
        """
        others: list[Frame] = []
        parameters = self._in_force(self._cameras[frame.camera])
        if parameters.batching and not parameters.latency_budget_ms:  # a budget bounds each frame alone
            others = self._slot.take_others()
        batches: dict[Any, list[Decoded]] = {}
        for one in (frame, *others):
            try:
                decoded = self._decode(one)
            except Exception as error:  # one camera's bad frame is no reason to lose another's
                self._fail(one, error)
                continue
            if decoded is not None:
                key = decoded.parameters, decoded.image.shape, decoded.wants, decoded.watched
                batches.setdefault(key, []).append(decoded)
        waiting = list(batches.values())
        while waiting:
            batch = waiting[0]
            try:
                self._segment(batch)
            except DeviceLost:
                for one in reversed([member.frame for left in waiting for member in left]):
                    self._slot.put_back(one, one.camera)
                raise
            except Exception as error:
                for member in batch:
                    self._fail(member.frame, error)
            del waiting[0]

    def use_idle_time(self, is_free: Callable[[], bool]) -> None:
        """Do what can wait, as long as `is_free()`."""
        self.policy.use_idle_time(is_free)

    def _decode(self, frame: Frame) -> Decoded | None:
        """The frame, or None where nobody would get its mask and the engine is ready for the next one like it."""
        frame.fate.taken_s = frame.fate.taken_s or time.monotonic()
        camera = self._cameras[frame.camera]
        parameters = self._in_force(camera)  # asked for once: a frame sees one consistent set
        if not is_watched(camera) and self._ready.get(camera.name) == (_kind_of(frame.message), parameters):
            if not self._filler.end(frame):  # filled while somebody watched
                camera.ledger.add(FrameRecord(camera.name, "unwatched"))
            return None
        return decode(frame, camera, parameters)

    def _upcoming(self) -> np.ndarray | None:
        """The picture of the frame that is next, where it is had in no time: the mask at hand must not wait for it."""
        if (frame := self._slot.peek()) is None or not isinstance(frame.message, Image):
            return None
        camera = self._cameras[frame.camera]
        parameters = self._in_force(camera)
        if not (parameters.batching or parameters.rotate) and is_watched(camera):  # else it will be another array
            with suppress(Exception):  # told when it is that frame's turn
                return decode(frame, camera, parameters).image
        return None

    def _in_force(self, camera: Camera) -> SegmentationParameters:
        # Names are held before values for another model come, and let go after them: asked for on both sides, they fit.
        before, parameters = self.named, camera.parameters
        named = self.named or before
        if named is None:
            return parameters
        return replace(parameters, class_groups=named.class_groups, merge_exempt_classes=named.merge_exempt_classes)

    def _group(self, groups: Groups) -> ClassGrouping:
        if groups is not self._grouping[0]:
            self._grouping = groups, group_classes(self.engine.info.classes, groups)
        return self._grouping[1]

    def _segment(self, batch: Sequence[Decoded]) -> None:
        first = batch[0]
        grouping = self._group(first.parameters.class_groups)
        cameras, images = [one.camera.name for one in batch], [one.image for one in batch]
        plan = self.policy.plan(images, first.parameters, cameras, *first.wants)
        if not first.watched:
            # Planned all the same: whoever subscribes finds the engine warm for this size, and a budget calibrated.
            for one in batch:
                self._ready[one.camera.name] = _kind_of(one.frame.message), one.parameters
                if not self._filler.end(one.frame):
                    one.camera.ledger.add(FrameRecord(one.camera.name, "unwatched"))
            return
        result = self.engine.segment(images[0] if len(images) == 1 else images, plan.settings)
        masks = result if grouping.table is None else grouping.apply(result)
        published = [self._publish(one, plan, masks, index, grouping) for index, one in enumerate(batch)]
        tells = [one.camera.outputs.wanted("stats") for one in batch]
        overtaken = all(outcome == OVERTAKEN for _, _, outcome in published)
        lesson = self.policy.learn(plan, result, [age_ms for age_ms, _, _ in published], overtaken)
        for index, (one, (age_ms, publish_ms, outcome)) in enumerate(zip(batch, published, strict=True)):
            mask, fills = masks.mask[index], one.parameters.fills
            record = FrameRecord(
                camera=one.camera.name, outcome=outcome,
                image_size=(one.image.shape[0], one.image.shape[1]), mask_size=(mask.shape[0], mask.shape[1]),
                batch=len(batch), stats=masks.stats, confidence_threshold=plan.parameters.confidence_threshold,
                plan=lesson.facts, deadline_missed=lesson.missed[index], deadline_misses=lesson.misses,
                decode_ms=one.decode_ms, publish_ms=publish_ms, arrival_age_ms=one.frame.arrival_age_ms or 0.0,
                age_ms=age_ms, stamped=one.frame.stamp_ns != 0, filled=False if fills else None,
            )  # fmt: skip
            if fills:
                made = Made(masks.alone(index), plan, grouping, record, self.engine.info.device, self.policy.misses)
                self._filler.learn(one.frame, made)
            is_first = one.camera.ledger.add(record)
            if is_first:
                self._tell_first(record)
            if outcome == OVERTAKEN:
                if not one.frame.fate.filled:  # nothing could be carried to it, and now a later frame's mask is out
                    one.camera.ledger.drop()
                continue
            if tells[index]:
                pairs = one.camera.ledger.frame_pairs(record)
                self._publisher.publish_stats(one, self.engine.info.device, "segmented", pairs)
            if outcome == "segmented":
                self._publisher.publish_views(one, masks, index, grouping)

    def _publish(
        self, one: Decoded, plan: Plan, masks: Prediction, index: int, grouping: ClassGrouping
    ) -> tuple[float, float, str]:
        """Publish a mask that has not been overtaken: its age, milliseconds that this took, and what became of it."""
        turn = self._filler.turn(one.frame) if self._filler.used else nullcontext(True)
        with turn as is_next:
            if not is_next:
                return self._publisher.age_ms(one.frame), 0.0, OVERTAKEN
            age_ms, publish_ms = self._publisher.publish(one, plan, masks, index, grouping, masks.stats.total_ms)
        return (age_ms, 0.0, "late") if publish_ms is None else (age_ms, publish_ms, "segmented")

    def _tell_first(self, record: FrameRecord) -> None:
        assert record.stats is not None  # it was segmented
        apart_s = abs(record.arrival_age_ms) / 1000.0
        age = f"{record.age_ms:.1f} ms after the image's stamp"
        if apart_s > _OTHER_CLOCK_S:
            age = f"its image's stamp is of another clock, {apart_s:.0f} s from this node's"
        self._logger.info(
            f"{record.camera + ': ' if record.camera else ''}first mask: {record.mask_size[1]}x{record.mask_size[0]}, "
            f"{age}; engine {record.stats.total_ms:.1f} ms, "
            f"{record.stats.tokens_kept:g} of {record.stats.tokens_total} tokens"
        )

    def _fail(self, frame: Frame, error: Exception) -> None:
        if not self._context_ok():
            return
        ledger, name = self._cameras[frame.camera].ledger, f"{frame.camera}: " if frame.camera else ""
        self._filler.end(frame)
        if isinstance(error, ImageError):
            ledger.add(FrameRecord(frame.camera, "rejected", str(error)))
            self._logger.error(
                f"{name}image not segmented ({ledger.count('rejected')} so far): {error}",
                throttle_duration_sec=_LOG_PERIOD_S,
            )
            return
        outcome = OVERTAKEN if frame.fate.filled else "failed"
        ledger.add(FrameRecord(frame.camera, outcome, str(error) or type(error).__name__))
        # An error of our own says all there is to say; any other needs its origin to be found.
        detail = str(error) if isinstance(error, ClustvitError) else "".join(traceback.format_exception(error)).rstrip()
        self._logger.error(
            f"{name}engine failed ({ledger.count('failed')} frames so far): {detail}",
            throttle_duration_sec=_LOG_PERIOD_S,
        )


def _kind_of(message: Image | CompressedImage) -> Any:
    """What messages of one camera have in common for as long as nothing about it changes."""
    return (message.height, message.width, message.encoding) if isinstance(message, Image) else message.format


def turned(pixels: np.ndarray, degrees: int) -> np.ndarray:
    """An image or a map, turned by 0 or 180 degrees: from the camera's orientation to upright, or back."""
    return cv2.rotate(pixels, cv2.ROTATE_180) if degrees else pixels


def _encoding(mask: np.ndarray) -> str:
    return "mono8" if mask.dtype == np.uint8 else "mono16"


def _since_ms(start_s: float) -> float:
    return (time.perf_counter() - start_s) * 1000.0
