"""Serialised ROS 2 messages to images, and label maps to serialised ROS 2 messages, without ROS."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from clustvit_ros.compressed_images import decode_compressed
from clustvit_ros.errors import ImageError
from clustvit_ros.images import SUPPORTED_ENCODINGS, decode_image, image_fields

IMAGE, COMPRESSED_IMAGE = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
DIAGNOSTIC_ARRAY = "diagnostic_msgs/msg/DiagnosticArray"

# A recording is no stranger's network traffic, but a damaged length field must not take all memory either.
_MAX_PIXELS = 1 << 28


@functools.cache
def typestore() -> Any:
    """The message definitions; those of images have not changed since the first ROS 2."""
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_JAZZY)


def read_message(msgtype: str, data: bytes) -> Any:
    """Deserialise an Image or CompressedImage.

    Raises:
        ImageError: not one.
    """
    try:
        return typestore().deserialize_cdr(data, msgtype)
    except Exception as error:  # whatever the generated code meets in damaged bytes
        reason = str(error) or type(error).__name__
        raise ImageError(f"message: got {len(data)} damaged bytes of {msgtype} ({reason})") from error


def unusable(message: Any) -> str:
    """Why no message like this one can be segmented; empty when it can.

    Args:
        message: of `read_message`.
    """
    if hasattr(message, "format"):
        return "holds compressed depth" if "compressedDepth" in message.format else ""
    return "" if message.encoding in SUPPORTED_ENCODINGS else f"has encoding {str(message.encoding)[:40]!r}"


def to_pixels(message: Any) -> np.ndarray:
    """Decode a message of `read_message` to (H, W, 3) uint8 RGB.

    Raises:
        ImageError: unsupported or damaged.
    """
    decode = decode_compressed if hasattr(message, "format") else decode_image
    # Bags are read only, and PyTorch wants arrays that could be written to.
    return np.require(decode(message, _MAX_PIXELS), requirements="W")


def header(sec: int, nanosec: int, frame_id: str) -> Any:
    """A std_msgs/Header."""
    types = typestore().types
    stamp = types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def write_image(pixels: np.ndarray, head: Any) -> bytes:
    """Serialise (H, W) uint8 or uint16 as a mono8 or mono16 Image."""
    fields = image_fields(pixels, "mono8" if pixels.dtype == np.uint8 else "mono16")
    message = typestore().types[IMAGE](header=head, **fields)
    return bytes(typestore().serialize_cdr(message, IMAGE))


def write_stats(pairs: Mapping[str, str], hardware_id: str, head: Any) -> bytes:
    """Serialise one frame's statistics as a DiagnosticArray of one status."""
    types = typestore().types
    values = [types["diagnostic_msgs/msg/KeyValue"](key=key, value=value) for key, value in pairs.items()]
    status = types["diagnostic_msgs/msg/DiagnosticStatus"](
        level=0, name="label-bag: frame", message="segmented", hardware_id=hardware_id, values=values
    )
    message = types[DIAGNOSTIC_ARRAY](header=head, status=[status])
    return bytes(typestore().serialize_cdr(message, DIAGNOSTIC_ARRAY))
