# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Messages that were made to do harm, through everything that a frame goes through in the node."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import hostile
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from robot import Robot, header
from sensor_msgs.msg import Image

from clustvit_ros.compressed_images import compressed_size, decode_compressed
from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.engine.worker import FrameSlot
from clustvit_ros.errors import ImageError
from clustvit_ros.images import Intensities
from clustvit_ros.jpeg import KnownEdges
from clustvit_ros.node.camera import Frame, Outputs
from clustvit_ros.node.filling import FrameFiller
from clustvit_ros.node.frame import FrameSession, MaskPublisher
from clustvit_ros.node.messages import image_message
from clustvit_ros.policy import Policy
from clustvit_ros.policy.ledger import Ledger
from clustvit_ros.policy.parameter_spec import build
from clustvit_ros.policy.parameters import SegmentationParameters

LONGEST_REJECTION_MS = 10.0
GROWTH_BYTES = 8 << 20


class Sink:
    """A publisher that keeps the newest message."""

    newest: Any = None

    def get_subscription_count(self) -> int:
        return 1

    def publish(self, message: Any) -> None:
        self.newest = message


class QuietLogger:
    """Takes what the node would log."""

    def info(self, text: str, **_throttle: Any) -> None:
        pass

    error = warning = info


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def expected_size(message: Any) -> tuple[int, int]:
    if isinstance(message, Image):
        return message.height, message.width
    return compressed_size(bytes(message.data))


def feed(messages: Iterator[Any], count: int, seed: int) -> None:
    """Push messages through the pipeline; fails on a crash, a wrong mask, a slow rejection or growing memory."""
    sinks: dict[str, Sink] = {}
    camera = SimpleNamespace(
        name="", ledger=Ledger(), known_edges=KnownEdges(), intensities=Intensities(),
        parameters=build(SegmentationParameters, {"max_image_pixels": hostile.MAX_PIXELS}),
        outputs=Outputs(
            lambda _kind, topic, *_qos, **_options: sinks.setdefault(topic.removeprefix("segmentation/"), Sink())
        ),
    )  # fmt: skip
    engine, logger = ScriptedEngine(), QuietLogger()
    publisher = MaskPublisher("node", logger, lambda: 0)
    filler = FrameFiller({"": camera}, publisher, logger, lambda: True)
    session = FrameSession(
        engine, Policy(engine, logger), {"": camera}, FrameSlot(), publisher, filler, logger, lambda: True,
    )  # fmt: skip
    accepted, slow = 0, []
    settled_bytes = 0
    for index, message in enumerate(itertools.islice(messages, count)):
        if index == count // 2:
            settled_bytes = resident_bytes()
        start_s = time.thread_time()  # this thread's alone: other processes are no fault of the message
        session.handle(Frame(message, 0))
        assert not camera.ledger.count("failed"), camera.ledger.last_failure
        if camera.ledger.segmented == accepted:
            took_ms = (time.thread_time() - start_s) * 1000.0
            if took_ms > LONGEST_REJECTION_MS:
                slow.append((took_ms, camera.ledger.last_rejection))
            continue
        accepted += 1
        assert camera.ledger.newest.mask_size == expected_size(message)
        for name, sink in sinks.items():
            output = sink.newest
            if not isinstance(output, Image | hostile.CompressedImage):
                continue  # statistics, and what is published once
            if isinstance(output, hostile.CompressedImage):
                assert compressed_size(bytes(output.data)) == expected_size(message), name
                assert output.header == message.header, name
                continue
            assert (output.height, output.width) == expected_size(message), name
            assert len(output.data) == output.step * output.height, name
            assert output.header == message.header, name
    assert not slow, f"seed {seed}: {max(slow)}"
    assert 0.05 * count < accepted < 0.8 * count, "the generator must make both kinds"
    assert resident_bytes() - settled_bytes < GROWTH_BYTES


