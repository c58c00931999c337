"""Image messages from arrays; the way back is `images`, which needs no ROS."""

from __future__ import annotations

import numpy as np
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from clustvit_ros.images import SUPPORTED_ENCODINGS, check_pixels, decode_image, image_fields

__all__ = ["SUPPORTED_ENCODINGS", "check_pixels", "decode_image", "image_message"]


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
