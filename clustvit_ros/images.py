# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Pixels in messages and in folders: Image fields to arrays and back, for nodes, bags and data sets alike; no ROS here.

Without cv_bridge too, whose compiled part breaks under NumPy 2.
Every field of an incoming message is untrusted. What can be decoded gives the pixels that cv_bridge gives; what cannot
is an ImageError that says what was got and what to do.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from clustvit_ros.errors import DataError, ImageError
from clustvit_ros.jpeg import JPEG_SIGNATURE, decode_jpeg, read_jpeg_header

_LOG = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Files of a folder that are taken for images, whatever the case."""

_ORIENTATION_TAG = 0x0112


def list_images(folder: Path) -> list[Path]:
    """The image files of an existing folder, sorted by name; hidden ones (`._a.jpg`, of macOS) are none."""
    return sorted(path for path in folder.iterdir() if is_image(path) and not path.name.startswith("."))


def is_image(path: Path) -> bool:
    """Whether a path is of an image file, by its name; links that lead nowhere are, so that reading them says so."""
    there = path.is_file() or (path.is_symlink() and not path.exists())
    return there and path.suffix.lower() in IMAGE_SUFFIXES


def orientation(path: Path) -> int:
    """An image file's orientation tag: 1 to 8, 1 = as stored; 1 without a tag, or without Pillow to read it."""
    try:
        from PIL import Image

        with Image.open(path) as image:
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # whatever it stumbles over is no tag
        return 1


def read_image(path: Path, to_bytes: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """Read an image file: (H, W, 3) uint8 RGB, the pixels as stored: orientation tags are ignored, as in messages.

    A file that only looks damaged is told and used: somebody chose it, can look at it, and one in ten thousand is not.

    Args:
        path: the file.
        to_bytes: makes uint8 of the uint16 values of a 16-bit image; None scales all of their range, as `narrow` does.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(JPEG_SIGNATURE):
            return decode_jpeg(data, read_jpeg_header(memoryview(data)), lambda found: _tell_damage(Path(path)))
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_ANYDEPTH
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is not None and image.dtype == np.uint16:
            image = (to_bytes or narrow)(image)
        elif image is not None and image.dtype != np.uint8:
            # OpenCV's own 8 bits would be black where values lie between 0 and 1.
            raise ImageError(f"got {image.dtype} values, expected unsigned 8 or 16 bits")
    except ImageError as error:
        raise DataError(f"{path}: {str(error).removeprefix('data: ')}; replace or remove the file") from error
    except (OSError, cv2.error):
        image = None
    if image is None:
        raise DataError(f"{path}: {_unreadable(path)}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _unreadable(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which is not there; bring it back, or remove the link"
    return "cannot be read as an image; replace or remove the file"


def read_stored(path: Path) -> np.ndarray:
    """Read an image file's values as they are: (H, W) of ids, or (H, W, C) in OpenCV's order.

    Raises:
        DataError: it cannot be read.
    """
    try:
        values = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error):
        values = None
    if values is None:
        raise DataError(f"{path}: {_unreadable(path)}")
    return values


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB, or (H, W) uint8 or uint16 ids, in the format that the name's end says; makes folders.

    Not by `cv2.imwrite`, which ends the process where a name is not UTF-8, as `cv2.imread` does.

    Raises:
        DataError: it cannot be written.
    """
    good, data = cv2.imencode(path.suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels)
    if not good:
        raise DataError(f"{path}: cannot be written: {path.suffix} takes no {pixels.shape[1]}x{pixels.shape[0]} pixels")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(np.asarray(data).tobytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); check the folder's permissions and the disk's free space"
        ) from error


@functools.lru_cache(maxsize=4096)
def _tell_damage(path: Path) -> bool:
    """Say it once of each file: training reads them again and again."""
    _LOG.warning(
        "%s: looks damaged (from some block on all are brighter, darker or of another colour); it is used, replace or "
        "remove it if that is so", path,
    )  # fmt: skip
    return True


