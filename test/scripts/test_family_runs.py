# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Accuracy against latency of runs by folds, each model scored on what it held out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import Settings, create_engine

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "family_runs.py"


def compare(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture
def runs(make_toy_model, tmp_path):
    """Two seeds of a system that is right on drive a and says one class too many on b, and their data."""
    model = make_toy_model(ClassSet.numbered(3))
    engine, rng = create_engine(str(model)), np.random.default_rng(0)
    for split, drive in (("train", "a"), ("val", "b")):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for index in range(2):
            image = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (128, 96), interpolation=cv2.INTER_CUBIC)
            mask = engine.segment(image, Settings(1.0)).mask[0]
            mask = mask if drive == "a" else (mask + 1) % 3
            cv2.imwrite(str(tmp_path / f"data/{split}/images/{drive}_{index}.png"), image[..., ::-1])
            cv2.imwrite(str(tmp_path / f"data/{split}/labels/{drive}_{index}.png"), mask)
    names = json.dumps(list(ClassSet.numbered(3).names))
    (tmp_path / "data/dataset.yaml").write_text(f"classes: {names}\ngroup: '[^_]+'\n")
    for seed in (0, 1):
        for drive in "ab":
            shutil.copytree(model, tmp_path / f"toy_{seed}" / f"fold_{drive}" / "model")
        (tmp_path / f"toy_{seed}" / "recipe.yaml").write_text("name: toy\n")
    return [tmp_path / "toy_0", tmp_path / "toy_1"], tmp_path / "data"


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
