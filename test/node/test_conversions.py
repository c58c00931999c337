# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Pixels of every encoding, and one clear error for everything else."""

from __future__ import annotations

import array
import re
import sys
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sensor_msgs", reason="needs ROS 2 (sensor_msgs)")

from std_msgs.msg import Header

from clustvit_ros.errors import ImageError
from clustvit_ros.images import SUPPORTED_ENCODINGS, Intensities, decode_image, narrow
from clustvit_ros.node.messages import image_message

MAX_PIXELS = 1 << 20
HEIGHT, WIDTH = 48, 64
GREEN_RAMP = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH))
# Smooth, so that interpolating encodings can be compared too.
RGB = np.stack([40 + GREEN_RAMP, 220 - GREEN_RAMP, 90 + GREEN_RAMP // 2], axis=-1).astype(np.uint8)


def message_of(pixels: np.ndarray, encoding: str, padding: int = 0, bigendian: int = 0) -> Any:
    """An image message of (H, ...) pixels whose rows end with `padding` bytes of garbage."""
    rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(pixels.shape[0], -1)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=170)
    return SimpleNamespace(
        height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, is_bigendian=bigendian,
        step=padded.shape[1], data=array.array("B", padded.tobytes()),
    )  # fmt: skip


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "order"),
    [("rgb8", "rgb"), ("bgr8", "bgr"), ("rgba8", "rgba"), ("bgra8", "bgra"), ("8UC3", "bgr"), ("8UC4", "bgra")],
)
def test_colour_orders(encoding: str, order: str, padding: int) -> None:
    channels = {"r": RGB[..., 0], "g": RGB[..., 1], "b": RGB[..., 2], "a": np.full((HEIGHT, WIDTH), 3, np.uint8)}
    pixels = np.stack([channels[name] for name in order], axis=-1)
    decoded = decode_image(message_of(pixels, encoding, padding), MAX_PIXELS)
    np.testing.assert_array_equal(decoded, RGB)
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_mono8(encoding: str, padding: int) -> None:
    decoded = decode_image(message_of(RGB[..., 1], encoding, padding), MAX_PIXELS)
    np.testing.assert_array_equal(decoded, np.repeat(RGB[..., 1:2], 3, axis=2))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("bigendian", [0, 1])
