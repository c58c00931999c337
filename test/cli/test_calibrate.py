# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Confidence that means what it says: its error, the temperature that lessens it, and the engines that apply it."""

from __future__ import annotations

import dataclasses
import json

import cv2
import numpy as np
import pytest
import yaml

from clustvit_ros.cli.main import main
from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.errors import ConfigError
from clustvit_ros.images import read_image
from clustvit_ros.measure.metrics import CalibrationError
from clustvit_ros.networks import load_config, load_segmenter, save_model
from clustvit_ros.paths import find_model


def test_the_error_is_the_difference_of_confidence_and_share_of_right_pixels():
    error = CalibrationError()
    assert np.isnan(error.value())
    truth = np.zeros((10, 20), np.uint8)
    mask = np.zeros_like(truth)
    mask[:2, :10] = 1  # the left half: 80 of 100 right
    confidence = np.full(truth.shape, 204, np.uint8)  # 0.8
    confidence[:, 10:] = 255
    error.add(truth, mask, confidence)
    assert error.value() == pytest.approx(0.0, abs=1e-9)
    error.add(truth, np.ones_like(mask), confidence)  # the same confidence, nothing right: 0.4 and 0.5 too sure
    assert error.value() == pytest.approx(0.45, abs=1e-9)
    # Void, and what the mask leaves out, count nowhere.
    error.add(np.full_like(truth, 255), mask, confidence)
    error.add(truth, np.full_like(mask, 255), confidence)
    assert error.value() == pytest.approx(0.45, abs=1e-9)


@pytest.fixture
def overconfident(model_dir, tmp_path):
    """The toy model, eight times as sure of what it says, in a run's folder."""
    config, network = load_config(model_dir), load_segmenter(model_dir)
    network.head.mask_norm.weight.data *= 8.0
    network.head.mask_norm.bias.data *= 8.0
    save_model(tmp_path / "sure/model", config, network)
    return tmp_path / "sure/model"


@pytest.fixture
def right_by_seven_of_ten(overconfident, labelled_dir, tmp_path):
    """Labels of which the toy model gets 70 %, drawn anew for each 10 x 10 pixels."""
    engine, rng = create_engine(str(overconfident), "torch", "cpu"), np.random.default_rng(0)
    (tmp_path / "labels").mkdir()
    for path in sorted((labelled_dir / "images").iterdir()):
        mask = engine.segment(read_image(path)).mask[0]
        wrong = (rng.random((12, 16)) > 0.7).repeat(10, axis=0).repeat(10, axis=1)
        cv2.imwrite(str(tmp_path / "labels" / path.name), np.where(wrong, (mask + 1) % 3, mask).astype(np.uint8))
    return tmp_path / "labels"


def test_calibrating_writes_a_temperature_that_undoes_overconfidence(
    overconfident, labelled_dir, right_by_seven_of_ten, tmp_path, capsys
):
    def ece(*options):
        paths = ["--images", str(labelled_dir / "images"), "--labels", str(right_by_seven_of_ten)]
        command = ["evaluate", "--model", str(overconfident), *paths, "--device", "cpu", *options]
        assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
        return json.loads((tmp_path / "out.json").read_text())

    before, after = ece(), ece("--calibrate")
    temperature = load_config(overconfident).temperature
    assert temperature > 2 and before["ece"] > 0.15 and after["ece"] < before["ece"] / 2
    assert after["miou"] == pytest.approx(before["miou"], abs=1e-3)
    output = capsys.readouterr().out
    assert f"sure: temperature {temperature:g} instead of 1, in" in output  # by the run's name
    assert f"calibration error {after['ece']:.3f}" in output
    # Fitting again finds nothing to add.
    ece("--calibrate")
    assert load_config(overconfident).temperature == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_every_engine_divides_by_the_temperature(model_dir, labelled_dir, tmp_path, monkeypatch, engine):
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = read_image(labelled_dir / "images/a.png")
    config, network = load_config(model_dir), load_segmenter(model_dir)
    found = {}
    # Both under one name and one file of weights: a file that was exported for one is not the other's.
    for temperature in (1.0, 4.0):
        save_model(tmp_path / "toy", dataclasses.replace(config, temperature=temperature), network)
        found[temperature] = create_engine(str(tmp_path / "toy"), engine, "cpu").segment(image, Settings(1.0))
    assert (found[1.0].mask == found[4.0].mask).mean() > 0.999
    assert np.median(found[4.0].confidence) < np.median(found[1.0].confidence)
    # Of three classes, odds of winner to second at temperature 4 are the fourth root of those at 1.
    assert found[4.0].confidence.min() >= 255 // 3 - 1
    scaled = load_segmenter(tmp_path / "toy")
    assert scaled.temperature == 4.0


@pytest.mark.parametrize("temperature", [0.0, -1.0, 100.0])
def test_an_impossible_temperature_is_named(model_dir, tmp_path, temperature):
    content = yaml.safe_load((model_dir / "model.yaml").read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({**content, "temperature": temperature}))
    with pytest.raises(ConfigError, match=r"temperature is .*, expected 0\.05 to 20; 1 is none"):
        load_config(tmp_path)


def test_variants_cannot_be_calibrated(model_dir, labelled_dir, capsys):
    paths = ["--images", str(labelled_dir / "images"), "--labels", str(labelled_dir / "labels")]
    assert main(["evaluate", "--model", str(model_dir), *paths, "--merge", "none,clusters", "--calibrate"]) == 2
    assert "--calibrate: got --merge or --decode as well" in capsys.readouterr().err


def test_a_shipped_model_is_not_calibrated_by_its_name(labelled_dir, capsys):
    """Every command would read it otherwise from then on."""
    before = (find_model("sim_tiny") / "model.yaml").read_bytes()
    labelled = ["--images", str(labelled_dir / "images"), "--labels", str(labelled_dir / "labels")]
    assert main(["evaluate", "--model", "sim_tiny", *labelled, "--calibrate"]) == 2
    assert "--calibrate: sim_tiny is a shipped model" in capsys.readouterr().err
    assert (find_model("sim_tiny") / "model.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ("void", "none of the 3 images used has a labelled pixel"),
        ("wrong", "got a temperature of 400 for sure, expected 0.05 to 20; nothing is written"),
    ],
)
def test_what_gives_no_temperature_changes_no_model(overconfident, labelled_dir, tmp_path, capsys, labels, problem):
    file = overconfident / "model.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "temperature": 20.0}))
    before, engine = file.read_bytes(), create_engine(str(overconfident), "torch", "cpu")
    (tmp_path / "labels").mkdir()
    for path in (labelled_dir / "images").iterdir():
        mask = engine.segment(read_image(path)).mask[0]
        pixels = np.full_like(mask, 255) if labels == "void" else (mask + 1) % 3
        cv2.imwrite(str(tmp_path / "labels" / path.name), pixels)
    paths = ["--images", str(labelled_dir / "images"), "--labels", str(tmp_path / "labels")]
    assert main(["evaluate", "--model", str(overconfident), *paths, "--device", "cpu", "--calibrate"]) == 2
    assert problem in capsys.readouterr().err and file.read_bytes() == before
