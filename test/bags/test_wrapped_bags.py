# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Bags in every wrapping: compressed, renamed, without metadata, of ROS 1."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

pytest.importorskip("rosbags", reason="needs rosbags")

import recordings
from recordings import FRAMES, camera_bag, image, label, masks, replay, storage_file, tree, truncate

from clustvit_ros.bags import BagReader, find_bags
from clustvit_ros.errors import BagError, ClustvitError


def zstd_file(path: Path, content: bytes) -> Path:
    from rosbags.rosbag2 import writer  # it knows which module has Zstandard on this Python

    path.write_bytes(writer.zstd.compress(content))
    return path


def message_compressed(folder: Path, storage: str, numbers: Iterable[int] = range(FRAMES)) -> Path:
    from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

    writer = Writer(folder, version=8, storage_plugin=StoragePlugin[storage.upper()])
    writer.set_compression(CompressionMode.MESSAGE, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection("/camera/image_raw", recordings.IMAGE, typestore=recordings.STORE)
        for number in numbers:
            data = recordings.STORE.serialize_cdr(image(number), recordings.IMAGE)
            writer.write(connection, recordings.START_NS + number * recordings.PERIOD_NS, data)
    return folder


def no_metadata(bag: Path) -> Path:
    (bag / "metadata.yaml").unlink()
    return bag


def file_compressed(bag: Path) -> Path:
    """As rosbag2 does it with --compression-mode file."""
    file = storage_file(bag)
    zstd_file(file.with_name(file.name + ".zstd"), file.read_bytes())
    file.unlink()
    metadata = bag / "metadata.yaml"
    text = metadata.read_text().replace(file.name, file.name + ".zstd")
    text = re.sub(r"compression_format: .*", "compression_format: zstd", text)
    metadata.write_text(re.sub(r"compression_mode: .*", "compression_mode: FILE", text))
    return bag


def renamed(bag: Path, name: str) -> Path:
    file = storage_file(bag)
    file.rename(bag / name)
    return bag


WRAPPINGS: dict[str, Callable[[Path, str], Path]] = {
    "messages": lambda folder, storage: message_compressed(folder, storage),
    "messages, no metadata": lambda folder, storage: no_metadata(message_compressed(folder, storage)),
    "messages, alone": lambda folder, storage: storage_file(message_compressed(folder, storage)),
    "file": lambda folder, storage: file_compressed(camera_bag(folder, FRAMES, storage)),
    "file, no metadata": lambda folder, storage: no_metadata(file_compressed(camera_bag(folder, FRAMES, storage))),
    "file, alone": lambda folder, storage: next(file_compressed(camera_bag(folder, FRAMES, storage)).glob("*.zstd")),
    "file, another name": lambda folder, storage: next(
        file_compressed(camera_bag(folder, FRAMES, storage)).glob("*.zstd")
    ).rename(folder / "drive.zst"),
    "file and messages, no metadata": lambda folder, storage: no_metadata(
        file_compressed(message_compressed(folder, storage))
    ),
    "renamed": lambda folder, storage: renamed(
        camera_bag(folder, FRAMES, storage), f"other{'.mcap' if storage == 'mcap' else '.db3'}"
    ),
    "another suffix": lambda folder, storage: renamed(camera_bag(folder, FRAMES, storage), "drive.backup"),
    "the wrong suffix": lambda folder, storage: renamed(
        camera_bag(folder, FRAMES, storage), f"other{'.db3' if storage == 'mcap' else '.mcap'}"
    ),
    "no suffix, alone": lambda folder, storage: storage_file(camera_bag(folder, FRAMES, storage)).rename(
        folder / "drive"
    ),
    "unpacked by hand": lambda folder, storage: unpacked(folder, storage),
}  # fmt: skip


def unpacked(folder: Path, storage: str) -> Path:
    camera_bag(folder, FRAMES, storage)
    file = storage_file(folder)
    content = file.read_bytes()
    file_compressed(folder)
    file.with_name(file.name + ".zstd").unlink()
    file.write_bytes(content)
    return folder


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_bag_is_read_in_any_wrapping(tmp_path, storage, wrapping, expected):
    source = WRAPPINGS[wrapping](tmp_path / "in", storage)
    before = tree(tmp_path)
    report = label(source, tmp_path / "out")
    assert report.complete, report
    assert masks(tmp_path / "out") == expected
    assert storage_file(tmp_path / "out").suffix == {"mcap": ".mcap", "sqlite3": ".db3"}[storage]
    assert {name for name in tree(tmp_path) if not name.startswith("out")} == set(before)


@pytest.mark.parametrize("share", [0.4, 0.8])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_compressed_file_that_was_cut_gives_what_is_whole(tmp_path, storage, share):
    bag = file_compressed(camera_bag(tmp_path / "in", 40, storage))
    file = next(bag.glob("*.zstd"))
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    for source in (bag, file):
        report = label(source, tmp_path / f"out_{source.suffix}")
        assert not report.complete and any("ends before its compressed content does" in s for s in report.damage)
        assert 40 * share - 6 <= report.labelled <= 40 * share + 1


def ros1_bag(path: Path, frames: int) -> Path:
    from rosbags.rosbag1 import Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS1_NOETIC)
    with Writer(path) as writer:
        connection = writer.add_connection("/camera/image_raw", recordings.IMAGE, typestore=store)
        other = writer.add_connection("/chatter", "std_msgs/msg/String", typestore=store)
        writer.write(
            other,
            recordings.START_NS,
            store.serialize_ros1(store.types["std_msgs/msg/String"]("hello"), "std_msgs/msg/String"),
        )
        for number in range(frames):
            message = image(number)
            stamp = store.types["builtin_interfaces/msg/Time"](message.header.stamp.sec, message.header.stamp.nanosec)
            head = store.types["std_msgs/msg/Header"](number, stamp, message.header.frame_id)
            old = store.types[recordings.IMAGE](
                head, message.height, message.width, message.encoding, 0, message.step, message.data
            )
            time_ns = recordings.START_NS + number * recordings.PERIOD_NS
            writer.write(connection, time_ns, store.serialize_ros1(old, recordings.IMAGE))
    return path


