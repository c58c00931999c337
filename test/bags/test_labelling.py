# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Bags in, labels out: stamps, damage, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("rosbags", reason="needs rosbags")

import recordings
from recordings import camera_bag, image, picture, record, replay, storage_file, truncate

from clustvit_ros.bags import BagReader, LabelOptions, find_bags, label_bag
from clustvit_ros.cli.main import main
from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.errors import BagError, ConfigError

STORAGES = ["mcap", "sqlite3"]
SUFFIXES = {"mcap": ".mcap", "sqlite3": ".db3"}


def brightness_bands(number: int) -> np.ndarray:
    """The mask that the scripted engine makes of picture `number`."""
    return picture(number)[..., 1] >> 6


def label(source: Path, target: Path, **options) -> object:
    return label_bag(source, target, ScriptedEngine(), LabelOptions(**options))


def check_masks(bag: Path, frames: int, topic: str = "/segmentation") -> None:
    """The first `frames` pictures are labelled, each once, with the stamps of the recording."""
    found = replay(bag)
    assert set(found) == {f"{topic}/mask", f"{topic}/confidence", f"{topic}/stats"}
    for name in ("mask", "confidence", "stats"):
        recorded = found[f"{topic}/{name}"]
        assert [r.timestamp_ns for r in recorded] == [
            recordings.START_NS + number * recordings.PERIOD_NS for number in range(frames)
        ]
        assert [r.message.header for r in recorded] == [recordings.header(number) for number in range(frames)]
    for number, (_, mask) in enumerate(found[f"{topic}/mask"]):
        assert (mask.encoding, mask.step, mask.is_bigendian) == ("mono8", 64, 0)
        np.testing.assert_array_equal(mask.data.reshape(48, 64), brightness_bands(number))
    confidence = found[f"{topic}/confidence"][0].message
    assert confidence.data.min() >= 128  # the scripted engine's scale
    pairs = {pair.key: pair.value for pair in found[f"{topic}/stats"][0].message.status[0].values}
    assert (pairs["merge_threshold"], pairs["tokens_total"], pairs["mask_size"]) == ("0.5", "12", "48x64")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_round_trip_keeps_both_stamps(tmp_path, storage):
    source = camera_bag(tmp_path / "in", 7, storage)
    report = label(source, tmp_path / "out")
    assert (report.labelled, report.complete) == (7, True)
    check_masks(tmp_path / "out", 7)
    assert storage_file(tmp_path / "out").suffix == SUFFIXES[storage]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(("storage", "other"), [STORAGES, STORAGES[::-1]])
def test_the_output_may_have_another_storage_and_be_compressed(tmp_path, storage, other, compression):
    source = camera_bag(tmp_path / "in", 3, storage)
    label(source, tmp_path / "out", storage=other, compression=compression)
    check_masks(tmp_path / "out", 3)
    assert storage_file(tmp_path / "out").suffix == SUFFIXES[other]


def test_two_runs_give_the_same_bytes(tmp_path):
    source = camera_bag(tmp_path / "in", 4)
    for name in ("a", "b"):
        label(source, tmp_path / name / "out")
    assert storage_file(tmp_path / "a" / "out").read_bytes() == storage_file(tmp_path / "b" / "out").read_bytes()


def test_compressed_and_several_topics(tmp_path):
    topics = {
        "/front/image/compressed": [recordings.compressed(number) for number in range(5)],
        "/rear/image_raw": [image(number, "bgr8") for number in range(4)],
        "/depth/image": [image(number, "32FC1") for number in range(5)],
        "/segmentation/mask": [image(number, "rgb8") for number in range(5)],
        "/diagnostics_of_nobody": [recordings.STORE.types["std_msgs/msg/String"](data="hello")],
    }
    report = label(record(tmp_path / "in", topics), tmp_path / "out")
    assert report.prefixes == {
        "/front/image/compressed": "/front/image/compressed/segmentation",
        "/rear/image_raw": "/rear/image_raw/segmentation",
    }
    assert report.skipped == {
        "/depth/image": "holds depth (32FC1), which is no picture to segment: 5 messages",
        "/segmentation/mask": "is output of a segmentation node",
    }
    found = replay(tmp_path / "out")
    for prefix, frames in (("/front/image/compressed", 5), ("/rear/image_raw", 4)):
        masks = found[f"{prefix}/segmentation/mask"]
        assert len(masks) == frames
        for number, (_, mask) in enumerate(masks):
            np.testing.assert_array_equal(mask.data.reshape(48, 64), brightness_bands(number))

    one = label(tmp_path / "in", tmp_path / "one", topics=("/rear/image_raw",))
    assert one.prefixes == {"/rear/image_raw": "/segmentation"}
    check_masks(tmp_path / "one", 4)


