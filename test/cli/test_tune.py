# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros tune`: sweep, Pareto front, suggestion, picture."""

from __future__ import annotations

import json

import cv2
import numpy as np

from clustvit_ros.cli.main import main
from clustvit_ros.engine import Settings
from clustvit_ros.measure.sweep import SweepRow, suggest, sweep


def row(accuracy, p50, p95=None):
    return SweepRow(0.5, 0, accuracy, p50, p95 or p50, 10.0)


def test_sweep_measures_every_setting(scripted_engine):
    images = [np.full((32, 48, 3), value, np.uint8) for value in (10, 100, 200)]
    labels = [np.full((32, 48), value >> 6, np.uint8) for value in (10, 100, 200)]
    labels[0][:16] = 3  # a quarter of class 3's pixels is labelled wrongly
    settings = [Settings(t, confidence=False) for t in (0.5, 1.0)]
    rows = sweep(scripted_engine(lambda call, kept, total: float(kept))[0], images, labels, settings)
    assert [r.latency_ms_p50 for r in rows] == [3.0, 6.0] and [r.tokens_kept_mean for r in rows] == [3.0, 6.0]
    assert rows[0].accuracy == rows[1].accuracy == round(100 * (0.5 + 1 + 2 / 3) / 3, 3)
    assert [r.pareto for r in rows] == [True, False]


def test_without_labels_the_unmerged_result_is_the_reference(scripted_engine):
    images = [np.full((32, 48, 3), 100, np.uint8)]
    assert sweep(scripted_engine(1.0)[0], images, None, [Settings(0.2)])[0].accuracy == 100.0


def test_suggestion_is_the_most_accurate_within_the_budget():
    rows = [row(70, 30), row(65, 20), row(65, 15), row(50, 5, p95=40)]
    assert suggest(rows, 25) == row(65, 15)
    assert suggest(rows, 100) == row(70, 30)
    assert suggest(rows, 10) is None


def test_command_writes_picture_and_rows(model_dir, labelled_dir, tmp_path, capsys):
    arguments = ["tune", "--model", str(model_dir), "--images", str(labelled_dir / "images"), "--device", "cpu"]
    outputs = ["--json", str(tmp_path / "a" / "t.json"), "--plot", str(tmp_path / "b" / "t.png")]
    labelled = ["--labels", str(labelled_dir / "labels"), "--budget-ms", "100000", "--limit", "2"]
    assert main([*arguments, *outputs, *labelled]) == 0
    report = json.loads((tmp_path / "a" / "t.json").read_text())
    assert report["images"] == 2 and report["measure"] == "mIoU"
    assert report["suggestion"] in report["rows"] and any(r["pareto"] for r in report["rows"])
    kept = [r["tokens_kept_mean"] for r in report["rows"] if r["token_capacity"]]
    assert kept == [6, 12, 18, 24, 30, 36, 42]
    assert cv2.imread(str(tmp_path / "b" / "t.png")).shape[:2] == (600, 960)
    assert "within 100000 ms: merge_threshold" in capsys.readouterr().out


def test_command_without_labels_and_with_a_budget_that_nothing_meets(model_dir, labelled_dir, tmp_path, capsys):
    arguments = ["tune", "--model", str(model_dir), "--images", str(labelled_dir / "images"), "--device", "cpu"]
    assert main([*arguments, "--plot", str(tmp_path / "t.png"), "--budget-ms", "0.001"]) == 0
    printed = capsys.readouterr().out
    assert "agreement with the unmerged result" in printed and "nothing stays within 0.001 ms" in printed
    assert main([*arguments, "--limit", "0"]) == 2