@dataclass(frozen=True)
class _Encoding:
    """How pixels of one encoding lie in memory, and how they become RGB.

    Args:
        channels: values per pixel in memory.
        to_rgb: (H, W) or (H, W, channels) uint8 -> (H, W, 3) uint8.
        value_bytes: bytes per value; two become one before anything else is done with them.
        width_multiple: the width must be a multiple of this.
        half_plane: rows of brightness, and half as many of two colours, each for 2x2 pixels; the height must be even.
        smallest_side_px: width and height must be at least this.
    """

    channels: int
    to_rgb: Callable[[np.ndarray], np.ndarray]
    value_bytes: int = 1
    width_multiple: int = 1
    half_plane: bool = False
    smallest_side_px: int = 1


def _converted(code: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: cv2.cvtColor(pixels, code)


def narrow(pixels: np.ndarray, low: int = 0, high: int = 65_535) -> np.ndarray:
    """16 bits to 8, `low` to 0 and `high` to 255; as cv_bridge scales them where the range is the full one.

    Args:
        pixels: uint16 of one or more channels.
        low: what becomes 0, as everything below does.
        high: what becomes 255, as everything above does.
    """
    above = np.maximum(pixels, np.uint16(low)) - np.uint16(low) if low else pixels
    return cv2.convertScaleAbs(above, alpha=255.0 / (high - low))


# Some ten pictures decide: a shutter that closes for one does not flicker.
_USED_PERCENTILES, _USED_WEIGHT, _SAMPLE_STEP_PX = (1.0, 99.0), 0.1, 4
# Some twenty of 256 levels: a 12-bit camera's pictures in 16 bits are below, dusk in a camera's full range is not.
_LEAST_USED = 0.08


class Intensities:
    """Makes 8 bits of the 16 that one camera's pictures have, of which a thermal one uses a small, drifting part.

    An automatic range is the 1st to 99th percentile of the values, the newest picture's with a `weight` beside those
    before; 1 takes each by itself. `problem` says that a range which was given is hardly used, and what helps.
    """

    def __init__(self, weight: float = _USED_WEIGHT) -> None:
        self._used: np.ndarray | None = None
        self._weight = weight
        self.problem = ""

    def within(self, limits: tuple[int, int] | None) -> Callable[[np.ndarray], np.ndarray]:
        """What narrows a picture as `narrow` does, between `limits` or, for None, by the pictures so far with it."""
        return functools.partial(self._narrow, limits=limits)

    def _narrow(self, pixels: np.ndarray, limits: tuple[int, int] | None) -> np.ndarray:
        used = np.percentile(pixels[::_SAMPLE_STEP_PX, ::_SAMPLE_STEP_PX], _USED_PERCENTILES)
        before = used if self._used is None else self._used
        self._used = before + self._weight * (used - before)
        low, high = (round(float(limit)) for limit in self._used)
        if limits is None:
            limits, share = (low, max(high, low + 1)), 1.0
        else:
            share = max(min(high, limits[1]) - max(low, limits[0]), 0) / (limits[1] - limits[0])
        self.problem = "" if share >= _LEAST_USED else (
            f"intensity_range: got {limits[0]} {limits[1]}, of which 16-bit pictures use {100 * share:.1f} % (most of "
            f"their values lie in {low} to {high}): next to nothing is seen in them; set auto, or another LOW HIGH"
        )
        return narrow(pixels, *limits)


_MONO = _Encoding(1, _converted(cv2.COLOR_GRAY2RGB))
_BGR = _Encoding(3, _converted(cv2.COLOR_BGR2RGB))
_BGRA = _Encoding(4, _converted(cv2.COLOR_BGRA2RGB))
_UYVY = _Encoding(2, _converted(cv2.COLOR_YUV2RGB_UYVY), width_multiple=2)
_YUYV = _Encoding(2, _converted(cv2.COLOR_YUV2RGB_YUYV), width_multiple=2)


def _bayer(code: int) -> _Encoding:
    # Interpolation needs a neighbour of every colour; OpenCV leaves smaller pictures black.
    return _Encoding(1, _converted(code), smallest_side_px=4)


def _half_plane(code: int) -> _Encoding:
    return _Encoding(1, _converted(code), width_multiple=2, half_plane=True)


# ROS names a mosaic by its first two rows from the corner; OpenCV's older constants by the square one pixel further in.
_ENCODINGS = {
    "rgb8": _Encoding(3, np.ascontiguousarray),
    "bgr8": _BGR,
    "rgba8": _Encoding(4, _converted(cv2.COLOR_RGBA2RGB)),
    "bgra8": _BGRA,
    "mono8": _MONO,
    "yuv422": _UYVY,
    "yuv422_yuy2": _YUYV,
    "uyvy": _UYVY,
    "yuyv": _YUYV,
    "nv12": _half_plane(cv2.COLOR_YUV2RGB_NV12),
    "nv21": _half_plane(cv2.COLOR_YUV2RGB_NV21),
    "bayer_rggb8": _bayer(cv2.COLOR_BayerBG2RGB),
    "bayer_bggr8": _bayer(cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg8": _bayer(cv2.COLOR_BayerGR2RGB),
    "bayer_grbg8": _bayer(cv2.COLOR_BayerGB2RGB),
    # Drivers that publish OpenCV matrices under their type's name mean OpenCV's channel order.
    "8UC1": _MONO,
    "8UC3": _BGR,
    "8UC4": _BGRA,
}
_ENCODINGS |= {
    name[:-1] + "16" if name.endswith("8") else f"16{name[1:]}": replace(encoding, value_bytes=2)
    for name, encoding in _ENCODINGS.items()
    if name.endswith("8") or name.startswith("8U")
}

SUPPORTED_ENCODINGS = tuple(_ENCODINGS)
"""Values of `Image.encoding` that can be segmented."""


# A line of pixels costs a network far more than a picture with as many: every column is upsampled from all tokens.
_LONGEST_SIDE_PX, _LONGEST_LINE_PX, _MOST_ELONGATED = 32_767, 4096, 64


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Refuse empty and oversized images, and lines of pixels.

    Raises:
        ImageError: a side is zero or too long, or there are more than `max_pixels` pixels.
    """
    if height < 1 or width < 1:
        raise ImageError(f"image size: got {width}x{height}, expected at least 1x1; check the camera driver")
    if height * width > max_pixels:
        raise ImageError(
            f"image size: got {width}x{height} = {height * width} pixels, expected at most {max_pixels}; "
            "reduce the camera's resolution or raise max_image_pixels"
        )
    longest, shortest = max(height, width), min(height, width)
    if longest > _LONGEST_SIDE_PX or longest > max(_LONGEST_LINE_PX, _MOST_ELONGATED * shortest):
        raise ImageError(
            f"image size: got {width}x{height}, expected sides of at most {_LONGEST_SIDE_PX} px and not more than "
            f"{_MOST_ELONGATED} to 1; check the camera driver"
        )


def message_bytes(data: Any) -> np.ndarray:
    """A message's `data` as (N,) uint8 that shares its memory.

    Raises:
        ImageError: no buffer of bytes.
    """
    try:
        return np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise ImageError(f"data: got {type(data).__name__}, expected bytes ({error})") from error


def pixel_rows(message: Any, rows: int, pixel_bytes: int) -> np.ndarray:
    """The bytes of an image message without the padding of its rows.

    Args:
        message: anything with the fields of sensor_msgs/Image.
        rows: how many there are in `data`.
        pixel_bytes: bytes per pixel of a row.

    Returns:
        (rows, width * pixel_bytes) uint8 that shares the message's memory.

    Raises:
        ImageError: `step` or `data` do not fit the size.
    """
    width, step = int(message.width), int(message.step)
    size, row_bytes = f"{width}x{int(message.height)} {message.encoding}", width * pixel_bytes
    if step < row_bytes:
        raise ImageError(f"step: got {step} bytes for {size}, expected at least {row_bytes}; fix the camera driver")
    data = message_bytes(message.data)
    if len(data) != step * rows:
        raise ImageError(
            f"data: got {len(data)} bytes for {size} with step {step}, expected {step * rows}; fix the camera driver"
        )
    return data.reshape(rows, step)[:, :row_bytes]


def decode_image(
    message: Any, max_pixels: int, narrow: Callable[[np.ndarray], np.ndarray] = narrow
) -> np.ndarray:  # fmt: skip
    """Decode a sensor_msgs/Image.

    Args:
        message: anything with the fields of sensor_msgs/Image.
        max_pixels: larger images are refused before memory is allocated for them.
        narrow: makes uint8 of uint16 values, for 16-bit images.

    Returns:
        (H, W, 3) uint8 RGB. It shares the message's memory where no conversion is needed.

    Raises:
        ImageError: unsupported encoding, impossible size, or data that does not fit the size.
    """
    encoding = _ENCODINGS.get(message.encoding)
    if encoding is None:
        raise ImageError(
            f"encoding: got {str(message.encoding)[:40]!r}, expected one of {', '.join(SUPPORTED_ENCODINGS)}; "
            "set the camera driver's encoding or convert with image_proc"
        )
    height, width = int(message.height), int(message.width)
    check_pixels(height, width, max_pixels)
    size = f"{width}x{height} {message.encoding}"
    multiples = ("width", width, encoding.width_multiple), ("height", height, 1 + encoding.half_plane)
    for name, side, multiple in multiples:
        if side % multiple:
            raise ImageError(
                f"{name}: got {side} of {size}, expected an even number; crop the image in the camera driver"
            )
    if min(height, width) < encoding.smallest_side_px:
        raise ImageError(
            f"image size: got {size}, expected at least {encoding.smallest_side_px}x{encoding.smallest_side_px} "
            "to interpolate colours"
        )
    count = height + height // 2 * encoding.half_plane
    rows = pixel_rows(message, count, encoding.channels * encoding.value_bytes)
    shape = (count, width, encoding.channels) if encoding.channels > 1 else (count, width)
    if encoding.value_bytes == 2:
        # Padding can leave rows at odd addresses; the copy also swaps bytes where needed.
        stored = np.ascontiguousarray(rows).view(">u2" if message.is_bigendian else "<u2")
        return encoding.to_rgb(narrow(stored.astype(np.uint16, copy=False).reshape(shape)))
    return encoding.to_rgb(rows.reshape(shape))


def image_fields(pixels: np.ndarray, encoding: str) -> dict[str, Any]:
    """The fields of an image message whose rows are packed: `step` is the width times the bytes of a pixel.

    Args:
        pixels: (H, W) uint8 for mono8, (H, W) uint16 for mono16, (H, W, 3) uint8 for rgb8 and bgr8.
        encoding: mono8, mono16, rgb8 or bgr8.

    Returns:
        height, width, encoding, is_bigendian, step, and data as (bytes,) uint8.

    Raises:
        ImageError: pixels that do not fit the encoding.
    """
    dtype, shape = {
        "mono8": (np.uint8, pixels.shape[:2]),
        "mono16": (np.uint16, pixels.shape[:2]),
        "rgb8": (np.uint8, (*pixels.shape[:2], 3)),
        "bgr8": (np.uint8, (*pixels.shape[:2], 3)),
    }[encoding]
    if pixels.dtype != dtype or pixels.shape != shape:
        raise ImageError(f"{encoding} message: got {pixels.shape} {pixels.dtype}, expected {shape} {np.dtype(dtype)}")
    return {
        "height": pixels.shape[0], "width": pixels.shape[1], "encoding": encoding,
        "is_bigendian": int(sys.byteorder == "big" and pixels.dtype.itemsize > 1), "step": pixels[0].nbytes,
        "data": np.ascontiguousarray(pixels).view(np.uint8).reshape(-1),
    }  # fmt: skip
