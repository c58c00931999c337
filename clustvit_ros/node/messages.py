# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""ROS messages from arrays and facts; the way back, which needs no ROS, is in `images` and `compressed_images`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
from std_msgs.msg import Header

from clustvit_ros.classes import ClassSet
from clustvit_ros.errors import ImageError
from clustvit_ros.images import image_fields

try:
    from vision_msgs.msg import LabelInfo, VisionClass
except ImportError:  # no wheel of it exists; on a robot it comes with apt
    LabelInfo = VisionClass = None

NO_LABEL_INFO = (
    "vision_msgs is not installed: segmentation/label_info is not published, and consumers need the class names from "
    "elsewhere (install ros-$ROS_DISTRO-vision-msgs)"
)
"""What to tell the user once, where `LabelInfo` is None."""

# Masks are flat areas: the fastest level already makes them a fiftieth of their size.
_PNG_LEVEL = 1


def stamp_ns(message: Any) -> int:
    """Nanoseconds of a message's stamp; 0 when it has none. rclpy's own Time takes no negative ones."""
    return message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec


def image_message(pixels: np.ndarray, encoding: str, header: Header) -> Image:
    """Build an Image message whose rows are packed: `step` is the width times the bytes of a pixel.

    Args:
        pixels: (H, W) uint8 for mono8, (H, W) uint16 for mono16, (H, W, 3) uint8 for rgb8 and bgr8.
        encoding: mono8, mono16, rgb8 or bgr8.
        header: carried over as it is.

    Raises:
        ImageError: pixels that do not fit the encoding.
    """
    fields = image_fields(pixels, encoding)
    message = Image()
    message.header = header
    # Filling the message's own array is one memory copy; assigning to `data` checks every byte, or copies twice.
    message.data.frombytes(fields.pop("data").data)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def png_message(mask: np.ndarray, encoding: str, header: Header) -> CompressedImage:
    """Build a CompressedImage that holds a mask as PNG, in the format string of compressed_image_transport.

    Args:
        mask: (H, W) uint8 or uint16 class ids.
        encoding: mono8 or mono16.
        header: carried over as it is.

    Raises:
        ImageError: OpenCV cannot encode it.
    """
    good, data = cv2.imencode(".png", mask, (cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL))
    if not good:
        raise ImageError(f"mask of {mask.shape} {mask.dtype}: cannot be encoded as PNG")
    message = CompressedImage(header=header, format=f"{encoding}; png compressed {encoding}")
    message.data.frombytes(data.data)
    return message


_MOST_PIXELS = 2**32 - 1


def calibrated_size(info: CameraInfo) -> tuple[int, int]:
    """(height, width) of the images that a calibration is for, binning and region of interest applied; 0 is unknown."""
    roi = info.roi
    return (
        (roi.height or info.height) // max(info.binning_y, 1), (roi.width or info.width) // max(info.binning_x, 1)
    )  # fmt: skip


def scaled_camera_info(
    info: CameraInfo, image_size: tuple[int, int], size: tuple[int, int], header: Header
) -> CameraInfo:
    """What the camera's calibration is for its image resized to `size`; as it came where that is the image's own.

    Focal lengths, principal point and the baseline term of P scale with the image, as image_proc's resize node scales
    them; distortion (D) and rotation (R) are independent of size. `binning` stays: width, height and region of interest
    are those of a larger or smaller sensor with the same binning, so that consumers who apply binning and region of
    interest get the mask's size.

    Args:
        info: as the camera driver publishes it.
        image_size: (height, width) of the image.
        size: (height, width) of the mask.
        header: header of the frame.
    """
    roi = info.roi
    result = CameraInfo(
        header=header, height=info.height, width=info.width, distortion_model=info.distortion_model, d=info.d, k=info.k,
        r=info.r, p=info.p, binning_x=info.binning_x, binning_y=info.binning_y, roi=roi,
    )  # fmt: skip
    if size == image_size:
        return result
    down, across = size[0] / image_size[0], size[1] / image_size[1]
    rows = (across, down, 1.0)
    result.height, result.width = _pixels(info.height * down), _pixels(info.width * across)
    result.k = [value * rows[index // 3] for index, value in enumerate(info.k)]
    result.p = [value * rows[index // 4] for index, value in enumerate(info.p)]
    result.roi = RegionOfInterest(
        x_offset=_pixels(roi.x_offset * across), y_offset=_pixels(roi.y_offset * down),
        width=_pixels(roi.width * across), height=_pixels(roi.height * down), do_rectify=roi.do_rectify,
    )  # fmt: skip
    return result


def _pixels(value: float) -> int:
    """Rounded, and what the message has room for: a camera may send any number."""
    return min(round(value), _MOST_PIXELS)


def label_info_message(classes: ClassSet, confidence_threshold: float, header: Header) -> Any:
    """Build a vision_msgs/LabelInfo: one VisionClass for each value that the mask may hold, 255 (unlabelled) aside.

    Args:
        classes: classes of the mask.
        confidence_threshold: confidence (0..1) below which pixels are unlabelled.
        header: header of the first frame that it holds for.
    """
    entries = [VisionClass(class_id=index, class_name=name) for index, name in enumerate(classes.names)]
    return LabelInfo(header=header, class_map=entries, threshold=confidence_threshold)


def diagnostic_status(
    name: str, hardware_id: str, level: int, sentence: str, pairs: Mapping[str, str]
) -> DiagnosticStatus:
    """Build a DiagnosticStatus.

    Args:
        name: "<node>: <what>".
        hardware_id: name of the device that computes.
        level: OK, WARN or ERROR.
        sentence: the status message.
        pairs: keys and values.
    """
    values = [KeyValue(key=key, value=value) for key, value in pairs.items()]
    return DiagnosticStatus(level=bytes([level]), name=name, message=sentence, hardware_id=hardware_id, values=values)
