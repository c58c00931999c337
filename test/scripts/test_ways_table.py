# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Every way to merge at the same work, each model scored on what it held out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ways_table.py"


def tabulate(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "--" not in line]


def test_ways_keep_what_fits_into_the_work_and_are_scored_once(drives, tmp_path):
    model, data = drives
    options = [model, "--data", data, "--split", "train", "--work", "0.5,0.25", "--out", tmp_path / "out"]
    done = tabulate(*options)
    assert done.returncode == 0, done.stderr
    head, unmerged, *merged = rows_of(done.stdout)
    assert head == ["way", "work", "tokens kept", "GFLOPs", "mIoU", "time"]
    # 96x128 px are 48 tokens, and the labels are the model's own unmerged masks.
    assert unmerged[:3] == ["none", "-", "48"] and unmerged[4:] == ["100.00", "1.00"]
    assert {"clusters", "algm", "tome", "kmeans"} <= {row[0] for row in merged}
    assert "cts" not in {row[0] for row in merged}  # no policy network
    assert all(0 < int(row[2]) < 48 and float(row[4]) <= 100 for row in merged)
    kept = {(row[0], row[1]): int(row[2]) for row in merged}
    assert kept["clusters", "0.5"] > kept["clusters", "0.25"]
    assert rows_of((tmp_path / "out.md").read_text()) == [head, unmerged, *merged]
    again = tabulate(*options)
    assert again.returncode == 0 and " kept: " not in again.stdout and len(rows_of(again.stdout)) == len(merged) + 2


def test_folds_are_scored_on_their_own_group_and_the_mean_is_told(drives, tmp_path):
    model, data = drives
    options = ["--data", data, "--group", "a", "b", "--merge", "clusters", "--work", "0.5", "--out", tmp_path / "out"]
    done = tabulate(model, model, *options)
    assert done.returncode == 0, done.stderr
    head, unmerged, merged = rows_of(done.stdout)
    assert head[4:7] == ["a", "b", "mean mIoU"] and unmerged[4:7] == ["100.00", "0.00", "50.00"]
    assert float(merged[6]) == pytest.approx((float(merged[4]) + float(merged[5])) / 2, abs=0.011)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group", "a", "b"], "--group: got 2 groups, expected one for each of 1 models"),
        (["--group", "c"], "--group: got 'c', expected of a, b"),
        (["--merge", "cts"], "cts"),
    ],
)
def test_what_cannot_be_scored_is_refused(drives, tmp_path, options, message):
    model, data = drives
    done = tabulate(model, "--data", data, "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
