# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Labelled points: a mask, and where its pixels are, from a cloud or an aligned depth image of the same stamp.

A cloud may come before its image, while the engine is at it, or after its mask. Whatever comes first waits, within
bounds; pairs are made by stamp and labelled in a thread of their own, so that no mask waits for points.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField
from std_msgs.msg import Header

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.engine.worker import FrameQueue, FrameSlot
from clustvit_ros.errors import ImageError
from clustvit_ros.images import check_pixels, message_bytes, pixel_rows
from clustvit_ros.node.messages import calibrated_size, stamp_ns
from clustvit_ros.policy.parameters import SegmentationParameters

T = TypeVar("T")

_FLOATS = {PointField.FLOAT32: "f4", PointField.FLOAT64: "f8"}
_DEPTHS = {"16UC1": ("u2", 0.001), "32FC1": ("f4", 1.0)}
"""Encodings of depth images (REP 118): type in memory, and metres of one unit."""
_FIELDS = [
    PointField(name=name, offset=4 * index, datatype=kind, count=1)
    for index, (name, kind) in enumerate({
        "x": PointField.FLOAT32, "y": PointField.FLOAT32, "z": PointField.FLOAT32, "label": PointField.UINT32,
        "confidence": PointField.FLOAT32,
    }.items())
]  # fmt: skip
"""The types of PCL's PointXYZL, and a probability."""
_SHARES = (np.arange(256) / 255).astype(np.float32)
# A cloud has 4 to 10 MB at 640x480, a mask less than 1.
_MOST_CLOUDS, _MOST_CLOUDS_OF_A_REPLAY, _MOST_MASKS, _MOST_STAMPS = 8, 64, 30, 64
_JUMP_NS = 1_000_000_000
_FINISH_S = 0.8


def read_cloud(message: PointCloud2, max_points: int) -> np.ndarray:
    """The positions of a cloud.

    Args:
        message: any layout of fields, any byte order, float32 or float64.
        max_points: larger clouds are refused.

    Returns:
        (H, W, 5) float32; x, y and z are set, bit for bit where they were float32.

    Raises:
        ImageError: no x, y and z, or data that does not fit.
    """
    height, width, step = int(message.height), int(message.width), int(message.point_step)
    if not 0 < height * width <= max_points:
        raise ImageError(f"cloud: got {width}x{height} points, expected 1 to {max_points} (max_image_pixels)")
    fields = {each.name: each for each in message.fields}
    missing = [name for name in "xyz" if name not in fields]
    if missing:
        raise ImageError(f"cloud: got the fields {', '.join(fields)[:80]}, expected x, y and z")
    data = message_bytes(message.data)
    if message.row_step < width * step or len(data) < height * message.row_step:
        raise ImageError(
            f"cloud: got {len(data)} bytes in rows of {message.row_step} for {width}x{height} points of {step} bytes"
        )
    points = np.empty((height, width, len(_FIELDS)), np.float32)
    for axis, name in enumerate("xyz"):
        of = fields[name]
        kind = np.dtype((">" if message.is_bigendian else "<") + _FLOATS.get(of.datatype, "V1"))
        if kind.kind != "f" or of.count > 1 or of.offset + kind.itemsize > step:
            raise ImageError(
                f"cloud: got field {name} of type {of.datatype}, count {of.count}, at byte {of.offset} of {step}, "
                "expected one FLOAT32 or FLOAT64 inside of the point"
            )
        with np.errstate(over="ignore"):
            points[..., axis] = np.ndarray((height, width), kind, data.data, of.offset, (message.row_step, step))
    return points


