# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What README and quick starts tell to type works as it stands: in a folder with the files that they name."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from clustvit_ros.classes import load_class_set
from clustvit_ros.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("quick_start_*.md"))]
# Needs ROS 2, a Jetson or the network, or is what runs this test; the demo has tests of its own.
NOT_HERE = re.compile(
    r"make (demo|test)|\. \.venv/bin/activate|pip3? (install|uninstall) |colcon build|rosdep|sudo |wget |"
    r"ros2 (run|launch|topic|param) |clustvit-ros get |"
    r"cd ~/ros2_ws|python3 -m venv|python3 -c \"import torch|export FASTRTPS_DEFAULT_PROFILES_FILE="
)
SLOW = ("train", "export")


def blocks(language: str) -> list[tuple[str, str]]:
    """Name of the page and text of each fenced block."""
    pattern = re.compile(rf"^ *```{language}\n(.*?)^ *```", re.M | re.S)
    return [(page.name, block) for page in PAGES for block in pattern.findall(page.read_text(encoding="utf-8"))]


def is_command(line: str) -> bool:
    return line.startswith("clustvit-ros ") and not NOT_HERE.match(line)


LINES = list(dict.fromkeys(line.strip() for _, block in blocks("bash") for line in block.splitlines()))
COMMANDS = [shlex.split(line, comments=True)[1:] for line in LINES if is_command(line)]


@pytest.fixture
def folder(tmp_path, make_toy_model, monkeypatch):
    """The working folder of somebody who follows a page; a toy with CamVid's classes stands in for the model."""
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV, of the extra 'opencv'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("clustvit_ros.cli.tune.is_disturbed", lambda cores: False)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ("DIR", "DIR/train", "DIR/val"):
        for kind, channels, high in (("images", (3,), 256), ("labels", (), 11)):
            Path(part, kind).mkdir(parents=True)
            for stem in "abc" if part != "DIR" else "a":
                pixels = rng.integers(0, high, (12, 16, *channels), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
                cv2.imwrite(f"{part}/{kind}/{stem}.png", pixels)
    names = load_class_set("camvid").names
    Path("DIR/dataset.yaml").write_text(f"classes: [{', '.join(names)}]\n")
    shutil.copyfile("DIR/images/a.png", "street.jpg")
    shutil.copytree(make_toy_model(load_class_set("camvid")), "camvid_tiny")
    return tmp_path


def test_every_line_is_run_here_or_cannot_be():
    assert len(COMMANDS) >= 9 and len(blocks("python")) == 1
    for line in LINES:
        assert is_command(line) or NOT_HERE.match(line), f"{line}: is it run anywhere?"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] not in SLOW], ids=" ".join)
def test_commands_work_as_they_stand(command, folder, capsys):
    if "drive.mp4" in command:
        from clustvit_ros.measure.pictures import FilmWriter

        pytest.importorskip("av", reason="needs PyAV, of the extra 'video'")
        with FilmWriter(Path("drive.mp4"), 10.0) as film:
            for value in range(0, 250, 50):
                film.add(np.full((96, 128, 3), value, np.uint8))
    if "drive_1" in command:
        pytest.importorskip("rosbags", reason="needs rosbags, of the extra 'bags'")
        sys.path.insert(0, str(ROOT / "test" / "bags"))
        from recordings import camera_bag

        camera_bag(Path("drive_1"), 2)
    code, streams = main(command), capsys.readouterr()
    # A loaded machine may be too slow for a budget, which is then refused with what can be had.
    assert code == 0 or ("--budget-ms" in command and "expected 0 (off) or at least" in streams.err), streams


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] in SLOW], ids=" ".join)
def test_dear_commands_work_as_they_stand(command, folder):
    if command[0] == "train":
        shutil.rmtree("camvid_tiny")  # the real one is what it starts from
    assert main(command) == 0


@pytest.mark.parametrize("page,block", blocks("python"))
def test_python_works_as_it_stands(page, block, folder):
    names: dict = {}
    exec(compile(block, page, "exec"), names)
    assert names["prediction"].mask.shape == (1, 96, 128)