def test_mono16_uses_the_full_range_in_both_byte_orders(bigendian: int, padding: int) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(">u2" if bigendian else "<u2")
    decoded = decode_image(message_of(values, "mono16", padding, bigendian), MAX_PIXELS)
    expected = np.rint(values.astype(np.float64) * 255.0 / 65535.0).astype(np.uint8)
    np.testing.assert_array_equal(decoded[..., 0], expected)
    assert (decoded.min(), decoded.max()) == (0, 255)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_mosaics_start_with_the_named_square(pattern: str, padding: int) -> None:
    mosaic = np.empty((HEIGHT, WIDTH), np.uint8)
    for place, colour in enumerate(pattern):
        row, column = divmod(place, 2)
        mosaic[row::2, column::2] = RGB[row::2, column::2, "rgb".index(colour)]
    decoded = decode_image(message_of(mosaic, f"bayer_{pattern}8", padding), MAX_PIXELS)
    # Interpolation of a ramp is exact to rounding; a shifted pattern would swap red and blue, 130 apart.
    assert np.abs(decoded.astype(int) - RGB).max() <= 2


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize(
    ("encoding", "luma_first"), [("yuv422", False), ("uyvy", False), ("yuv422_yuy2", True), ("yuyv", True)]
)
def test_yuv422(encoding: str, luma_first: bool, padding: int) -> None:
    # One colour: BT.601 in video range, red = 1.164 (Y - 16) + 1.596 (V - 128), and so on.
    luma, chroma_blue, chroma_red = 120, 90, 200
    pair = (luma, chroma_blue, luma, chroma_red) if luma_first else (chroma_blue, luma, chroma_red, luma)
    pixels = np.tile(np.array(pair, np.uint8).reshape(1, 2, 2), (HEIGHT, WIDTH // 2, 1))
    decoded = decode_image(message_of(pixels, encoding, padding), MAX_PIXELS)
    scaled = 1.164 * (luma - 16)
    expected = (
        scaled + 1.596 * (chroma_red - 128),
        scaled - 0.813 * (chroma_red - 128) - 0.391 * (chroma_blue - 128),
        scaled + 2.018 * (chroma_blue - 128),
    )
    assert decoded.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(decoded - np.array(expected)).max() <= 1.5


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize(("encoding", "blue_first"), [("nv12", True), ("nv21", False)])
def test_nv12_and_nv21(encoding: str, blue_first: bool, padding: int) -> None:
    # Four squares of one colour each: what OpenCV makes of RGB in YUV 4:2:0 planes, the two of colour interleaved.
    squares = np.array([[[200, 30, 40], [30, 180, 60]], [[20, 60, 210], [128, 128, 128]]], np.uint8)
    picture = squares.repeat(HEIGHT // 2, axis=0).repeat(WIDTH // 2, axis=1)
    planes = cv2.cvtColor(picture, cv2.COLOR_RGB2YUV_I420).ravel()
    count = HEIGHT * WIDTH
    colours = planes[count:].reshape(2, -1)
    chroma = (colours if blue_first else colours[::-1]).T.reshape(HEIGHT // 2, WIDTH)
    message = message_of(np.vstack([planes[:count].reshape(HEIGHT, WIDTH), chroma]), encoding, padding)
    message.height = HEIGHT
    decoded = decode_image(message, MAX_PIXELS)
    assert decoded.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(decoded.astype(int) - picture).max() <= 3
    for change in ({"height": HEIGHT - 1}, {"width": WIDTH - 1}):
        odd = SimpleNamespace(**{**vars(message), **change})
        with pytest.raises(ImageError, match="expected an even number"):
            decode_image(odd, MAX_PIXELS)
    message.height = HEIGHT * 3 // 2  # as a driver has it that counts rows of memory
    with pytest.raises(ImageError, match=r"data: got \d+ bytes for 64x72 nv"):
        decode_image(message, MAX_PIXELS)


@pytest.mark.parametrize("bigendian", [0, 1])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("encoding", [name for name in SUPPORTED_ENCODINGS if "16" in name])
def test_16_bits_decode_as_8_bits_of_the_same_name(encoding: str, padding: int, bigendian: int) -> None:
    narrow_name = encoding.replace("16", "8")
    channels = {"rgb8": 3, "bgr8": 3, "8UC3": 3, "rgba8": 4, "bgra8": 4, "8UC4": 4}.get(narrow_name, 1)
    pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, channels), np.uint8).squeeze()
    wide = (pixels.astype(np.uint16) * 257).astype(">u2" if bigendian else "<u2")
    np.testing.assert_array_equal(
        decode_image(message_of(wide, encoding, padding, bigendian), MAX_PIXELS),
        decode_image(message_of(pixels, narrow_name), MAX_PIXELS),
    )


def test_a_range_of_intensities_is_stretched_and_what_lies_beyond_is_clipped() -> None:
    values = np.array([[0, 7999, 8000, 8500, 9000, 9001, 65_535]] * 4, np.uint16)
    decoded = decode_image(message_of(values, "16UC1"), MAX_PIXELS, lambda pixels: narrow(pixels, 8000, 9000))
    assert decoded[0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_an_automatic_range_shows_what_a_thermal_camera_sees_and_follows_its_drift() -> None:
    rng, auto = np.random.default_rng(5), Intensities()
    scene = rng.normal(0.0, 30.0, (HEIGHT, WIDTH))

    def seen(offset: float) -> np.ndarray:
        values = (29_500 + offset + scene).astype(np.uint16)
        values[0, 0] = 65_535  # a dead pixel
        return decode_image(message_of(values, "mono16"), MAX_PIXELS, auto.within(None))[..., 0]

    first = seen(0.0)
    assert first.std() > 50 and (first == 0).mean() < 0.03 and (first == 255).mean() < 0.03
    flash = seen(400.0)  # one picture of the shutter changes little
    assert (flash == 255).mean() > 0.9
    assert abs(float(seen(0.0).mean()) - float(first.mean())) < 80
    for _ in range(60):
        later = seen(100.0)
    assert abs(float(later.mean()) - float(first.mean())) < 3, "it has followed"
    flat = message_of(np.full((4, 4), 700, np.uint16), "16UC1")
    black = np.zeros((4, 4, 3), np.uint8)
    np.testing.assert_array_equal(decode_image(flat, MAX_PIXELS, Intensities().within(None)), black)


def test_a_range_that_pictures_hardly_use_is_told() -> None:
    scene = np.random.default_rng(5).normal(7_700.0, 120.0, (HEIGHT, WIDTH)).astype(np.uint16)
    intensities = Intensities()
    for limits, told in (
        ((0, 65_535), True), (None, False), ((7_000, 8_500), False), ((30_000, 40_000), True), ((0, 9_000), True),
        ((7_500, 8_000), False),
    ):  # fmt: skip
        seen = decode_image(message_of(scene, "16UC1"), MAX_PIXELS, intensities.within(limits))
        assert bool(intensities.problem) == told, limits
        assert told == (int(seen.max()) - int(seen.min()) < 30), limits
    intensities.within((0, 65_535))(scene)
    assert re.search(r"got 0 65535, of which 16-bit pictures use 0\.\d % .* lie in 7\d+ to 7\d+\)", intensities.problem)
    assert "set auto" in intensities.problem
    for _ in range(60):  # a camera whose gain has changed
        intensities.within((0, 65_535))(scene * 4)
    assert "lie in 29" in intensities.problem
    for _ in range(60):
        intensities.within((0, 65_535))(np.linspace(0, 65_535, scene.size).astype(np.uint16).reshape(scene.shape))
    assert not intensities.problem


def test_rgb8_shares_the_messages_memory() -> None:
    message = message_of(RGB, "rgb8")
    assert np.shares_memory(decode_image(message, MAX_PIXELS), np.frombuffer(message.data, np.uint8))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"encoding": "32FC1"}, "encoding: got '32FC1', expected one of rgb8, bgr8"),
        ({"encoding": ""}, "encoding: got ''"),
        ({"width": 0}, "image size: got 0x48, expected at least 1x1"),
        ({"height": 0}, "image size: got 64x0, expected at least 1x1"),
        ({"width": 4294967295, "height": 4294967295}, "expected at most 1048576; reduce the camera's resolution"),
        ({"width": 40_000, "height": 20}, "image size: got 40000x20, expected sides of at most 32767 px"),
        ({"width": 5000, "height": 1}, "not more than 64 to 1"),
        ({"step": 191}, "step: got 191 bytes for 64x48 rgb8, expected at least 192"),
        ({"step": 4294967295}, "data: got 9216 bytes for 64x48 rgb8 with step 4294967295"),
        ({"data": array.array("B")}, "data: got 0 bytes for 64x48 rgb8 with step 192, expected 9216"),
        ({"height": 49}, "data: got 9216 bytes for 64x49 rgb8 with step 192, expected 9408"),
        ({"encoding": "yuyv", "width": 63}, "width: got 63 of 63x48 yuyv, expected an even number"),
        ({"encoding": "bayer_rggb8", "width": 3}, "image size: got 3x48 bayer_rggb8, expected at least 4x4"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], text: str) -> None:
    message = message_of(RGB, "rgb8")
    vars(message).update(change)
    with pytest.raises(ImageError) as error:
        decode_image(message, MAX_PIXELS)
    assert text in str(error.value)


