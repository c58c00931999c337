# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Makes small rosbag2 bags, whole and damaged, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from clustvit_ros.bags import LabelOptions, LabelReport, label_bag
from clustvit_ros.bags.reading import plain_link
from clustvit_ros.engine import ScriptedEngine

STORE = get_typestore(Stores.ROS2_HUMBLE)
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
START_NS = 1_700_000_000_123_456_789
PERIOD_NS = 33_333_333
FRAMES = 6
"""Of most bags here."""


class Recorded(NamedTuple):
    """A message of a bag."""

    timestamp_ns: int
    message: Any


def header(number: int) -> Any:
    """A header whose stamp differs from the time of recording."""
    sec, nanosec = divmod(START_NS + number * PERIOD_NS - 5_000_001, 1_000_000_000)
    stamp = STORE.types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    return STORE.types["std_msgs/msg/Header"](stamp=stamp, frame_id=f"camera_{number % 2}")


def picture(number: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """(H, W, 3) uint8 RGB, a different one for every number."""
    return np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)


def image(number: int, encoding: str = "rgb8", size: tuple[int, int] = (48, 64)) -> Any:
    """A raw image message."""
    pixels = picture(number, size)
    if encoding == "bgr8":
        pixels = np.ascontiguousarray(pixels[..., ::-1])
    data = np.zeros(size[0] * size[1] * 4, np.uint8) if encoding == "32FC1" else pixels.reshape(-1)
    return STORE.types[IMAGE](
        header=header(number), height=size[0], width=size[1], encoding=encoding, is_bigendian=0,
        step=data.size // size[0], data=data,
    )  # fmt: skip


def compressed(number: int) -> Any:
    """A PNG image message, lossless so that its labels can be computed."""
    encoded = cv2.imencode(".png", picture(number)[..., ::-1])[1]
    return STORE.types[COMPRESSED](header=header(number), format="rgb8; png compressed bgr8", data=encoded.reshape(-1))


def jpeg(number: int, data: bytes) -> Any:
    """A JPEG image message."""
    pixels = np.frombuffer(data, np.uint8)
    return STORE.types[COMPRESSED](header=header(number), format="rgb8; jpeg compressed bgr8", data=pixels)


def record(path: Path, topics: dict[str, list[Any]], storage: str = "mcap") -> Path:
    """Write messages by topic into a bag; the n-th of every topic at START_NS + n * PERIOD_NS."""
    with Writer(path, version=8, storage_plugin=StoragePlugin[storage.upper()]) as writer:
        connections = {
            name: writer.add_connection(name, messages[0].__msgtype__, typestore=STORE)
            for name, messages in topics.items()
        }
        for number in range(max(map(len, topics.values()))):
            for name, messages in topics.items():
                if number < len(messages):
                    message = messages[number]
                    data = STORE.serialize_cdr(message, message.__msgtype__)
                    writer.write(connections[name], START_NS + number * PERIOD_NS, data)
    return path


def camera_bag(path: Path, frames: int, storage: str = "mcap", size: tuple[int, int] = (48, 64)) -> Path:
    """A bag with one raw image topic."""
    return record(path, {"/camera/image_raw": [image(number, size=size) for number in range(frames)]}, storage)


def storage_file(bag: Path) -> Path:
    """The one storage file of a bag."""
    (file,) = [*bag.glob("*.mcap"), *bag.glob("*.db3")]
    return file


def truncate(bag: Path, share: float) -> Path:
    """Cut the bag's storage file to a share of its size."""
    file = storage_file(bag)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    return bag


def replay(bag: Path) -> dict[str, list[Recorded]]:
    """Everything in a bag by topic."""
    found: dict[str, list[Recorded]] = {}
    with Reader(bag) as reader:
        for connection, timestamp_ns, data in reader.messages():
            message = STORE.deserialize_cdr(data, connection.msgtype)
            found.setdefault(connection.topic, []).append(Recorded(timestamp_ns, message))
    return found


def masks(bag: Path) -> list[bytes]:
    """Stamps and masks of a labelled bag."""
    with plain_link(bag) as bag:
        found = replay(bag)["/segmentation/mask"]
    return [b"%d " % recorded.timestamp_ns + recorded.message.data.tobytes() for recorded in found]


def label(source: Path, target: Path, *, restart: bool = False, **options: Any) -> LabelReport:
    """Label a bag with the scripted engine."""
    return label_bag(source, target, ScriptedEngine(), LabelOptions(**options), restart)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def command(source: Path, target: Path, *arguments: str) -> list[str]:
    """Arguments of the command, with the scripted engine."""
    return ["label-bag", str(source), str(target), "--engine", "scripted", *arguments]
