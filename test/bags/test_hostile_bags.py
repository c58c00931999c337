# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Folders that are not ours, names that are none, full disks and damaged journals."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shlex
import shutil
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
from recordings import FRAMES, camera_bag, image, label, masks, record, replay, storage_file, tree

from clustvit_ros.bags import LabelOptions, label_bag
from clustvit_ros.cli.label_bag import describe
from clustvit_ros.cli.main import main
from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.errors import BagError, ConfigError

HOSTILE_NAMES = [
    "/../../../victim/x", "/..", "/.", "/", "", "//", "/a//b", "/a", "/a/", "/a_2", "a", "/1st", "/a\0b", "/a\nb",
    "/\x1b[31m", "/" + "x" * 300, "/" + "y/" * 300, "/" + "x" * 199 + "y", "/ä/ö", "/con", "/a b", "/%2e%2e/x", "/~/x",
    "/a\\..\\b", "/segmentation", "/a/segmentation/masks", "/{sub}",
]  # fmt: skip
NAMES = st.one_of(st.sampled_from(HOSTILE_NAMES), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))


def command(source: Path, target: Path, *arguments: str) -> list[str]:
    return ["label-bag", str(source), str(target), "--engine", "scripted", *arguments]


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
        for number, time in enumerate((5, time_ns)):
            writer.write(connection, time, recordings.STORE.serialize_cdr(image(number), recordings.IMAGE))
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
    assert "left out: /depth/compressedDepth holds depth (compressedDepth), which is no picture" in said
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


def interrupt_after(source: Path, target: Path, frames: int) -> Path:
    """The work folder of a run that was stopped."""

    def stop(done: int, total: int) -> None:
        if done >= frames:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_bag(source, target, ScriptedEngine(), progress=stop)
    return target.with_name(target.name + ".partial")


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("limit_bytes", [0, 5_000, 40_000, 200_000])
def test_a_full_disk_is_a_sentence_and_the_same_command_continues(tmp_path, storage, limit_bytes):
    """A limit on the size of files meets whoever writes as a full disk does, at its own place."""
    code = (
        "import resource, sys; from clustvit_ros.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); sys.exit(main(sys.argv[2:]))"
    )
    source = camera_bag(tmp_path / "in", FRAMES)
    # Output that is larger than its journal, for the last of the limits.
    label(source, tmp_path / "undisturbed", output_size=(200, 200))
    arguments = command(source, tmp_path / "out", "--storage", storage, "--output-size", "200x200")
    done = subprocess.run([sys.executable, "-c", code, str(limit_bytes), *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr and "run the same command again, without --restart" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    if (tmp_path / "out.partial" / "output").exists():
        pytest.fail("what was written of the output still fills the disk")
    assert main(arguments) == 0
    assert masks(tmp_path / "out") == masks(tmp_path / "undisturbed")


@pytest.mark.skipif(not shutil.which("unshare") or os.getuid() != 0, reason="mounts a small file system, as root")
@pytest.mark.parametrize("kilobytes", [8, 64, 400])
def test_a_disk_that_is_full(tmp_path, kilobytes):
    source = camera_bag(tmp_path / "in", FRAMES)
    label(source, tmp_path / "undisturbed", output_size=(200, 200))
    (tmp_path / "disk").mkdir()
    run = [sys.executable, "-m", "clustvit_ros.cli.main", *command(source, tmp_path / "disk" / "out")]
    again = shlex.join([*run, "--output-size", "200x200"])
    script = (
        f"cd {tmp_path}; mount -t tmpfs -o size={kilobytes}k tmpfs disk || exit 77; {again}; code=$?;"
        f"mount -o remount,size=20m disk; {again} && cp -r disk/out out; exit $code"
    )
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("may not mount here")
    assert "Traceback" not in done.stderr
    assert (done.returncode, "cannot be written" in done.stderr) == (2, True), done.stderr
    assert masks(tmp_path / "out") == masks(tmp_path / "undisturbed")


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def garble_a_byte(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]


def garble_a_block(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + chance.randbytes(min(512, len(content) - place)) + content[place + 512 :]


def zero_a_page(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content)) // 4096 * 4096
    return content[:place] + bytes(min(4096, len(content) - place)) + content[place + 4096 :]


@pytest.mark.parametrize("harm", [cut, garble_a_byte, garble_a_block, zero_a_page])
@pytest.mark.parametrize("file", ["journal.sqlite", "journal.sqlite-wal"])
def test_a_damaged_journal_never_gives_wrong_labels(tmp_path, harm, file, expected, capsys):
    """Whatever was hit: the run continues to the right labels, or says what to do."""
    source = tmp_path / "plain" / "in"
    whole = interrupt_after(source, tmp_path / "whole", FRAMES - 2)
    content = (whole / "journal.sqlite").read_bytes()
    refused = 0
    for seed in range(10):
        target = tmp_path / f"out_{seed}"
        partial = shutil.copytree(whole, tmp_path / f"out_{seed}.partial")
        (partial / file).write_bytes(harm(content, random.Random(seed)))
        code = main(command(source, target))
        said = capsys.readouterr().err
        assert code in (0, 2), (seed, said)
        if code == 2:
            refused += 1
            assert "--restart" in said.splitlines()[-1] and "Traceback" not in said, (seed, said)
            assert partial.exists() and not target.exists()
            assert main(command(source, target, "--restart")) == 0, seed
        assert masks(target) == expected, seed
        assert not partial.exists()
    assert refused or file.endswith("-wal")


def test_a_row_of_the_journal_that_was_changed_or_lost_is_noticed(tmp_path, expected, capsys):
    source = tmp_path / "plain" / "in"
    changes = [
        "UPDATE frames SET mask = (SELECT mask FROM frames WHERE number = 0) WHERE number = 2",
        "UPDATE frames SET timestamp_ns = 'soon' WHERE number = 1",
        "UPDATE frames SET frame_id = 'other' WHERE number = 1",
        "UPDATE frames SET stats = '[' WHERE number = 0",
        "DELETE FROM frames WHERE number = 1",
        "UPDATE frames SET number = 100 WHERE number = 1",
        "UPDATE run SET identity = '[1]'",
        "UPDATE run SET identity = x'ff'",
        "ALTER TABLE frames DROP COLUMN checksum",
    ]
    for number, change in enumerate(changes):
        target = tmp_path / f"out_{number}"
        partial = interrupt_after(source, target, FRAMES - 2)
        with sqlite3.connect(partial / "journal.sqlite") as database:
            database.execute(change)
        assert main(command(source, target)) == 2, change
        said = capsys.readouterr().err
        assert "journal of unfinished output is damaged" in said and "--restart" in said, (change, said)
        assert main(command(source, target, "--restart")) == 0
        assert masks(target) == expected


def test_a_run_on_two_devices_says_that_confidences_may_differ(tmp_path, capsys):
    class Other(ScriptedEngine):
        @property
        def info(self):
            return dataclasses.replace(super().info, device="another machine")

    source = camera_bag(tmp_path / "in", FRAMES)
    interrupt_after(source, tmp_path / "out", 2)
    report = label_bag(source, tmp_path / "out", Other())
    assert report.devices == [ScriptedEngine().info.device, "another machine"]
    describe(report)
    assert "another machine: confidences of one and the other may differ by 1" in capsys.readouterr().out
