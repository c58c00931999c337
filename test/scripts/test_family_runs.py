# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Accuracy against latency of runs by folds, each model scored on what it held out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "family_runs.py"


def compare(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture
def runs(drives, tmp_path):
    """Two seeds of a system, and their data."""
    model, data = drives
    for seed in (0, 1):
        for drive in "ab":
            shutil.copytree(model, tmp_path / f"toy_{seed}" / f"fold_{drive}" / "model")
        (tmp_path / f"toy_{seed}" / "recipe.yaml").write_text("name: toy\n")
    return [tmp_path / "toy_0", tmp_path / "toy_1"], data


def test_each_drive_is_scored_by_who_held_it_out_and_only_once(runs, tmp_path):
    folders, data = runs
    options = ["--data", data, "--out", tmp_path / "out", "--input-scale", "1,0.5", "--kept", "1,0.5"]
    done = compare(*folders, *options)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["system", "input", "tokens kept", "a", "b", "mean", "spread", "time"]
    assert [row[:3] for row in rows[2:]] == [["toy", s, k] for s in ("1", "0.5") for k in ("100%", "50%")]
    assert rows[2][3:5] == ["100.0", "0.0"] and rows[2][5:7] == ["50.0", "0.0"] and rows[2][7] == "1.00"
    assert cv2.imread(str(tmp_path / "out.png")) is not None
    again = compare(*folders, *options)
    assert again.returncode == 0 and " on a, 1" not in again.stdout


def test_a_run_that_has_not_ended_is_named(runs, tmp_path):
    folders, data = runs
    shutil.rmtree(folders[0] / "fold_b")
    done = compare(*folders, "--data", data, "--out", tmp_path / "out")
    assert done.returncode == 2 and "fold_b/model: is not there; expected the run of a training" in done.stderr
