# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Folders that are not ours, and names that are none."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rosbags", reason="needs rosbags")

import recordings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import FRAMES, camera_bag, command, image, label, masks, record, replay, storage_file, tree

from clustvit_ros.bags import LabelOptions
from clustvit_ros.cli.main import main
from clustvit_ros.errors import BagError, ClustvitError, ConfigError

HOSTILE_NAMES = [
    "/../../../victim/x", "/..", "/.", "/", "", "//", "/a//b", "/a", "/a/", "/a_2", "a", "/1st", "/a\0b", "/a\nb",
    "/\x1b[31m", "/" + "x" * 300, "/" + "y/" * 300, "/" + "x" * 199 + "y", "/ä/ö", "/con", "/a b", "/%2e%2e/x", "/~/x",
    "/a\\..\\b", "/segmentation", "/a/segmentation/masks", "/{sub}",
]  # fmt: skip
NAMES = st.one_of(st.sampled_from(HOSTILE_NAMES), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))


def a_training_run(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({"seed": 0, "command": "train", "labelled": 3, "identity": {}}))
    (folder / "checkpoint.safetensors").write_bytes(b"days of work")


def somebody_s_metadata(folder: Path) -> None:
    (folder / "metadata.yaml").write_text("rosbag2_bagfile_information: {custom_data: {clustvit_ros: '{}'}}")
    (folder / "other.mcap").write_bytes(b"a recording")


def broken_files(folder: Path) -> None:
    (folder / "run.json").write_text("[" * 5000)
    (folder / "metadata.yaml").write_text("{[: broken")


@pytest.mark.parametrize("fill", [a_training_run, somebody_s_metadata, broken_files])
@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_somebody_else_s_stays(tmp_path, fill, restart):
    source = camera_bag(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="is no output of label-bag"):
        label(source, tmp_path / "out", restart=restart)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("format", ["bag", "png"])
def test_what_a_user_put_into_the_output_stays(tmp_path, format):
    source = camera_bag(tmp_path / "in", 2)
    label(source, tmp_path / "out", format=format)
    for place in ("notes.txt", "segmentation/mask/corrected.png", "elsewhere"):
        note = tmp_path / "out" / place
        note.parent.mkdir(parents=True, exist_ok=True)
        if place == "elsewhere":
            note.symlink_to(tmp_path / "in")
        else:
            note.write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(ConfigError, match=re.escape(f"holds 1 files that label-bag did not write, e.g. '{place}'")):
            label(source, tmp_path / "out", restart=True, format=format)
        assert tree(tmp_path) == before
        note.unlink()
    label(source, tmp_path / "out", restart=True, format=format, merge_threshold=0.25)
    assert label(source, tmp_path / "out", format=format, merge_threshold=0.25).finished_before
    assert set(os.listdir(tmp_path)) == {"in", "out"}


