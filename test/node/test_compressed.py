# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""JPEG and PNG frames, and the ways in which they lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sensor_msgs", reason="needs ROS 2 (sensor_msgs)")

from clustvit_ros.compressed_images import compressed_size, decode_compressed
from clustvit_ros.errors import ImageError
from clustvit_ros.images import narrow
from clustvit_ros.jpeg import KnownEdges
from clustvit_ros.node.camera import Frame

MAX_PIXELS = 1 << 20
RAMP = np.add.outer(np.arange(48), np.arange(64))
RGB = np.stack([40 + RAMP, 220 - RAMP, 90 + RAMP // 2], axis=-1).astype(np.uint8)
JPEG, PNG = (cv2.imencode(suffix, RGB[..., ::-1])[1].tobytes() for suffix in (".jpg", ".png"))


def message_of(data: bytes, kind: str = "rgb8; jpeg compressed bgr8") -> Any:
    return SimpleNamespace(format=kind, data=data)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims `width` by `height` pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return PNG[:8] + chunk + PNG[-12:]


def test_png_is_exact_and_jpeg_close() -> None:
    np.testing.assert_array_equal(decode_compressed(message_of(PNG), MAX_PIXELS), RGB)
    assert np.abs(decode_compressed(message_of(JPEG), MAX_PIXELS).astype(int) - RGB).max() < 20


def test_zeros_after_a_jpeg_are_padding() -> None:
    assert decode_compressed(message_of(JPEG + bytes(64)), MAX_PIXELS).shape == RGB.shape


def test_size_is_read_without_decoding() -> None:
    assert compressed_size(JPEG) == compressed_size(PNG) == (48, 64)
    progressive = cv2.imencode(".jpg", RGB, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert compressed_size(progressive) == (48, 64)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "expected a JPEG or PNG image"),
        (b"GIF89a" + bytes(100), "expected a JPEG or PNG image"),
        (JPEG[: len(JPEG) // 2], "it was truncated"),
        (PNG[: len(PNG) // 2], "it was truncated"),
        (JPEG[:10], "without a frame header"),
        (png_claiming(60_000, 60_000), "expected at most 1048576"),
        (png_claiming(0, 10), "expected at least 1x1"),
        (png_claiming(64, 48), "damaged 64x48 image that cannot be decoded"),
    ],
)
def test_errors_say_what_is_wrong(data: bytes, text: str) -> None:
    with pytest.raises(ImageError) as error:
        decode_compressed(message_of(data), MAX_PIXELS)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "text", ["16UC1; compressedDepth png", "32FC1; compressedDepth", "32FC1; png compressed", "compresseddepth"]
)
def test_depth_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="which is depth, expected a colour or grey JPEG or PNG"):
        decode_compressed(message_of(PNG, text), MAX_PIXELS)


def test_16_bits_are_scaled_as_those_of_raw_images() -> None:
    values = np.linspace(8000, 9000, 48 * 64).reshape(48, 64).astype(np.uint16)
    message = message_of(cv2.imencode(".png", values)[1].tobytes(), "16UC1; png compressed ")
    full = decode_compressed(message, MAX_PIXELS)
    np.testing.assert_array_equal(full[..., 0], np.rint(values * (255.0 / 65_535)).astype(np.uint8))
    stretched = decode_compressed(message, MAX_PIXELS, lambda pixels: narrow(pixels, 8000, 9000))
    np.testing.assert_array_equal(stretched[..., 0], narrow(values, 8000, 9000))
    assert (stretched.min(), stretched.max()) == (0, 255)


def test_a_damaged_frame_is_no_scene_because_two_threads_look_at_it(stair_jpeg: Callable[[int, int], bytes]) -> None:
    edges, message = KnownEdges(), message_of(stair_jpeg(4, 7))

    def look(frame: Frame) -> np.ndarray:
        return frame.image(lambda: decode_compressed(message, MAX_PIXELS, is_scene=edges.is_scene))

    frame = Frame(message, 1)
    for _ in range(2):
        with pytest.raises(ImageError, match="from some block on all are brighter"):
            look(frame)
    assert look(Frame(message, 2)).shape == (240, 320, 3), "the next one shows the same: it is the scene"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([JPEG, PNG]), st.integers(0, 4000), st.binary(max_size=8), st.integers(0, 64))
def test_mutations_give_the_claimed_size_or_an_image_error(data: bytes, place: int, patch: bytes, cut: int) -> None:
    place %= len(data)
    mutated = data[:place] + patch + data[place + len(patch) :]
    mutated = mutated[: len(mutated) - cut]
    try:
        decoded = decode_compressed(message_of(mutated), MAX_PIXELS)
    except ImageError:
        return
    assert decoded.shape == (*compressed_size(mutated), 3)