@pytest.mark.parametrize("form", ["file", "folder", "compressed", "another name"])
def test_a_ros1_bag_is_labelled(tmp_path, form, expected):
    (tmp_path / "in").mkdir()
    source = ros1_bag(tmp_path / "in" / "drive.bag", FRAMES)
    if form == "compressed":
        source = zstd_file(tmp_path / "in" / "drive.bag.zstd", source.read_bytes())
    elif form == "another name":
        source = source.rename(tmp_path / "in" / "drive_1")
    elif form == "folder":
        source = source.parent
    report = label(source, tmp_path / "out")
    assert report.complete and list(report.prefixes) == ["/camera/image_raw"]
    assert masks(tmp_path / "out") == expected
    frame = replay(tmp_path / "out")["/segmentation/mask"][1].message.header
    assert frame == recordings.header(1)
    assert storage_file(tmp_path / "out").suffix == ".mcap"


def test_a_ros1_bag_whose_recorder_was_killed_names_what_repairs_it(tmp_path):
    source = ros1_bag(tmp_path / "drive.bag", FRAMES)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(BagError, match=r"drive.bag: .*; `rosbag reindex` of ROS 1 repairs it"):
        label(source, tmp_path / "out")


def test_bags_of_ros1_and_compressed_ones_are_found(tmp_path):
    ros1_bag(tmp_path / "drive.bag", 1)
    alone = zstd_file(tmp_path / "drive.mcap.zstd", storage_file(camera_bag(tmp_path / "in", 1)).read_bytes())
    assert find_bags(str(tmp_path)) == [tmp_path / "drive.bag", alone, tmp_path / "in"]