@settings(max_examples=400, deadline=None)
@given(
    encoding=st.one_of(st.sampled_from(SUPPORTED_ENCODINGS), st.text(max_size=12)),
    height=st.one_of(st.integers(0, 12), st.sampled_from([2**31, 2**32 - 1])),
    width=st.one_of(st.integers(0, 12), st.sampled_from([2**31, 2**32 - 1])),
    step=st.one_of(st.integers(0, 60), st.sampled_from([2**31, 2**32 - 1]), st.none()),
    length=st.one_of(st.integers(0, 700), st.none()),
    bigendian=st.integers(0, 255),
)
def test_any_message_gives_its_size_or_an_image_error(
    encoding: str, height: int, width: int, step: int | None, length: int | None, bigendian: int
) -> None:
    step = min(width, 100) * 4 if step is None else step  # None: one that fits, so that decoding is reached too
    length = min(step * height, 5000) if length is None else length
    message = SimpleNamespace(
        encoding=encoding, height=height, width=width, step=step, is_bigendian=bigendian,
        data=array.array("B", bytes(length)),
    )  # fmt: skip
    try:
        decoded = decode_image(message, MAX_PIXELS)
    except ImageError:
        return
    assert decoded.shape == (height, width, 3)
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [("mono8", RGB[..., 0]), ("mono16", RGB[..., 0].astype(np.uint16) * 200), ("rgb8", RGB), ("bgr8", RGB[..., ::-1])],
)
def test_built_messages_are_packed_and_keep_the_header(encoding: str, pixels: np.ndarray) -> None:
    header = Header(frame_id="left/optical")
    header.stamp.sec, header.stamp.nanosec = 2**31 - 1, 999_999_999
    message = image_message(pixels, encoding, header)
    assert message.header == header
    assert (message.height, message.width) == (HEIGHT, WIDTH)
    assert message.step == WIDTH * pixels.itemsize * (pixels.size // (HEIGHT * WIDTH))
    assert len(message.data) == message.step * HEIGHT
    assert message.is_bigendian == (encoding == "mono16" and sys.byteorder == "big")
    stored = np.frombuffer(message.data, pixels.dtype).reshape(pixels.shape)
    np.testing.assert_array_equal(stored, pixels)


def test_building_refuses_pixels_that_do_not_fit() -> None:
    with pytest.raises(ImageError, match="mono8 message"):
        image_message(RGB, "mono8", Header())


def test_same_pixels_as_cv_bridge() -> None:
    cv_bridge = pytest.importorskip("cv_bridge", reason="needs cv_bridge")
    try:
        bridge = cv_bridge.CvBridge()
        expected = bridge.imgmsg_to_cv2(image_message(RGB, "rgb8", Header()), "rgb8")
    except Exception as error:  # its compiled part raises whatever NumPy 2 makes of it
        pytest.skip(f"cv_bridge does not work here: {error}")
    np.testing.assert_array_equal(decode_image(image_message(RGB, "rgb8", Header()), MAX_PIXELS), expected)
    for encoding, pixels in (("bgr8", cv2.cvtColor(RGB, cv2.COLOR_RGB2BGR)), ("mono8", RGB[..., 0])):
        message = image_message(pixels, encoding, Header())
        np.testing.assert_array_equal(decode_image(message, MAX_PIXELS), bridge.imgmsg_to_cv2(message, "rgb8"))