def read_depth(message: Image, info: CameraInfo | None, max_points: int) -> np.ndarray:
    """The positions of a depth image's pixels.

    Args:
        message: 16UC1 in millimetres or 32FC1 in metres, aligned with the camera's image, of any size.
        info: the camera's calibration.
        max_points: larger images are refused.

    Returns:
        (H, W, 5) float32; x, y and z are set, NaN where nothing was measured.

    Raises:
        ImageError: another encoding, data that does not fit, or no calibration.
    """
    if message.encoding not in _DEPTHS:
        raise ImageError(f"depth: got encoding {message.encoding[:40]!r}, expected 16UC1 (mm) or 32FC1 (m)")
    code, metres = _DEPTHS[message.encoding]
    check_pixels(message.height, message.width, max_points)
    kind = np.dtype((">" if message.is_bigendian else "<") + code)
    # The copy makes rows that padding left at odd addresses readable.
    stored = np.ascontiguousarray(pixel_rows(message, message.height, kind.itemsize)).view(kind)
    fx, fy, cx, cy = intrinsics(info, stored.shape)
    z = stored.astype(np.float32) * np.float32(metres)
    with np.errstate(invalid="ignore"):
        z[~(np.isfinite(z) & (z > 0.0))] = np.nan
    points = np.empty((*z.shape, len(_FIELDS)), np.float32)
    points[..., 0] = z * ((np.arange(z.shape[1]) - cx) / fx).astype(np.float32)
    points[..., 1] = z * ((np.arange(z.shape[0]) - cy) / fy).astype(np.float32)[:, None]
    points[..., 2] = z
    return points