def test_png_files_with_a_manifest(tmp_path):
    source = camera_bag(tmp_path / "in", 3, "sqlite3")
    label(source, tmp_path / "out", format="png", output_size=(24, 32))
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["timestamp_ns"] for line in lines] == [
        recordings.START_NS + number * recordings.PERIOD_NS for number in range(3)
    ]
    for number, line in enumerate(lines):
        stamp = recordings.header(number).stamp
        assert line["stamp_ns"] == stamp.sec * 10**9 + stamp.nanosec
        assert line["frame_id"] == f"camera_{number % 2}"
        mask = cv2.imread(str(tmp_path / "out" / line["mask"]), cv2.IMREAD_UNCHANGED)
        expected = cv2.resize(picture(number)[..., 1], (32, 24), interpolation=cv2.INTER_NEAREST) >> 6
        np.testing.assert_array_equal(mask, expected)
        assert cv2.imread(str(tmp_path / "out" / line["confidence"]), cv2.IMREAD_UNCHANGED).shape == (24, 32)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 6
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [entry["name"] for entry in run["classes"]] == ["dark", "dim", "bright", "glare"]


@pytest.mark.parametrize("share", [0.3, 0.55, 0.9])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_truncated_bag_gives_what_is_readable(tmp_path, storage, share, capsys):
    source = truncate(camera_bag(tmp_path / "in", 40, storage), share)
    assert main(["label-bag", str(source), str(tmp_path / "out"), "--engine", "scripted"]) == 1
    said = capsys.readouterr().err
    assert f"damaged: {storage_file(source).name}" in said
    labelled = len(replay(tmp_path / "out")["/segmentation/mask"])
    # One message may be cut in two, and what follows the last one takes some room as well.
    assert 40 * share - 4 <= labelled <= 40 * share + 1
    check_masks(tmp_path / "out", labelled)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bag_whose_recorder_was_killed_has_no_metadata(tmp_path, storage):
    source = camera_bag(tmp_path / "in", 6, storage)
    (source / "metadata.yaml").unlink()
    report = label(source, tmp_path / "out")
    assert report.complete
    check_masks(tmp_path / "out", 6)


@pytest.mark.parametrize("share", [0.1, 0.45])
def test_a_database_without_the_tree_to_its_rows(tmp_path, share):
    """Beyond some hundred rows, SQLite's tree of pages has inner nodes, and those of a cut file may be gone."""
    frames, size = 2500, (24, 32)
    message = image(0, size=size)
    bag = record(tmp_path / "in", {"/camera": [message] * frames}, "sqlite3")
    with BagReader(truncate(bag, share)) as reader:
        found = [entry.timestamp_ns for entry in reader.messages(["/camera"])]
    assert found == [recordings.START_NS + number * recordings.PERIOD_NS for number in range(len(found))]
    assert frames * share * 0.95 <= len(found) <= frames * share
    assert any("messages are readable" in sentence for sentence in reader.damage)


def test_a_zstd_chunk_that_is_cut_gives_its_first_messages(tmp_path):
    from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

    writer = Writer(tmp_path / "in", version=8, storage_plugin=StoragePlugin.MCAP)
    writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection("/camera", recordings.IMAGE, typestore=recordings.STORE)
        for number in range(40):
            data = recordings.STORE.serialize_cdr(image(number), recordings.IMAGE)
            writer.write(connection, recordings.START_NS + number * recordings.PERIOD_NS, data)
    truncate(tmp_path / "in", 0.5)
    report = label(tmp_path / "in", tmp_path / "out")
    assert 12 <= report.labelled <= 21 and not report.complete
    check_masks(tmp_path / "out", report.labelled)


@pytest.mark.parametrize("storage", STORAGES)
def test_damage_in_the_middle(tmp_path, storage):
    source = camera_bag(tmp_path / "in", 40, storage)
    file = storage_file(source)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60_000] = os.urandom(60_000)
    file.write_bytes(content)
    report = label(source, tmp_path / "out")
    # What was hit is either named as damage, or a message of the right shape with other pixels in it.
    assert 15 <= report.labelled <= 40
    assert len(replay(tmp_path / "out")["/segmentation/mask"]) == report.labelled
    if report.labelled < 40:
        assert not report.complete


