# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A generator of hostile camera messages: mutations of good ones and crafted bombs, the same for the same seed."""

from __future__ import annotations

import array
import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
from sensor_msgs.msg import CompressedImage, Image

from clustvit_ros.images import SUPPORTED_ENCODINGS

MAX_PIXELS = 1 << 20
"""What the messages are to be tested with: many of them claim more."""

_SIZES = (0, 1, 2, 3, 7, 64, 65, 1000, 4096, 32_767, 65_500, 65_536, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
_ENCODINGS = (
    *SUPPORTED_ENCODINGS, "", "RGB8", "rgb16", "bgr16", "32FC1", "64FC4", "8SC3", "bayer_rggb16", "nv21", "rgb8\0",
    "rgb8; drop", "../../etc/passwd", "%s%n%x", "\N{SNOWMAN}", "A" * 10_000,
)  # fmt: skip
_FORMATS = ("jpeg", "png", "", "rgb8; jpeg compressed bgr8", "16UC1; compressedDepth png", "tiff", "\0", "A" * 10_000)


def raw_messages(seed: int) -> Iterator[Image]:
    """Images without end, most of them broken in one to three fields."""
    rng = np.random.default_rng(seed)
    while True:
        message = _good_raw(rng)
        for _ in range(rng.integers(0, 4)):
            _break_raw(rng, message)
        yield message


def compressed_messages(seed: int) -> Iterator[CompressedImage]:
    """Compressed images without end: whole, mutated, truncated, lying about their size, or bombs."""
    rng = np.random.default_rng(seed)
    makers = (_mutated, _mutated, _mutated, _truncated, _claiming, _bomb, _noise)
    while True:
        data = makers[rng.integers(len(makers))](rng)
        message = CompressedImage(format=str(rng.choice(_FORMATS)) if rng.random() < 0.3 else "jpeg")
        message.data = array.array("B", data)
        yield message


def png_claiming(width: int, height: int, chunks: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header claims a size, followed by `chunks`."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file with a correct checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encoded(pixels: np.ndarray, suffix: str, *options: int) -> bytes:
    """The bytes of a JPEG or PNG file."""
    return cv2.imencode(suffix, pixels, list(options))[1].tobytes()


def _good_raw(rng: np.random.Generator) -> Image:
    encoding = str(rng.choice(SUPPORTED_ENCODINGS))
    height, width = (int(value) for value in rng.integers(1, 80, 2))
    bytes_of = {"rgba8": 4, "bgra8": 4, "8UC4": 4, "rgb8": 3, "bgr8": 3, "8UC3": 3}
    pixel_bytes = bytes_of.get(encoding.replace("16", "8"), 1) * (2 if "16" in encoding else 1)
    if encoding.startswith(("yu", "uyvy")):
        pixel_bytes = 2
    message = Image(encoding=encoding, height=height, width=width, step=width * pixel_bytes + int(rng.integers(0, 5)))
    message.header.stamp.sec = int(rng.integers(-(2**31), 2**31))
    message.header.stamp.nanosec = int(rng.integers(0, 2**32))
    message.header.frame_id = "camera"
    message.data = array.array("B", rng.bytes(message.step * (height * 3 // 2 if encoding[:2] == "nv" else height)))
    return message


def _break_raw(rng: np.random.Generator, message: Image) -> None:
    which = rng.integers(8)
    if which == 0:
        message.height = int(rng.choice(_SIZES))
    elif which == 1:
        message.width = int(rng.choice(_SIZES))
    elif which == 2:
        message.step = int(rng.choice([*_SIZES, message.width, max(message.step - 1, 0), message.step + 1]))
    elif which == 3:
        message.encoding = str(rng.choice(_ENCODINGS))
    elif which == 4:
        message.is_bigendian = int(rng.integers(256))
    elif which == 5:
        message.data = array.array("B", rng.bytes(int(rng.choice([0, 1, 100, len(message.data) + 1, 20_000]))))
    elif which == 6:  # a size and a step that multiply to the length, or to it modulo 2**32
        message.height, message.step = message.step % 2**32, message.height
    else:  # one row or one column, as long as is allowed or longer
        length = int(rng.choice([5000, MAX_PIXELS, MAX_PIXELS + 1]))
        message.height, message.width, message.encoding = 1, length, "mono8"
        message.step = length
        if rng.random() < 0.5:
            message.height, message.width, message.step = length, 1, 1
        message.data = array.array("B", bytes(length))


def _picture(rng: np.random.Generator) -> bytes:
    height, width = (int(value) for value in rng.integers(1, 200, 2))
    channels = int(rng.choice([1, 3, 4]))
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    kind = rng.integers(4)
    if kind == 0:
        return encoded(pixels, ".png")
    if kind == 1:
        return encoded(pixels.astype(np.uint16) * 257, ".png")
    colours = pixels[..., :1] if channels == 1 else np.ascontiguousarray(pixels[..., :3])
    return encoded(colours, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, int(kind == 2))


def _mutated(rng: np.random.Generator) -> bytes:
    data = bytearray(_picture(rng))
    for _ in range(rng.integers(0, 6)):
        # Half of them in the header, where they hurt.
        place = int(rng.integers(min(len(data), 64) if rng.random() < 0.5 else len(data)))
        data[place] = int(rng.choice([0, 0x7F, 0x80, 0xC0, 0xD0, 0xD8, 0xD9, 0xDA, 0xFF, rng.integers(256)]))
    return bytes(data)


def _truncated(rng: np.random.Generator) -> bytes:
    data = _picture(rng)
    data = data[: int(rng.integers(len(data)))]
    return data + (b"\xff\xd9" if rng.random() < 0.5 else b"")


def _noise(rng: np.random.Generator) -> bytes:
    start = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF")[rng.integers(6)]
    return start + rng.bytes(int(rng.integers(3000)))


def _claiming(rng: np.random.Generator) -> bytes:
    width, height = (int(value) for value in rng.choice(_SIZES, 2))
    if rng.random() < 0.5:
        pixels = chunk(b"IDAT", zlib.compress(bytes(int(rng.integers(1, 100_000)))))
        return png_claiming(width, height, pixels, int(rng.choice([1, 8, 16, 3])), int(rng.integers(8)))
    data = bytearray(_picture_jpeg(rng))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height % 65536, width % 65536)
    if rng.random() < 0.5:  # markers without a length, which a careless reader of headers steps over
        marker = (b"\xff\xd0", b"\xff\x01", b"\xff\xd8", b"\xff\xe0\x00\x00", b"\xff\xda\x00\x04")[rng.integers(5)]
        data[2:2] = marker
    return bytes(data)


def _picture_jpeg(rng: np.random.Generator) -> bytes:
    return encoded(rng.integers(0, 256, (40, 48, 3), np.uint8), ".jpg")


def _bomb(rng: np.random.Generator) -> bytes:
    kind = rng.integers(8)
    if kind == 0:  # inflates to far more than the pixels that are claimed
        return png_claiming(16, 16, chunk(b"IDAT", zlib.compress(bytes(8_000_000))))
    if kind == 1:  # text that inflates
        text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(8_000_000)))
        return png_claiming(16, 16, text * 50 + chunk(b"IDAT", zlib.compress(bytes(49 * 16))))
    if kind == 2:  # more chunks than anybody writes
        return png_claiming(16, 16, chunk(b"tEXt", b"") * 40_000)
    if kind == 3:  # fill bytes, one by one
        return b"\xff\xd8" + b"\xff" * 2_000_000 + b"\xff\xd9"
    if kind == 4:  # segments without content
        return b"\xff\xd8" + b"\xff\xe1\x00\x02" * 500_000 + b"\xff\xd9"
    if kind == 5:  # scan after scan over a picture of a million pixels
        data = encoded(np.zeros((1000, 1000), np.uint8), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
        scan = data.rindex(b"\xff\xda")
        return data[:scan] + data[scan:-2] * 2000 + b"\xff\xd9"
    if kind == 6:  # a large picture in a few bytes
        return png_claiming(1024, 1024, chunk(b"IDAT", zlib.compress(bytes(2000))))
    # Padding, megabytes of it.
    return encoded(rng.integers(0, 256, (40, 48, 3), np.uint8), ".jpg") + bytes(6_000_000)