@pytest.mark.parametrize("content", ["thesis.tex", "journal.sqlite", "lock", "output/thesis.tex"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_user_s_own_folder_of_that_name_stays(tmp_path, content, restart):
    source = camera_bag(tmp_path / "in", 2)
    (tmp_path / "out.partial" / content).parent.mkdir(parents=True)
    (tmp_path / "out.partial" / content).write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="is not label-bag's; move it away"):
        label(source, tmp_path / "out", restart=restart)
    assert tree(tmp_path) == before


def test_restart_beside_a_running_process_is_refused_and_disturbs_nothing(tmp_path):
    source = camera_bag(tmp_path / "in", 60)
    code = (
        "import sys; from pathlib import Path; from clustvit_ros.bags import label_bag;"
        "from clustvit_ros.engine import ScriptedEngine;"
        "label_bag(Path(sys.argv[1]), Path(sys.argv[2]), ScriptedEngine(50.0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(tmp_path / "out")])
    try:
        deadline_s = time.monotonic() + 60.0
        while not (tmp_path / "out.partial" / "journal.sqlite").exists() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        for _ in range(3):
            with pytest.raises(BagError, match="another process writes there"):
                label(source, tmp_path / "out", restart=True)
        assert (tmp_path / "out.partial" / "journal.sqlite").exists()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert len(masks(tmp_path / "out")) == 60


def test_the_output_may_be_a_link_to_another_disk(tmp_path, expected):
    source = tmp_path / "plain" / "in"
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "labels")
    for restart in (False, True):
        label(source, tmp_path / "out", restart=restart)
        assert masks(tmp_path / "disk" / "labels") == expected and (tmp_path / "out").is_symlink()


def test_a_bag_is_not_its_own_output(tmp_path):
    source = camera_bag(tmp_path / "in", 2)
    label(source, tmp_path / "out")
    before = tree(tmp_path)
    for inside in (tmp_path / "out", storage_file(tmp_path / "out")):
        with pytest.raises(ConfigError, match="holds the bag itself"):
            label(inside, tmp_path / "out", restart=True, topics=("/segmentation/mask",))
    assert tree(tmp_path) == before


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES, min_size=2, max_size=6, unique=True), format=st.sampled_from(["bag", "png"]), data=st.data()
)
def test_whatever_topics_are_called_their_labels_lie_in_the_output(tmp_path_factory, names, format, data):
    storage = data.draw(st.sampled_from(["mcap", "sqlite3"]))
    folder = tmp_path_factory.mktemp("names")
    record(folder / "in", {name: [image(number) for number in range(2)] for name in names}, storage)
    if data.draw(st.booleans()):
        (folder / "in" / "metadata.yaml").unlink()
    target = folder / "deep" / "er" / "out"
    before = tree(folder)
    report = label(folder / "in", target, format=format)
    after = tree(folder)
    assert {name for name in after if not name.startswith("deep/er/out")} - set(before) <= {"deep", "deep/er"}
    assert len(report.prefixes) == len(names) and report.labelled == 2 * len(names) and report.complete
    for prefix in report.prefixes.values():
        assert re.fullmatch(r"(/[A-Za-z_]\w*)*/segmentation", prefix, re.ASCII) and len(prefix) < 230
    if format == "png":
        lines = [json.loads(line) for line in (target / "manifest.jsonl").read_text().splitlines()]
        assert all((target / line["mask"]).is_file() and ".." not in line["mask"] for line in lines)
        assert len({line["mask"] for line in lines}) == 2 * len(names)
    else:
        assert {name.rpartition("/")[0] for name in replay(target)} == set(report.prefixes.values())


@pytest.mark.parametrize("format", ["bag", "png"])
def test_topics_that_are_no_text(tmp_path, format, capsys):
    source = record(tmp_path / "in", {f"/{n}": [image(number) for number in range(2)] for n in "abcd"}, "sqlite3")
    (source / "metadata.yaml").unlink()
    with sqlite3.connect(storage_file(source)) as database:
        database.execute("PRAGMA writable_schema=ON")
        database.execute("UPDATE sqlite_master SET sql = replace(sql, 'name TEXT NOT NULL', 'name')")
    with sqlite3.connect(storage_file(source)) as database:
        for name, value in (("/a", b"/\xff\0"), ("/b", 7), ("/c", b"/\xfe"), ("/d", None)):
            database.execute("UPDATE topics SET name = ? WHERE name = ?", (value, name))
    assert main(command(source, tmp_path / "out", "--format", format)) == 0, capsys.readouterr()
    report = label(source, tmp_path / "out", format=format)
    assert sorted(report.prefixes) == ["/\\xfe", "/\\xff\0", "7", "None"] and report.labelled == 8


