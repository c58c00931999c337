# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What engines under test run."""

from __future__ import annotations

import dataclasses

import pytest

from clustvit_ros.classes import ClassSet


@pytest.fixture(scope="session")
def toy_model(make_toy_model):
    """Folder of a small untrained model with seven classes."""
    return make_toy_model(ClassSet.numbered(7))


@pytest.fixture(scope="session")
def onnx_cache(tmp_path_factory):
    """The user's cache for exported files, empty at first and shared by the tests."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield cache / "clustvit_ros" / "onnx"


@pytest.fixture
def make_toy_variant(toy_model, tmp_path):
    """Makes a model folder with other hyper-parameters than the toy's, and random weights."""
    import torch

    from clustvit_ros.networks import build_network, load_config, save_model

    def make(name="variant", **network):
        config = load_config(toy_model)
        config = dataclasses.replace(
            config, network=dataclasses.replace(config.network, **network), overrides={**config.overrides, **network}
        )
        torch.manual_seed(3)
        save_model(tmp_path / name, config, build_network(config.network, len(config.classes)).eval())
        return tmp_path / name

    return make