def test_what_is_not_there_is_still_missing(tmp_path):
    """Another file in the folder does not stand for one that was lost."""
    source = camera_bag(tmp_path / "in", FRAMES)
    shutil.copy(storage_file(camera_bag(tmp_path / "short", FRAMES - 1)), source / "other.mcap")
    (source / "in.mcap").unlink()
    report = label(source, tmp_path / "out")
    assert (report.labelled, report.complete, report.damage) == (FRAMES - 1, False, ["in.mcap: is missing"])


@pytest.mark.parametrize("names", [("in_0.mcap", "in_1.mcap"), ("b_9.mcap", "b_10.mcap"), ("front", "rear")])
@pytest.mark.parametrize("metadata", [True, False])
def test_a_split_bag_may_be_renamed(tmp_path, names, metadata, expected):
    source = camera_bag(tmp_path / "in", FRAMES)
    for name, numbers in zip(names, (range(FRAMES // 2), range(FRAMES // 2, FRAMES)), strict=True):
        storage_file(message_compressed(tmp_path / "part", "mcap", numbers)).rename(source / name)
        shutil.rmtree(tmp_path / "part")
    (source / "in.mcap").unlink()
    listed = (source / "metadata.yaml").read_text().replace("- in.mcap", "- in_0.mcap\n  - in_1.mcap")
    (source / "metadata.yaml").write_text(listed)
    if not metadata:
        (source / "metadata.yaml").unlink()
    report = label(source, tmp_path / "out")
    assert report.complete and masks(tmp_path / "out") == expected


def test_messages_that_cannot_be_read_are_not_called_none(tmp_path):
    source = camera_bag(tmp_path / "in", FRAMES, "sqlite3")
    with sqlite3.connect(storage_file(source)) as database:
        database.execute("UPDATE messages SET data = x'28b52ffd00010203'")
    with pytest.raises(BagError, match=f"holds {FRAMES} messages of which none can be read"):
        label(source, tmp_path / "out")
    with BagReader(truncate(source, 0.99)) as bag:
        assert bag.topics


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def garble(content: bytes, chance: random.Random) -> bytes:
    """A few bytes anywhere, or at the front, where the structure is."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 8, 60])):
        changed[chance.randrange(chance.choice([min(300, len(changed)), len(changed)]))] = chance.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("harm", [cut, garble])
@pytest.mark.parametrize("wrapping", ["plain", "messages", "file", "ros1"])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_whatever_is_garbled_is_told_in_words(tmp_path, storage, wrapping, harm):
    """Labelled, in part and said so, or refused; never another error, and never fewer frames in silence."""
    whole = tmp_path / "whole"
    if wrapping == "ros1":
        whole.mkdir()
        ros1_bag(whole / "drive.bag", FRAMES)
    else:
        WRAPPINGS.get(wrapping, lambda folder, kind: camera_bag(folder, FRAMES, kind))(whole, storage)
    files = sorted(whole.iterdir())
    for seed in range(12):
        chance = random.Random(f"{storage} {wrapping} {harm.__name__} {seed}")
        bag = shutil.copytree(whole, tmp_path / f"bag_{seed}")
        file = bag / chance.choice(files).name
        file.write_bytes(harm(file.read_bytes(), chance))
        try:
            report = label(bag, tmp_path / f"out_{seed}", format=chance.choice(["bag", "png"]))
        except ClustvitError:
            continue
        assert report.labelled == FRAMES or not report.complete, seed


def test_a_length_that_no_file_has_takes_no_memory(tmp_path):
    source = storage_file(camera_bag(tmp_path / "in", FRAMES))
    content = bytearray(source.read_bytes())
    content[9:17] = b"\xff" * 8
    source.write_bytes(content)
    with pytest.raises(BagError, match="ends inside the record at byte 8"):
        label(source, tmp_path / "out")
