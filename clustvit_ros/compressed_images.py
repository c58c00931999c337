# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""CompressedImage messages to arrays: JPEG and PNG, examined before anything is decoded.

A few hundred bytes can claim gigabytes of pixels, hold thousands of scans or inflate into megabytes of text, and
damaged files decode into wrong pictures; all of them are refused, at a cost that the file's size bounds. The header is
read more strictly than the decoders do: where both accept a file, both see one size.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from clustvit_ros.errors import ImageError
from clustvit_ros.images import check_pixels, message_bytes, narrow
from clustvit_ros.jpeg import JPEG_SIGNATURE, Shift, decode_jpeg, decode_with_opencv, read_jpeg_header, truncated

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Each scan of a progressive JPEG passes over the whole picture; encoders make about ten.
_MAX_JPEG_SCANS = 64
# libpng writes chunks of 8 KB; walking over many small ones would take long.
_FEW_PNG_CHUNKS, _LEAST_BYTES_PER_PNG_CHUNK = 64, 1024
# What the decoder needs. Anything else is text, profiles and animation, whose size no header bounds.
_PNG_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
# RFC 1951: a match of 258 bytes costs at least 2 bits.
_MOST_DEFLATED = 1032
# A quarter of the blocks may be all that a component has; each costs at least a bit in some scan.
_MOST_PIXELS_PER_JPEG_BYTE = 2048
# Pixels of 16 bits in four channels that do not compress, and metadata or padding beside them.
_MOST_BYTES_PER_PIXEL, _METADATA_BYTES = 9, 4 << 20


def holds_depth(format_text: str) -> bool:
    """Whether a CompressedImage's `format` says that it holds distances, which are no picture to segment."""
    return "depth" in format_text.lower() or format_text.lstrip().startswith("32FC1")


def decode_compressed(
    message: Any, max_pixels: int, narrow: Callable[[np.ndarray], np.ndarray] = narrow,
    is_scene: Callable[[Shift], bool] = lambda found: False,
) -> np.ndarray:  # fmt: skip
    """Decode a sensor_msgs/CompressedImage.

    Args:
        message: anything with `format` and `data`.
        max_pixels: larger images are refused before they are decoded.
        narrow: makes uint8 of uint16 values, for PNG images of 16 bits.
        is_scene: as `decode_jpeg` has it; `KnownEdges` of the camera.

    Returns:
        (H, W, 3) uint8 RGB. Orientation tags are ignored: camera_info knows the picture as the sensor saw it.

    Raises:
        ImageError: depth, neither JPEG nor PNG, too large, truncated or damaged.
    """
    if holds_depth(message.format):
        raise ImageError(
            f"format: got {message.format[:60]!r}, which is depth, expected a colour or grey JPEG or PNG image; "
            "subscribe to the colour camera"
        )
    view = message_bytes(message.data).data
    height, width = _size(view)
    check_pixels(height, width, max_pixels)
    if len(view) > height * width * _MOST_BYTES_PER_PIXEL + _METADATA_BYTES:
        raise ImageError(f"data: got {len(view)} bytes, far more than a {width}x{height} image can need")
    data = bytes(view)
    if data.startswith(_PNG_SIGNATURE):
        pixels = decode_with_opencv(_pixels_of_png(data, height, width), height, width)
        return narrow(pixels) if pixels.dtype == np.uint16 else pixels
    _check_jpeg(data, height, width)
    return decode_jpeg(data, read_jpeg_header(view), is_scene)


def compressed_size(data: bytes) -> tuple[int, int]:
    """Read (height, width) from the header of a JPEG or PNG file without decoding it.

    Raises:
        ImageError: neither of the two, or no size in the header.
    """
    return _size(memoryview(data))


def _size(data: memoryview) -> tuple[int, int]:
    start = bytes(data[:33])
    if start.startswith(_PNG_SIGNATURE) and start[8:16] == b"\0\0\0\x0dIHDR" and len(start) == 33:
        width, height = struct.unpack(">II", start[16:24])
        return height, width
    if start.startswith(JPEG_SIGNATURE):
        header = read_jpeg_header(data)
        return header.height, header.width
    raise ImageError(f"data: got {len(data)} bytes starting with {start[:8]!r}, expected a JPEG or PNG image")


def _check_jpeg(data: bytes, height: int, width: int) -> None:
    if len(data) * _MOST_PIXELS_PER_JPEG_BYTE < height * width:
        raise ImageError(f"data: got {len(data)} bytes, too few for the {width}x{height} image that they claim")
    scans = data.count(b"\xff\xda")
    if scans > _MAX_JPEG_SCANS:
        raise ImageError(f"data: got a JPEG of {scans} scans, expected at most {_MAX_JPEG_SCANS}")


def _pixels_of_png(data: bytes, height: int, width: int) -> bytes:
    """The chunks of a PNG file that make its pixels, their checksums found right."""
    depth, colour = data[24], data[25]
    if depth not in _PNG_DEPTHS.get(colour, ()):
        raise ImageError(f"data: got a PNG of colour type {colour} with {depth} bits, which the format does not have")
    kept, compressed_bytes, position = [], 0, len(_PNG_SIGNATURE)
    most_chunks = _FEW_PNG_CHUNKS + len(data) // _LEAST_BYTES_PER_PNG_CHUNK
    for _ in range(most_chunks):
        (length,) = struct.unpack(">I", data[position : position + 4]) if position + 12 <= len(data) else (len(data),)
        end = position + 12 + length
        if end > len(data):
            raise truncated(data, height, width)
        kind = data[position + 4 : position + 8]
        if kind in _PNG_PIXEL_CHUNKS:
            (checksum,) = struct.unpack(">I", data[end - 4 : end])
            if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != checksum:
                raise ImageError(
                    f"data: a damaged {width}x{height} image that cannot be decoded (checksum of {kind!r})"
                )
            kept.append(data[position:end])
            compressed_bytes += length if kind == b"IDAT" else 0
        position = end
        if kind == b"IEND":
            break
    else:
        raise ImageError(f"data: got a PNG of more than {most_chunks} chunks in {len(data)} bytes; write it with fewer")
    row_bytes = (width * depth * _PNG_CHANNELS[colour] + 7) // 8
    if compressed_bytes * _MOST_DEFLATED < height * row_bytes:
        raise ImageError(
            f"data: a damaged {width}x{height} image that cannot be decoded ({compressed_bytes} bytes cannot hold it)"
        )
    return _PNG_SIGNATURE + b"".join(kept)