def test_a_bad_image_between_good_ones_is_named(tmp_path, capsys):
    images = [image(number) for number in range(4)]
    images[2].step = 5
    source = record(tmp_path / "in", {"/camera": images})
    assert main(["label-bag", str(source), str(tmp_path / "out"), "--engine", "scripted"]) == 1
    assert "step: got 5 bytes" in capsys.readouterr().err
    assert len(replay(tmp_path / "out")["/segmentation/mask"]) == 3


def start_slow(source: Path, target: Path, frame_ms: float = 40.0) -> subprocess.Popen[str]:
    """label-bag in another process, with an engine that takes its time."""
    code = (
        "import sys; from pathlib import Path; from clustvit_ros.bags import label_bag;"
        f"from clustvit_ros.engine import ScriptedEngine;"
        f"label_bag(Path(sys.argv[1]), Path(sys.argv[2]), ScriptedEngine({frame_ms}))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(source), str(target)], text=True)


def rows(partial: Path) -> int:
    """Frames that are safe in a journal."""
    import sqlite3

    if not (partial / "journal.sqlite").exists():
        return 0
    try:
        with sqlite3.connect(partial / "journal.sqlite", timeout=5.0) as database:
            return database.execute("SELECT COUNT(*) FROM frames").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def kill_in_the_middle(source: Path, target: Path) -> int:
    """Kill a run once some of its frames are safe; returns how many."""
    partial = target.with_name(target.name + ".partial")
    process = start_slow(source, target)
    deadline = time.monotonic() + 60.0
    while rows(partial) < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists()
    return rows(partial)


@pytest.mark.parametrize("storage", STORAGES)
def test_kill_9_and_restart_continues_without_duplicates(tmp_path, storage, capsys):
    source = camera_bag(tmp_path / "in", 100, storage)
    done = kill_in_the_middle(source, tmp_path / "out")
    assert 5 <= done < 100
    assert main(["label-bag", str(source), str(tmp_path / "out"), "--engine", "scripted"]) == 0
    assert f"continuing: {done} of 100 images" in capsys.readouterr().out
    check_masks(tmp_path / "out", 100)
    assert not (tmp_path / "out.partial").exists()
    # And it equals what an undisturbed run gives.
    label(source, tmp_path / "undisturbed" / "out")
    assert storage_file(tmp_path / "out").read_bytes() == storage_file(tmp_path / "undisturbed" / "out").read_bytes()


def test_a_finished_output_is_left_alone(tmp_path, capsys):
    source = camera_bag(tmp_path / "in", 3)
    command = ["label-bag", str(source), str(tmp_path / "out"), "--engine", "scripted"]
    assert main(command) == 0
    before = storage_file(tmp_path / "out").stat().st_mtime_ns
    assert main(command) == 0
    assert "finished before" in capsys.readouterr().out
    assert storage_file(tmp_path / "out").stat().st_mtime_ns == before
    assert main([*command, "--merge-threshold", "0.3"]) == 2
    assert "merge_threshold 0.5, now 0.3" in capsys.readouterr().err
    assert main([*command, "--merge-threshold", "0.3", "--restart"]) == 0
    pairs = replay(tmp_path / "out")["/segmentation/stats"][0].message.status[0].values
    assert {pair.key: pair.value for pair in pairs}["merge_threshold"] == "0.3"


def test_a_stranger_s_folder_is_not_touched(tmp_path):
    source = camera_bag(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(ConfigError, match="is no output of label-bag"):
            label_bag(source, tmp_path / "out", ScriptedEngine(), restart=restart)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_two_processes_do_not_share_an_output(tmp_path):
    source = camera_bag(tmp_path / "in", 100)
    process = start_slow(source, tmp_path / "out")
    try:
        deadline = time.monotonic() + 60.0
        while not rows(tmp_path / "out.partial") and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(BagError, match="another process writes there"):
            label(source, tmp_path / "out")
    finally:
        process.kill()
        process.wait()


def test_what_cannot_be_labelled_says_why(tmp_path):
    with pytest.raises(BagError, match="there is no such bag"):
        label(tmp_path / "nowhere", tmp_path / "out")
    empty = tmp_path / "empty.mcap"
    empty.touch()
    with pytest.raises(BagError, match="nothing of this bag can be read"):
        label(empty, tmp_path / "out")
    words = record(tmp_path / "words", {"/chatter": [recordings.STORE.types["std_msgs/msg/String"](data="hello")]})
    with pytest.raises(BagError, match=r"no topic of sensor_msgs/msg/Image .*its topics are: /chatter"):
        label(words, tmp_path / "out")
    bag = camera_bag(tmp_path / "in", 2)
    with pytest.raises(ConfigError, match="topic /camera: is not in this bag, expected one of /camera/image_raw"):
        label(bag, tmp_path / "out", topics=("/camera",))
    assert not list(tmp_path.glob("out*"))


def test_a_split_bag_lacks_one_file(tmp_path):
    source = camera_bag(tmp_path / "in", 3)
    metadata = source / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace("- in.mcap", "- in.mcap\n  - in_1.mcap"))
    report = label(source, tmp_path / "out")
    assert (report.labelled, report.complete, report.damage) == (3, False, ["in_1.mcap: is missing"])


def test_bags_are_found_once_and_output_is_not_taken_for_input(tmp_path):
    whole = camera_bag(tmp_path / "day" / "one", 2)
    lone = camera_bag(tmp_path / "day" / "two", 2, "sqlite3")
    (lone / "metadata.yaml").unlink()
    label(whole, tmp_path / "day" / "one_segmentation")
    (tmp_path / "day" / "x.partial" / "y").mkdir(parents=True)
    (tmp_path / "day" / "x.partial" / "y" / "z.mcap").touch()
    expected = [whole, lone / "two.db3"]
    for pattern in (tmp_path / "day" / "**", tmp_path / "day", tmp_path / "day" / "*" / "*"):
        assert find_bags(str(pattern)) == expected
    assert find_bags(str(whole)) == [whole]


def test_the_real_model_labels_a_bag(tmp_path, make_toy_model):
    from clustvit_ros.classes import ClassSet
    from clustvit_ros.engine import create_engine

    folder = make_toy_model(ClassSet(("sky", "road"), ((0, 0, 255), (90, 90, 90))))
    source = camera_bag(tmp_path / "in", 2, size=(96, 128))
    command = ["label-bag", str(source), str(tmp_path / "out"), "--model", str(folder), "--device", "cpu"]
    assert main([*command, "--merge-threshold", "0.4"]) == 0
    engine = create_engine(str(folder), device="cpu")
    for number, (_, mask) in enumerate(replay(tmp_path / "out")["/segmentation/mask"]):
        expected = engine.segment(picture(number, (96, 128)), LabelOptions(merge_threshold=0.4).settings((96, 128)))
        np.testing.assert_array_equal(mask.data.reshape(96, 128), expected.mask[0])


def test_another_number_of_threads_changes_confidences_by_1_at_most(tmp_path):
    source = camera_bag(tmp_path / "in", 1, size=(96, 128))
    command = ["label-bag", str(source), "--model", "sim_tiny", "--device", "cpu", "--threads"]
    for threads in ("1", "2"):
        assert main([*command[:2], str(tmp_path / threads), *command[2:], threads]) == 0
    one, two = (replay(tmp_path / threads) for threads in ("1", "2"))
    confidences = [bag["/segmentation/confidence"][0].message.data.astype(int) for bag in (one, two)]
    assert np.abs(confidences[0] - confidences[1]).max() <= 1
    different = one["/segmentation/mask"][0].message.data != two["/segmentation/mask"][0].message.data
    assert different.mean() < 1e-3


def test_bags_need_no_ros(tmp_path):
    source = camera_bag(tmp_path / "in", 2)
    code = (
        "import sys\n"
        "class NoRos:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('rclpy', 'sensor_msgs', 'std_msgs', 'diagnostic_msgs'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoRos())\n"
        "from clustvit_ros.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "label-bag", str(source), str(tmp_path / "out"), "--engine", "scripted"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_masks(tmp_path / "out", 2)


def test_reading_says_what_a_bag_holds(tmp_path):
    with BagReader(camera_bag(tmp_path / "in", 3, "sqlite3")) as bag:
        assert (bag.storage, [tuple(topic) for topic in bag.topics]) == (
            "sqlite3",
            [("/camera/image_raw", recordings.IMAGE, 3)],
        )


def test_what_looks_damaged_at_one_place_throughout_is_the_scene(tmp_path: Path, stair_jpeg) -> None:
    messages = [recordings.jpeg(number, stair_jpeg(5, 9 if number else 3)) for number in range(4)]
    report = label(record(tmp_path / "bag", {"/camera/image/compressed": messages}), tmp_path / "labels")
    assert (report.labelled, report.unlabelled) == (2, 2)
    assert report.problems[0].startswith("/") and "from some block on all are brighter" in report.problems[0]
