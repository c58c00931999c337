# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Weights of a model and of one trained on from it, averaged."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from clustvit_ros.classes import ClassSet
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks import load_config, load_segmenter, save_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "average_models.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("average_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair(make_toy_model, tmp_path):
    """A model, and one of the same network whose weights are all one higher."""
    first = make_toy_model(ClassSet.numbered(3))
    network = load_segmenter(first)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(1.0)
    save_model(tmp_path / "on", load_config(first), network)
    return first, tmp_path / "on"


def test_weights_lie_in_between_and_the_share_is_noted(script, pair, tmp_path):
    script.average(str(pair[0]), str(pair[1]), 0.25, tmp_path / "between")
    before, after = (load_segmenter(model).state_dict() for model in (pair[0], tmp_path / "between"))
    for name, tensor in before.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(after[name], tensor + 0.25, atol=2e-3, rtol=1e-3)
    assert load_config(tmp_path / "between").training["averaged_with"] == {"model": "on", "share": 0.25}


def test_what_cannot_be_averaged_is_refused(script, pair, make_toy_model, tmp_path):
    with pytest.raises(ConfigError, match=r"--share: got 1\.5, expected 0 to 1"):
        script.average(str(pair[0]), str(pair[1]), 1.5, tmp_path / "out")
    with pytest.raises(ModelError, match="the weights do not fit"):
        script.average(str(pair[0]), str(make_toy_model(ClassSet.numbered(4))), 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()