def test_a_topic_of_two_types_gives_its_images(tmp_path):
    from rosbags.rosbag2 import StoragePlugin, Writer

    with Writer(tmp_path / "in", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        for number, message in enumerate([image(0), recordings.STORE.types["std_msgs/msg/String"](data="hello")]):
            kind = message.__msgtype__
            connection = writer.add_connection("/camera", kind, typestore=recordings.STORE)
            writer.write(connection, number, recordings.STORE.serialize_cdr(message, kind))
    report = label(tmp_path / "in", tmp_path / "out")
    assert (report.labelled, report.unlabelled) == (1, 0)


@pytest.mark.parametrize("time_ns", [1 << 63, (1 << 64) - 1])
def test_times_that_no_bag_can_hold_are_named(tmp_path, time_ns):
    from rosbags.rosbag2 import StoragePlugin, Writer

    with Writer(tmp_path / "in", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection("/camera", recordings.IMAGE, typestore=recordings.STORE)
        for number, stamp_ns in enumerate((5, time_ns)):
            writer.write(connection, stamp_ns, recordings.STORE.serialize_cdr(image(number), recordings.IMAGE))
    report = label(storage_file(tmp_path / "in"), tmp_path / "out")
    assert report.labelled == 1 and not report.complete
    assert report.damage or str(time_ns) in report.problems[0]


@pytest.mark.parametrize("name", ["a?mode=memory", "a#b", "50%25", "a b", "ä\n", "[x]*", "x" * 100])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_whatever_folders_are_called(tmp_path, name, storage, expected):
    source = camera_bag(tmp_path / "in", FRAMES, storage)
    source = source.rename(tmp_path / f"{name}_in")
    report = label(source, tmp_path / name / name)
    assert report.complete and masks(tmp_path / name / name) == expected
    assert label(source, tmp_path / name / name).finished_before
    label(storage_file(source), tmp_path / name / name, restart=True)
    assert masks(tmp_path / name / name) == expected


def test_depth_is_refused_in_words_and_counted(tmp_path, capsys):
    compressed = recordings.compressed(0)
    compressed.format = "16UC1; compressedDepth png"
    wide = image(0)
    wide.encoding, wide.step, wide.data = "16UC1", 128, wide.data[: 128 * 48]
    topics = {
        "/colour": [image(number) for number in range(3)],
        "/depth": [image(number, "32FC1") for number in range(4)],
        "/depth/compressedDepth": [compressed] * 5,
        "/range": [wide] * 2,
    }
    source = record(tmp_path / "in", topics)
    assert main(command(source, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "left out: /depth holds depth (32FC1), which is no picture to segment: 4 messages" in said
    assert "left out: /depth/compressedDepth holds depth (16UC1; compressedDepth png), which is no picture" in said
    assert "(16UC1), which is no picture to segment: 2 messages" in said
    assert len(masks(tmp_path / "out")) == 3
    for topic in ("/depth", "/depth/compressedDepth", "/range"):
        with pytest.raises(BagError, match=r"holds depth \(.*\), which is no picture to segment; choose the colour"):
            label(source, tmp_path / "chosen", topics=(topic,))
    assert main(command(source, tmp_path / "both", "--topic", "/colour", "--topic", "/depth")) == 1
    assert "3 images labelled, 4 not" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"compression": "zstd"}, {"storage": "mcap"}])
def test_a_bag_s_options_do_not_go_with_png(tmp_path, wrong):
    with pytest.raises(ConfigError, match="PNG files are compressed already, leave both out"):
        LabelOptions(format="png", **wrong)


NEIGHBOURS = [
    "run.json", "metadata.yaml", "manifest.jsonl", "lock", "journal.sqlite", "journal.sqlite-wal", "output/x",
    "out.mcap", "a.mcap", "segmentation/mask/1.png", "segmentation/mask/00000000_5.png", "mask/00000000_5.png",
    "output/out/out.mcap", "notes", ".hidden",
]  # fmt: skip


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_nothing_of_a_user_s_is_ever_removed_or_changed(tmp_path, seed):
    """Any files, called as ours are, in OUT and OUT.partial, before, beside and instead of real output."""
    source = camera_bag(tmp_path / "in", 2)
    chance = random.Random(seed)
    for number in range(40):
        folder = tmp_path / str(number)
        format = chance.choice(["bag", "png"])
        if chance.random() < 0.5:
            label(source, folder / "out", format=format)
        own = {}
        for place in ("out", "out.partial"):
            for name in chance.sample(NEIGHBOURS, chance.randrange(4)) if chance.random() < 0.6 else ():
                path = folder / place / name
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    own[path] = chance.choice([b"", b"mine", b"{}", b'{"identity": {}}', b"clustvit-ros"])
                    path.write_bytes(own[path])
        with contextlib.suppress(ClustvitError):
            label(source, folder / "out", format=format, restart=chance.random() < 0.7)
        assert {path: path.read_bytes() for path in own} == own, (seed, number)
