"""CompressedImage messages to arrays: JPEG and PNG, their size read from the header before anything is decoded.

A few hundred bytes of PNG can claim gigabytes of pixels, and OpenCV decodes a truncated JPEG into a half-grey picture
without a word; both are refused here.
"""

from __future__ import annotations

import struct
from typing import Any

import cv2
import numpy as np

from clustvit_ros.errors import ImageError
from clustvit_ros.image_encodings import check_pixels

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
# Start-of-frame markers; C4, C8 and CC in this range mean something else.
_JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def decode_compressed(message: Any, max_pixels: int) -> np.ndarray:
    """Decode a sensor_msgs/CompressedImage.

    Args:
        message: anything with `format` and `data`.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        (H, W, 3) uint8 RGB. Orientation tags are ignored: camera_info knows the picture as the sensor saw it.

    Raises:
        ImageError: neither JPEG nor PNG, too large, truncated or damaged.
    """
    if "compressedDepth" in message.format:
        raise ImageError(f"format: got {message.format[:60]!r}, expected a colour or grey JPEG or PNG image")
    data = bytes(message.data)
    height, width = compressed_size(data)
    check_pixels(height, width, max_pixels)
    # Cameras pad JPEG streams with zeros after the end marker.
    whole = b"IEND" in data[-12:] if data.startswith(_PNG_SIGNATURE) else data.rstrip(b"\0").endswith(b"\xff\xd9")
    if not whole:
        raise ImageError(f"data: got {len(data)} bytes of a {width}x{height} image without its end, it was truncated")
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageError(f"data: a damaged {width}x{height} image that cannot be decoded ({error.err})") from error
    if pixels is None or pixels.shape[:2] != (height, width):
        raise ImageError(f"data: {len(data)} bytes of a damaged {width}x{height} image that cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def compressed_size(data: bytes) -> tuple[int, int]:
    """Read (height, width) from the header of a JPEG or PNG file without decoding it.

    Raises:
        ImageError: neither of the two, or no size in the header.
    """
    if data.startswith(_PNG_SIGNATURE) and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    if data.startswith(_JPEG_SIGNATURE):
        return _jpeg_size(data)
    raise ImageError(f"data: got {len(data)} bytes starting with {data[:8]!r}, expected a JPEG or PNG image")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte before a marker
            position += 1
            continue
        if marker in _JPEG_FRAME_MARKERS:
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return height, width
        (length,) = struct.unpack(">H", data[position + 2 : position + 4])
        position += 2 + max(length, 2)
    raise ImageError(f"data: got {len(data)} bytes of JPEG without a frame header; it is truncated or damaged")
