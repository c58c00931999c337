# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""JPEG files to pixels, and how damage in them shows.

libjpeg decodes whatever it is given and only warns, which OpenCV does not pass on; simplejpeg does (libjpeg-turbo too,
with the same pixels). A JPEG has no checksum: damage shows as codes that do not end where the file does. What is left
are errors that the codes survive. Each block states its mean brightness as a difference from the last block's, so that
such an error shifts brightness or colour of everything behind it: in the picture, blocks are set off from those above
them along exactly one row's length in the order of the file, from the middle of one row of blocks to the middle of the
next, and between two lines of pixels. Scenes have edges along rows, but seldom such a stair on the blocks' own borders:
none in 2,307 photographs and 49,000 windows of them. Where one does, a camera at rest would lose every frame: what
was found at the same place in its frame before is taken for the scene (`KnownEdges`).
"""

from __future__ import annotations

import functools
import math
import re
import struct
import warnings
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from clustvit_ros.errors import ImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

JPEG_SIGNATURE = b"\xff\xd8\xff"
# Start-of-frame markers; C4, C8 and CC in this range mean something else.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_QUANTISATION, _RESTART_INTERVAL, _FILL = 0xDB, 0xDD, 0xFF
# TEM, RST0..7, SOI, EOI, SOS: without a length, or misplaced before the frame header.
_MISPLACED_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDB)})
# Colour profile (at most 255 segments), previews, tables: a camera writes far fewer.
_MAX_SEGMENTS = 1024
# Cameras of Logitech leave odd bytes before restart markers, between which damage is contained.
_CONTAINED_SHARE = 0.02


class _Limits(NamedTuple):
    """Bounds of a stair.

    At least: all but a fifth of its steps, in units of the usual one between blocks; and relative to its height, each
    of its parts, and what lies between two lines of pixels. At most: what steps differ by, the step before it, and what
    is elsewhere.
    """

    step: float
    part: float
    across: float
    uneven: float
    before: float
    elsewhere: float


# Low qualities leave little of colour but steps between blocks.
_BRIGHTNESS, _COLOUR = _Limits(1.5, 0.4, 0.85, 0.6, math.inf, 0.85), _Limits(3.0, 0.6, 0.7, 0.3, 0.3, 0.7)
# How lines change beside a stair, relative to its height.
_BESIDE = 0.2
# Half of RGB to luma and two chroma axes.
_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32) / 2


class JpegHeader(NamedTuple):
    """What stands before the first scan of a JPEG.

    Attributes:
        height, width: in pixels.
        components: 1 grey, 3 colour, 4 CMYK.
        mcu: (height, width) in pixels of the unit that blocks of all components are stored in.
        levels: what a mean brightness, luma and chroma, is rounded to.
        restart_interval: units between restart markers, 0 = none.
        scan: where the first scan begins; the file's end where there is none.
    """

    height: int
    width: int
    components: int
    mcu: tuple[int, int]
    levels: tuple[float, float]
    restart_interval: int
    scan: int

    @property
    def mcus(self) -> tuple[int, int]:
        """(rows, columns) of units, those at the edges included."""
        return -(-self.height // self.mcu[0]), -(-self.width // self.mcu[1])


class Shift(NamedTuple):
    """From where on a picture has another brightness or colour.

    Attributes:
        size: (rows, columns) of units that the picture has.
        channel: 0 brightness, 1 blue, 2 red.
        row, column: of the first unit.
    """

    size: tuple[int, int]
    channel: int
    row: int
    column: int


class KnownEdges:
    """Tells scenes from damage by what the camera showed before: damage strikes at random places."""

    def __init__(self) -> None:
        self._last: Shift | None = None

    def is_scene(self, found: Shift) -> bool:
        """Whether the last shift that was found was at this place."""
        before, self._last = self._last, found
        if before is None or before[:2] != found[:2]:
            return False
        return abs(before.row - found.row) <= 1 and abs(before.column - found.column) <= max(2, found.size[1] // 16)


def read_jpeg_header(data: memoryview) -> JpegHeader:
    """Read what stands before the first scan, more strictly than decoders do.

    Raises:
        ImageError: no frame header there, as in a file that is cut or damaged.
    """
    position, frame, restart_interval = 2, b"", 0
    levels: dict[int, float] = {}
    for _ in range(_MAX_SEGMENTS):
        end = position + 4 > len(data) or data[position] != 0xFF
        if end or data[position + 1] in _MISPLACED_MARKERS:
            break
        marker = data[position + 1]
        if marker == _FILL:
            position += 1
            continue
        (length,) = struct.unpack(">H", data[position + 2 : position + 4])
        body = bytes(data[position + 4 : position + 2 + length])
        if marker in _FRAME_MARKERS and not frame:
            if len(body) < 6 or len(body) < 6 + 3 * body[5]:
                break
            frame = body
        elif marker == _RESTART_INTERVAL and len(body) == 2:
            (restart_interval,) = struct.unpack(">H", body)
        elif marker == _QUANTISATION:
            levels |= _levels(body)
        if length < 2:
            break
        position += 2 + length
    if not frame:
        raise ImageError(f"data: got {len(data)} bytes of JPEG without a frame header; it is truncated or damaged")
    height, width, components = struct.unpack(">HHB", frame[1:6])
    factors, tables = frame[7::3][:components], frame[8::3][:components]
    if components == 1:
        factors = b"\x11"  # a component alone is stored block by block
    return JpegHeader(
        height, width, components,
        (8 * max([1, *(factor & 15 for factor in factors)]), 8 * max([1, *(factor >> 4 for factor in factors)])),
        (levels.get(tables[0] if tables else 0, 1.0), levels.get(tables[-1] if tables else 0, 1.0)),
        restart_interval, min(position, len(data)),
    )  # fmt: skip


def decode_jpeg(
    data: bytes, header: JpegHeader, is_scene: Callable[[Shift], bool] = lambda found: False
) -> np.ndarray:  # fmt: skip
    """Decode a JPEG that is not damaged, as far as that can be told.

    Args:
        data: the file; bytes after its end marker are of no matter.
        header: its header.
        is_scene: asked where nothing but a shift speaks of damage; True accepts the picture.

    Returns:
        (H, W, 3) uint8 RGB; orientation tags are ignored.

    Raises:
        ImageError: truncated or damaged.
    """
    size = f"{header.width}x{header.height}"
    try:
        pixels = _decode_strictly(data, header)
    except ValueError as error:
        if data.find(b"\xff\xd9", header.scan) < 0:
            raise truncated(data, header.height, header.width) from error
        if not _is_contained(data, header):
            raise ImageError(f"data: a damaged {size} image that cannot be decoded ({error})") from error
        pixels = decode_with_opencv(data, header.height, header.width)
    if pixels.shape != (header.height, header.width, 3):
        raise ImageError(f"data: {len(data)} bytes of a damaged {size} image that cannot be decoded")
    shift = None if header.restart_interval else find_shift(pixels, header)
    if shift is not None and not is_scene(shift):
        raise ImageError(
            f"data: a damaged {size} image that cannot be decoded (from some block on all are brighter, darker or of "
            "another colour)"
        )
    return pixels


def truncated(data: bytes, height: int, width: int) -> ImageError:
    """The error for a file that ends too early."""
    return ImageError(f"data: got {len(data)} bytes of a {width}x{height} image without its end, it was truncated")


def decode_with_opencv(data: bytes, height: int, width: int) -> np.ndarray:
    """Decode a file of any kind that OpenCV knows: (H, W, 3) RGB, uint8 or as wide as it is; orientation is ignored.

    Raises:
        ImageError: it cannot be decoded, or to another size.
    """
    try:
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"data: a damaged {width}x{height} image that cannot be decoded ({error.err})") from error
    if pixels is None or pixels.shape[:2] != (height, width):
        raise ImageError(f"data: {len(data)} bytes of a damaged {width}x{height} image that cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def find_shift(pixels: np.ndarray, header: JpegHeader) -> Shift | None:
    """From which unit on, but a row's first, brightness or colour is another, if from any.

    Args:
        pixels: (H, W, 3) uint8 RGB as decoded.
        header: says how large units are.
    """
    high, wide = header.mcu
    rows, columns = header.height // high, header.width // wide
    if rows < 4 or columns < 4:
        return None
    steps = _steps(pixels, header, 0)
    sample = np.sort(np.abs(steps[:, ::4]), axis=1)
    noise = sample[:, sample.shape[1] // 2, None] + 0.3
    means = _window_means(steps, noise, columns)
    peaks = np.abs(means).argmax(axis=1)
    for channel, peak in enumerate(peaks.tolist()):
        height, first = means[channel, peak], peak - columns // 2
        place = slice(max(first, 0), first + columns)
        window = np.sign(height) * steps[channel, place]
        ordered = np.sort(window)
        shift, usual = float(ordered[len(window) // 2]), float(noise[channel, 0])
        # Coarse quantisation alone makes steps of one or two levels of it, in chroma along whole rows.
        smallest = max(2.0, 1.5 * header.levels[0]) if channel == 0 else max(1.0, 2.5 * header.levels[1])
        limits = _COLOUR if channel else _BRIGHTNESS
        if shift < smallest or ordered[len(window) // 5] < limits.step * usual:
            continue
        # All are set off by the same, but for what the scene adds.
        if np.median(np.abs(window - shift)) > limits.uneven * shift:
            continue
        # A stair has both parts, the end of one row of units and the beginning of the next one, and begins with a step.
        parts = np.split(window, [columns - first % columns]) if first > 0 else [window[:0]]
        if not all(len(part) and np.median(part) > limits.part * shift for part in parts):
            continue
        if abs(np.median(steps[channel, max(first - 4, 0) : first])) > limits.before * shift:
            continue
        # Edges of a scene are elsewhere in most columns, or as wide as a lens makes them.
        above, across, below = np.sign(height) * _changes(pixels, header, channel, place)
        if across < limits.across * shift or max(abs(above), abs(below)) > _BESIDE * shift:
            continue
        # Those of coarse colours are not, but brightness changes with them.
        if channel and np.abs(_changes(pixels, header, 0, place)[::2]).max() > shift:
            continue
        # And there is nothing like it elsewhere, nor half a unit further down, where scenes have edges as well.
        means[channel, max(peak - columns, 0) : peak + columns] = 0.0
        between = _window_means(_steps(pixels, header, high // 2)[channel, None], noise[channel, None], columns)
        if max(np.abs(means[channel]).max(), np.abs(between).max()) < limits.elsewhere * abs(height):
            return Shift(header.mcus, channel, first // columns + 1, first % columns)
    return None


def _changes(pixels: np.ndarray, header: JpegHeader, channel: int, place: slice) -> np.ndarray:
    """(3,) medians, over some units, of how lines change above their upper border, across it and below it."""
    high, wide = header.mcu
    columns, rows = header.width // wide, header.height // high
    first = place.start // columns
    last = min((place.stop - 1) // columns + 2, rows)
    image = pixels[first * high : last * high, : columns * wide].reshape(-1, high, columns * wide, 3)
    near = 1 if channel and high > 8 else 0  # subsampled chroma is interpolated across the border
    lines = [image[:-1, -3 - near], image[:-1, -1 - near], image[1:, near], image[1:, 2 + near]]
    changes = np.diff(np.stack(lines).astype(np.float32), axis=0).reshape(-1, columns * wide, 3)
    means = cv2.resize(changes, (columns, len(changes)), interpolation=cv2.INTER_AREA)
    of_units = (means @ (2.0 * _YCC[channel])).reshape(3, -1)
    return np.median(of_units[:, place.start - first * columns : place.stop - first * columns], axis=1)


def _steps(pixels: np.ndarray, header: JpegHeader, offset: int) -> np.ndarray:
    """By how much each unit is set off from the one above: (3, units but the first row's) luma, blue and red.

    Gradients on both sides are taken off. Subsampled chroma is interpolated across the boundary, but not further.
    """
    high, wide = header.mcu
    columns, rows = header.width // wide, (header.height - offset) // high
    image = pixels[offset : offset + rows * high, : columns * wide].reshape(rows, high, columns * wide, 3)
    near, far = (1, 3) if high > 8 else (0, 1)
    below, above = image[1:], image[:-1]
    step = below[:, near].astype(np.int16) - above[:, -1 - near]
    step *= 3
    step -= below[:, far]
    step += above[:, -1 - far]
    mean = cv2.resize(step.astype(np.float32), (columns, len(step)), interpolation=cv2.INTER_AREA)
    return cv2.transform(mean, _YCC).reshape(-1, 3).T


def _window_means(steps: np.ndarray, noise: np.ndarray, columns: int) -> np.ndarray:
    """Means of clipped steps over a row's length about every unit; zeros lie beyond both ends."""
    clipped = np.clip(steps / (2.0 * noise), -1.0, 1.0)
    return cv2.blur(clipped, (columns, 1), anchor=(columns // 2, 0), borderType=cv2.BORDER_CONSTANT)


def _decode_strictly(data: bytes, header: JpegHeader) -> np.ndarray:
    if simplejpeg is None:
        _warn_once()
        return decode_with_opencv(data, header.height, header.width)
    if header.components == 4:
        simplejpeg.decode_jpeg(data, "CMYK")
        return decode_with_opencv(data, header.height, header.width)
    return simplejpeg.decode_jpeg(data, "RGB")


@functools.lru_cache(maxsize=1)
def _warn_once() -> None:
    warnings.warn(
        "simplejpeg is not installed: most damaged JPEG images cannot be told from good ones; pip install simplejpeg",
        RuntimeWarning, stacklevel=2,
    )  # fmt: skip


def _is_contained(data: bytes, header: JpegHeader) -> bool:
    """Whether all restart markers are in their places, so close that damage between two of them is small."""
    rows, columns = header.mcus
    if not 0 < header.restart_interval <= max(_CONTAINED_SHARE * rows * columns, 1):
        return False
    found = [match[0][1] & 7 for match in re.finditer(rb"\xff[\xd0-\xd7]", data[header.scan : data.rfind(b"\xff\xd9")])]
    return found == [index % 8 for index in range(-(-rows * columns // header.restart_interval) - 1)]


def _levels(tables: bytes) -> dict[int, float]:
    """Quantisation tables to what mean brightness is rounded to, by their numbers."""
    levels, position = {}, 0
    while position + 65 <= len(tables):
        wide = tables[position] >> 4 > 0
        levels[tables[position] & 15] = int.from_bytes(tables[position + 1 : position + 2 + wide], "big") / 8
        position += 129 if wide else 65
    return levels