def intrinsics(info: CameraInfo | None, size: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Focal lengths and principal point of a picture of (height, width) `size` that shows what the image shows.

    Args:
        info: the camera's calibration; the projection matrix counts, as in image_geometry, and K where it has none.
        size: (height, width) in pixels, whose centres lie at whole numbers.

    Returns:
        fx, fy, cx, cy in pixels.

    Raises:
        ImageError: no calibration.
    """
    if info is None:
        raise ImageError("camera_info: none has come, which depth and unorganised clouds need; publish it, or remap it")
    fx, fy, cx, cy = (info.p[0], info.p[5], info.p[2], info.p[6]) if info.p[0] else (info.k[i] for i in (0, 4, 2, 5))
    if not (fx > 0.0 and fy > 0.0 and np.isfinite([fx, fy, cx, cy]).all()):
        raise ImageError(
            f"camera_info: got focal lengths {fx:g} and {fy:g} px, expected positive ones; calibrate the camera"
        )
    height, width = calibrated_size(info)
    right = (size[1] / width if width else 1.0) / max(info.binning_x, 1)
    down = (size[0] / height if height else 1.0) / max(info.binning_y, 1)
    return (
        fx * right, fy * down, (cx - info.roi.x_offset + 0.5) * right - 0.5, (cy - info.roi.y_offset + 0.5) * down - 0.5
    )  # fmt: skip


def label_points(
    points: np.ndarray, mask: np.ndarray, confidence: np.ndarray, info: CameraInfo | None, header: Header, dense: bool
) -> PointCloud2:
    """Build the message.

    Args:
        points: (H, W, 5) float32 as the readers give them. Of a grid, each is sampled at its place in it, whatever the
            mask's size is; a list (H = 1) is projected into the mask, and what falls beside it is unlabelled.
        mask: (H, W) class ids.
        confidence: (H, W) uint8, 0..255.
        info: the camera's calibration, for lists.
        header: of the image.
        dense: whether all positions are finite.

    Raises:
        ImageError: a list, and no calibration.
    """
    height, width = points.shape[:2]
    rows: Any = (2 * np.arange(height)[:, None] + 1) * mask.shape[0] // (2 * height)
    columns: Any = (2 * np.arange(width) + 1) * mask.shape[1] // (2 * width)
    beside: Any = False
    if height == 1 < mask.shape[0]:
        fx, fy, cx, cy = intrinsics(info, mask.shape)
        x, y, z = (points[..., axis].astype(np.float64) for axis in range(3))
        with np.errstate(all="ignore"):
            u, v = np.rint(fx * x / z + cx), np.rint(fy * y / z + cy)
            beside = ~((z > 0.0) & (u >= 0) & (u < mask.shape[1]) & (v >= 0) & (v < mask.shape[0]))
        rows, columns = (np.where(beside, 0, each).astype(np.intp) for each in (v, u))
    same = not np.any(beside) and (height, width) == mask.shape
    points.view(np.uint32)[..., 3] = mask if same else np.where(beside, IGNORE_INDEX, mask[rows, columns])
    points[..., 4] = _SHARES[confidence if same else np.where(beside, 0, confidence[rows, columns])]
    message = PointCloud2(
        header=header, height=height, width=width, fields=_FIELDS, is_bigendian=sys.byteorder == "big",
        point_step=points[0, 0].nbytes, row_step=points[0].nbytes, is_dense=dense,
    )  # fmt: skip
    message.data.frombytes(points.data.cast("B"))
    return message


@dataclass(eq=False)
class PointsOrder:
    """A frame whose points are wanted; it lives as long as its frame, and with a mask until its cloud has come.

    Args:
        owner: what it was ordered from.
        header: the image's.
        info: the camera's calibration by then.
    """

    owner: LabelledPoints
    header: Header
    info: CameraInfo | None
    cloud: PointCloud2 | Image | None = None
    """What has its stamp."""
    maps: tuple[np.ndarray, np.ndarray] | None = None
    """Mask and confidence."""

    @property
    def cloud_bytes(self) -> int:
        """The memory that its cloud takes; one that is still to come, as much as the newest."""
        return self.owner.cloud_bytes if self.cloud is None else len(self.cloud.data)

    def fulfil(self, mask: np.ndarray, confidence: np.ndarray) -> None:
        """The frame has its mask, and (H, W) uint8 confidence; any thread may say so."""
        self.owner.add_mask(self, (mask, confidence))


class LabelledPoints:
    """One camera's points, while somebody subscribes.

    Args:
        topic: where clouds or depth images come from, resolved.
        parameters: gives the values in force.
        publish: takes the messages.
        report: gets what is counted (`published`, `unmatched`: no cloud came, `refused`: no cloud that can be used,
            `dropped`: a newer one took its place, `time_jumps`), and what is wrong, or an empty string.
    """

    def __init__(
        self, topic: str, parameters: Callable[[], SegmentationParameters], publish: Callable[[PointCloud2], None],
        report: Callable[[str, str], None],
    ) -> None:  # fmt: skip
        self.topic, self._parameters, self._publish, self._report = topic, parameters, publish, report
        self._lock = threading.Lock()
        # By stamp: frames without a mask, masks without a cloud, and clouds whose frame has not come.
        self._frames: WeakValueDictionary[int, PointsOrder] = WeakValueDictionary()
        self._masks: dict[int, PointsOrder] = {}
        self._clouds: dict[int, PointCloud2 | Image] = {}
        self._stamps: deque[int] = deque(maxlen=_MOST_STAMPS)
        self._frame_ns = self._cloud_ns = 0
        self.cloud_bytes = 0
        """Of the newest cloud."""
        lossless = not parameters().adapts
        self._most_clouds = _MOST_CLOUDS_OF_A_REPLAY if lossless else _MOST_CLOUDS
        self._slot: FrameSlot[PointsOrder] = FrameSlot(lambda *_: report("dropped", ""))
        if lossless:
            limit = parameters().queue_limit_mb * 1_000_000
            self._slot = FrameQueue(lambda *_: report("dropped", ""), limit, lambda order: order.cloud_bytes)
        self._slot.hand_over(self)
        self._slot.open()
        self._thread = threading.Thread(target=self._run, name="points", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after what it is at; what waits is given up."""
        self._slot.close(_FINISH_S)
        self._slot.hand_over(None)

    def order(self, header: Header, info: CameraInfo | None) -> PointsOrder | None:
        """A frame has come; the order is to be kept with it, None where its points cannot be had."""
        order = PointsOrder(self, header, info)
        stamp = stamp_ns(order)
        back_ns = self._frame_ns - stamp
        if back_ns > _JUMP_NS and stamp:
            self._report("time_jumps", f"time went back by {back_ns / 1e9:.1f} s; what waits from before is given up")
            self._forget(stamp)
        if not stamp or stamp in self._stamps:
            what = f"two images have the stamp {_seconds(stamp)}" if stamp else "images come without a time stamp"
            self._report("refused", f"{what}: no cloud can be told to be theirs")
            return None
        with self._lock:
            self._frame_ns = stamp
            self._stamps.append(stamp)
            order.cloud = self._pop(self._clouds, stamp)
            if order.cloud is None:
                self._frames[stamp] = order
        return order

    def add_cloud(self, message: PointCloud2 | Image) -> None:
        """A cloud or a depth image has come."""
        stamp = stamp_ns(message)
        if not stamp or stamp == self._cloud_ns:
            how = f"again with the stamp {_seconds(stamp)}" if stamp else "without a time stamp"
            self._report("refused", f"{self.topic} comes {how}: it is not used")
            return
        with self._lock:
            self._cloud_ns, self.cloud_bytes = stamp, len(message.data)
            # The nearest of all: a frame without a mask is no better than one that has its mask.
            order = self._pop({**self._masks, **dict(self._frames.items())}, stamp)
            if order is not None:
                order.cloud = message
                self._masks.pop(stamp_ns(order), None)
                self._frames.pop(stamp_ns(order), None)
            elif stamp not in self._stamps:  # else its frame was dropped
                self._clouds[stamp] = message
                if len(self._clouds) > self._most_clouds:
                    del self._clouds[next(iter(self._clouds))]
            if order is None or order.maps is None:
                return
        self._slot.put(order)

    def add_mask(self, order: PointsOrder, maps: tuple[np.ndarray, np.ndarray]) -> None:
        """An order has its mask and confidence."""
        lost = None
        with self._lock:
            order.maps, ready = maps, order.cloud is not None
            if not ready:
                self._frames.pop(stamp_ns(order), None)
                self._masks[stamp_ns(order)] = order
                if len(self._masks) > _MOST_MASKS:
                    lost = next(iter(self._masks))
                    del self._masks[lost]
        if lost is not None:
            self._report("unmatched", self._why_unmatched(lost))
        if ready:
            self._slot.put(order)

    def _why_unmatched(self, stamp: int) -> str:
        if not self._cloud_ns:
            return f"nothing arrives on {self.topic}; remap `points` (a cloud) or `depth` (an aligned depth image)"
        apart_ms = (self._cloud_ns - self._frame_ns) / 1e6
        return (
            f"{self.topic} has nothing of the image's stamp {_seconds(stamp)} (the newest ones are {apart_ms:+.1f} ms "
            "apart); have both stamped alike, or set points_slop_ms"
        )

    def _pop(self, waiting: MutableMapping[int, T], stamp: int) -> T | None:
        """Remove what has the stamp, or the nearest one within `points_slop_ms`."""
        found = waiting.pop(stamp, None)
        slop_ns = self._parameters().points_slop_ms * 1e6
        if found is None and slop_ns and waiting:
            nearest = min(waiting, key=lambda each: abs(each - stamp))
            found = waiting.pop(nearest, None) if abs(nearest - stamp) <= slop_ns else None
        return found

    def _forget(self, stamp: int) -> None:
        """Give up what is later than the time that has begun."""
        with self._lock:
            masks, self._masks = self._masks, {}
            self._clouds = {at: cloud for at, cloud in self._clouds.items() if at - stamp <= _JUMP_NS}
            self._frames.clear()
            self._stamps.clear()
        for _ in masks:
            self._report("unmatched", "")

    def _run(self) -> None:
        while (order := self._slot.take(self)) is not None:
            try:
                self._publish(self._labelled(order))
            except ImageError as error:
                self._report("refused", f"{self.topic}: {error}")
            except Exception as error:  # a fault of ours, or ROS that shuts down: the thread must outlive it
                self._report("refused", f"{self.topic}: {error!r}")
            else:
                self._report("published", "")
            order.cloud = order.maps = None  # its frame may live on, as the one that masks are carried from
            del order
            self._slot.done()

    def _labelled(self, order: PointsOrder) -> PointCloud2:
        cloud, most = order.cloud, self._parameters().max_image_pixels
        assert cloud is not None and order.maps is not None
        if cloud.header.frame_id != order.header.frame_id:
            raise ImageError(
                f"frame_id: got {cloud.header.frame_id[:60]!r}, expected the image's, {order.header.frame_id[:60]!r}: "
                "only what is registered to the image shows what its pixels show"
            )
        is_depth = isinstance(cloud, Image)
        points = read_depth(cloud, order.info, most) if is_depth else read_cloud(cloud, most)
        return label_points(points, *order.maps, order.info, order.header, not is_depth and cloud.is_dense)


def _seconds(stamp: int) -> str:
    return f"{stamp // 1_000_000_000}.{stamp % 1_000_000_000:09d}"
