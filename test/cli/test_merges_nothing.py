# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A network that merges nothing, in every command that takes options of merging: they are told, and change nothing."""

from __future__ import annotations

import json

import pytest
import torch

from clustvit_ros.classes import ClassSet
from clustvit_ros.cli.main import main
from clustvit_ros.networks import ModelConfig, build_network, network_config, save_model
from clustvit_ros.networks.model_folder import InputConfig


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory):
    """Folder of an untrained ClusTR, which merges no tokens."""
    overrides = {
        "image_size": [64, 96], "embed_dims": [32] * 4, "num_heads": [1] * 4, "depths": [1] * 4, "head_dim": 32
    }  # fmt: skip
    network = network_config("clustr_b1", overrides)
    config = ModelConfig(
        name="plain", architecture="clustr_b1", network=network, classes=ClassSet.numbered(3),
        input=InputConfig(size=(64, 96)), overrides=overrides,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "plain"
    save_model(folder, config, build_network(network, 3))
    return folder


def data_of(folder):
    return ["--images", str(folder / "images"), "--labels", str(folder / "labels"), "--device", "cpu"]


@pytest.mark.parametrize(
    ("command", "options"),
    [("predict", ("--merge-threshold", "0.3", "--token-capacity", "5")), ("predict", ()),
     ("evaluate", ("--token-capacity", "5")), ("evaluate", ()), ("bench", ("--kept-fraction", "0.5,1")),
     ("bench", ("--capacity", "3")), ("bench", ()), ("tune", ("--merge-threshold", "0.2")), ("tune", ())],
)  # fmt: skip
def test_options_of_merging_are_told(command, options, plain_dir, labelled_dir, tmp_path, capsys):
    arguments = {
        "predict": [str(labelled_dir / "images" / "a.png"), "--out", str(tmp_path / "out"), "--device", "cpu"],
        "evaluate": data_of(labelled_dir), "bench": ["--runs", "1", "--warmup", "0", "--device", "cpu"],
        "tune": [*data_of(labelled_dir), "--plot", str(tmp_path / "tune.png")],
    }  # fmt: skip
    assert main([command, *arguments[command], "--model", str(plain_dir), *options]) == 0
    named = ", ".join(option for option in options if option.startswith("--"))
    told = f"{named}: no effect, plain merges no tokens"
    assert told in capsys.readouterr().err if named else "no effect" not in capsys.readouterr().err


def test_beside_a_network_that_merges_nothing_is_said(capsys):
    command = ["bench", "--arch", "vit_t,clustvit_t", "--size", "64x64", "--kept-fraction", "0.5", "--runs", "1"]
    assert main(command) == 0
    assert "no effect" not in capsys.readouterr().err


def test_several_models_and_ways_end_in_one_table(plain_dir, model_dir, labelled_dir, capsys):
    ways = ["--merge", "none,tome", "--merge-threshold", "1", "--token-capacity", "20"]
    assert main(["evaluate", "--model", str(model_dir), *data_of(labelled_dir), *ways]) == 0
    table = [line.strip("| ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[0] == ["model", "|", "tokens", "kept", "|", "mIoU", "|", "GFLOPs", "|", "ms", "(p50)"]
    assert [row[0] for row in table[2:]] == ["toy+none", "toy+tome"]
    assert [row[2] for row in table[2:]] == ["48", "20"]


def test_a_suggestion_is_a_size_alone(plain_dir, labelled_dir, tmp_path, capsys):
    arguments = [*data_of(labelled_dir), "--plot", str(tmp_path / "tune.png"), "--budget-ms", "60000"]
    assert main(["tune", "--model", str(plain_dir), *arguments]) == 0
    (suggestion,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("within 60000 ms: "))
    assert suggestion.split(": ")[1].startswith("input_scale ") and "," not in suggestion.split("(")[0]


def test_to_merge_nothing_is_what_it_does_anyway(plain_dir, labelled_dir, tmp_path, capsys):
    scores = []
    for index, options in enumerate([[], ["--merge", "none"]]):
        file = tmp_path / f"{index}.json"
        command = ["evaluate", "--model", str(plain_dir), *data_of(labelled_dir), *options, "--json", str(file)]
        assert main(command) == 0
        scores.append(json.loads(file.read_text()))
    assert scores[0]["model"] == scores[1]["model"] == "plain"
    assert scores[0]["miou"] == scores[1]["miou"]
    assert scores[0]["merging"] == "none"
    assert main(["evaluate", "--model", str(plain_dir), *data_of(labelled_dir), "--merge", "none,algm"]) == 2
    assert "plain is of another family than ViT and ClustViT" in capsys.readouterr().err
