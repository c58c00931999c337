# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Full disks and damaged journals."""

from __future__ import annotations

import dataclasses
import os
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rosbags", reason="needs rosbags")

from recordings import FRAMES, camera_bag, command, label, masks

from clustvit_ros.bags import label_bag
from clustvit_ros.cli.label_bag import describe
from clustvit_ros.cli.main import main
from clustvit_ros.engine import ScriptedEngine


def interrupt_after(source: Path, target: Path, frames: int) -> Path:
    """The work folder of a run that was stopped."""

    def stop(done: int, total: int) -> None:
        if done >= frames:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_bag(source, target, ScriptedEngine(), progress=stop)
    return target.with_name(target.name + ".partial")


@pytest.mark.parametrize(
    ("storage", "limit_bytes"),
    [
        ("mcap", 40_000),
        ("sqlite3", 5_000),
        *(
            pytest.param(storage, limit, marks=pytest.mark.slow)
            for storage in ("mcap", "sqlite3") for limit in (0, 5_000, 40_000, 200_000)
        ),
    ],
)  # fmt: skip
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
@pytest.mark.parametrize(
    "kilobytes", [64, pytest.param(8, marks=pytest.mark.slow), pytest.param(400, marks=pytest.mark.slow)]
)
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
