# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros tune`: sweep, Pareto front, suggestion, picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from clustvit_ros.cli.main import main
from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.engine.ladder import OperatingPoint, WorthOrder
from clustvit_ros.errors import ConfigError
from clustvit_ros.measure.sweep import SweepRow, suggest, sweep
from clustvit_ros.networks.model_folder import load_config


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
    kept = [r["tokens_kept_mean"] for r in report["rows"] if r["token_capacity"] and r["input_scale"] == 1]
    assert sorted(kept) == [6, 12, 18, 24, 30, 36, 42, 48]
    sizes = {r["input_scale"]: (tuple(r["input_size"]), r["tokens_total"]) for r in report["rows"]}
    assert len(sizes) == len(set(sizes.values())) >= 6 and sizes[1.0][1] == 48 and sizes[0.375][1] < 16
    assert all(0 <= r["agreement"] <= 1 for r in report["rows"])
    assert cv2.imread(str(tmp_path / "b" / "t.png")).shape[2] == 3
    assert "within 100000 ms: merge_threshold" in capsys.readouterr().out


def test_command_without_labels_and_with_a_budget_that_nothing_meets(
    model_dir, labelled_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tune/7").mkdir(parents=True)  # another run's
    arguments = ["tune", "--model", str(model_dir), "--images", str(labelled_dir / "images"), "--device", "cpu"]
    assert main([*arguments, "--budget-ms", "0.001", "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert "picture in runs/tune/8/tune.png" in printed and cv2.imread("runs/tune/8/tune.png") is not None
    assert len(json.loads(Path("runs/tune/8/tune.json").read_text())["rows"]) > 12
    assert "agreement with the full result" in printed and "nothing stays within 0.001 ms" in printed
    assert main([*arguments, "--limit", "0"]) == 2


def test_points_are_written_and_what_decides_on_a_budget_knows_them(model_dir, labelled_dir, tmp_path, capsys):
    model = tmp_path / "toy"
    shutil.copytree(model_dir, model)
    labelled = ["--images", str(labelled_dir / "images"), "--labels", str(labelled_dir / "labels")]
    command = ["tune", "--model", str(model), *labelled, "--device", "cpu", "--plot", str(tmp_path / "t.png")]
    assert main([*command, "--write", "--input-scale", "0.5", "--limit", "1"]) == 0
    assert "operating points written to" in capsys.readouterr().out
    points = load_config(model).operating_points
    assert {point.size for point in points} >= {load_config(model).input.size} and len(points) > 12
    full = next(p for p in points if p.size == load_config(model).input.size and p.capacity == 48)
    assert full.agreement == 1.0
    worth = WorthOrder(create_engine(str(model), "torch", "cpu").info.accuracies)
    assert worth(OperatingPoint(1.0, 48, 48))[0] == pytest.approx(max(p.miou for p in points if p.size == full.size))
    content = yaml.safe_load((model / "model.yaml").read_text())
    # They say nothing of another way to merge.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.yaml").write_text(yaml.safe_dump({**content, "merging": "kmeans"}))
    assert {point.merging for point in points} == {"clusters"}
    assert load_config(tmp_path / "other").operating_points == ()
    before = yaml.safe_load((model_dir / "model.yaml").read_text())
    assert {key: value for key, value in content.items() if key != "operating_points"} == before


def test_points_measured_on_images_of_other_sizes_are_the_models_own(model_dir, tmp_path, capsys):
    """Whatever a picture's aspect, the written points are those that the model has at its own input."""
    model = tmp_path / "toy"
    shutil.copytree(model_dir, model)
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for stem, (height, width) in {"wide": (60, 200), "tall": (160, 90)}.items():
        cv2.imwrite(str(tmp_path / f"data/images/{stem}.png"), rng.integers(0, 256, (height, width, 3), np.uint8))
        cv2.imwrite(str(tmp_path / f"data/labels/{stem}.png"), rng.integers(0, 3, (height, width), np.uint8))
    data = ["--images", str(tmp_path / "data/images"), "--labels", str(tmp_path / "data/labels")]
    command = ["tune", "--model", str(model), *data, "--device", "cpu", "--plot", str(tmp_path / "t.png"), "--write"]
    assert main(command) == 0, capsys.readouterr().err
    config = load_config(model)
    shares = {(p.size, p.capacity) for p in config.operating_points}
    assert len(shares) == len(config.operating_points)
    assert {c for size, c in shares if size == config.input.size} == {6, 12, 24, 48}


def test_a_shipped_model_is_not_written_by_its_name(labelled_dir, capsys):
    labelled = ["--images", str(labelled_dir / "images"), "--labels", str(labelled_dir / "labels")]
    assert main(["tune", "--model", "camvid_clustr", *labelled, "--write"]) == 2
    assert "--write: camvid_clustr is a shipped model" in capsys.readouterr().err


def test_points_without_labels_are_not_written(model_dir, labelled_dir, capsys):
    assert main(["tune", "--model", str(model_dir), "--images", "sim:3", "--labels", str(labelled_dir / "labels")]) == 2
    assert "for --images sim:3, which has its own; leave it out" in capsys.readouterr().err
    assert main(["tune", "--model", str(model_dir), "--images", str(labelled_dir / "images"), "--write"]) == 2
    assert "--write: expected labelled images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"size": [50, 64]}, "50x64 with 6 tokens: expected sides that are multiples of the patch size"),
        ({"size": [9999, 64]}, "9999x64 with 6 tokens: expected a size of at most the input's"),
        ({"capacity": 0}, "with 0 tokens: expected 1 to"),
        ({"capacity": 999}, "with 999 tokens: expected 1 to"),
        ({"miou": 101.0}, "got miou 101"),
        ({"agreement": -0.5}, "agreement -0.5"),
        ({"size": "large"}, "operating_points"),
        (None, "64x64 with 6 tokens is there twice"),
    ],
)
def test_points_that_the_network_cannot_run_are_refused(point, message, model_dir, tmp_path):
    model = tmp_path / "toy"
    shutil.copytree(model_dir, model)
    content = yaml.safe_load((model / "model.yaml").read_text())
    content["operating_points"] = [{"size": [64, 64], "capacity": 6, "miou": 50.0, "agreement": 0.9, **(point or {})}]
    if point is None:
        content["operating_points"] *= 2
    (model / "model.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        load_config(model)
    assert message in str(error.value)


@pytest.mark.parametrize("disturbed", [False, True])
def test_the_fastest_engine_is_kept_where_nothing_disturbed(
    disturbed, model_dir, labelled_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("clustvit_ros.cli.tune.is_disturbed", lambda cores: disturbed)
    command = ["tune", "--engines", "--model", str(model_dir), "--images", str(labelled_dir / "images")]
    assert main([*command, "--limit", "2"]) == int(disturbed)
    printed = capsys.readouterr().out
    assert "torch         bfloat16" in printed and ("not kept" in printed) == disturbed
    assert len(list(tmp_path.glob("clustvit_ros/engines/*.json"))) == (not disturbed)
    assert main([*command, "--write"]) == 2