@pytest.mark.parametrize("kind", [hostile.raw_messages, hostile.compressed_messages])
def test_two_thousand_hostile_messages(kind: Callable[[int], Iterator[Any]]) -> None:
    feed(kind(1), 1000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [hostile.raw_messages, hostile.compressed_messages])
@pytest.mark.parametrize("seed", [2, 3])
def test_twenty_thousand_hostile_messages(kind: Callable[[int], Iterator[Any]], seed: int) -> None:
    feed(kind(seed), 5000, seed)


def message_of(data: bytes) -> Any:
    return hostile.CompressedImage(format="png", data=data)


def test_text_and_profiles_of_a_png_are_never_inflated() -> None:
    import zlib

    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    data = hostile.encoded(pixels, ".png")
    bomb = hostile.chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(8_000_000)))
    decoded = decode_compressed(message_of(data[:33] + 100 * bomb + data[33:]), 10_000)
    np.testing.assert_array_equal(decoded, pixels[..., ::-1])


@pytest.mark.parametrize("marker", [b"\xff\xd0", b"\xff\x01", b"\xff\xd8"])
def test_a_jpeg_cannot_show_one_size_and_decode_to_another(marker: bytes) -> None:
    # A reader that takes two bytes of length after such a marker steps over the real frame header to a false one.
    jpeg = hostile.encoded(np.zeros((40, 48, 3), np.uint8), ".jpg")
    with pytest.raises(ImageError, match="without a frame header"):
        decode_compressed(message_of(jpeg[:2] + marker + jpeg[2:]), 1 << 20)


@pytest.mark.parametrize("height", [32, 33])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_kind_of_png_still_decodes(height: int, channels: int, dtype: type) -> None:
    most = np.iinfo(dtype).max
    pixels = np.random.default_rng(0).integers(0, most + 1, (height, 41, channels)).astype(dtype)
    decoded = decode_compressed(message_of(hostile.encoded(pixels, ".png")), 10_000)
    colours = np.broadcast_to(pixels, (height, 41, 3)) if channels == 1 else pixels[..., 2::-1]
    np.testing.assert_array_equal(decoded, np.rint(colours * (255.0 / most)))  # 16 bits as those of raw images


def test_flat_pictures_are_no_bombs() -> None:
    flat = np.full((2000, 3000, 3), 90, np.uint8)
    for suffix, options in ((".png", (cv2.IMWRITE_PNG_COMPRESSION, 9)), (".jpg", (cv2.IMWRITE_JPEG_QUALITY, 1)),
                            (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_OPTIMIZE, 1))):  # fmt: skip
        decoded = decode_compressed(message_of(hostile.encoded(flat, suffix, *options)), 6_000_000)
        assert abs(int(decoded[1000, 1500, 0]) - 90) < 8


@pytest.mark.ros
@pytest.mark.parametrize("transport", ["raw", "compressed"])
def test_the_node_outlives_them_over_dds(
    ros_client: Any, start_node: Callable[..., Any], transport: str, rng: np.random.Generator
) -> None:
    namespace = f"/hostile_{transport}"
    robot = Robot(
        ros_client, start_node, namespace, "-p", f"max_image_pixels:={hostile.MAX_PIXELS}", "-p",
        f"image_transport:={transport}", transport=transport,
    )  # fmt: skip
    messages = hostile.raw_messages(5) if transport == "raw" else hostile.compressed_messages(5)
    for message in itertools.islice(messages, 150):
        robot.camera.publish(message)
        ros_client.spin_for(0.005)
    robot.masks.clear()
    pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    good = image_message(pixels, "rgb8", header(77))
    if transport == "compressed":
        good = hostile.CompressedImage(header=good.header, format="png")
        good.data.frombytes(hostile.encoded(pixels[..., ::-1], ".png"))
    mask = robot.segment(good)
    np.testing.assert_array_equal(np.frombuffer(mask.data, np.uint8).reshape(48, 64), pixels[..., 1] >> 6)
    assert "Traceback" not in robot.process.output
    assert "image not segmented" in robot.process.output
    assert robot.process.stop() == 0
