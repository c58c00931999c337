"""Small random models that engines under test run."""

from __future__ import annotations

import pytest
import torch

from clustvit_ros.classes import ClassSet
from clustvit_ros.modeling import ModelConfig, build_network, network_config, save_model
from clustvit_ros.modeling.model_folder import InputConfig


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory):
    """Folder of a small untrained model whose merge scores spread over the whole range."""
    torch.manual_seed(0)
    overrides = {"image_size": [96, 128], "embed_dim": 48, "depth": 3, "injection_point": 1, "head_depth": 1}
    config = ModelConfig(
        name="toy",
        architecture="clustvit_t",
        network=network_config("clustvit_t", overrides),
        classes=ClassSet(tuple("abcdefg"), tuple((i, i, i) for i in range(7))),
        input=InputConfig(size=(96, 128)),
        overrides=overrides,
    )
    network = build_network(config.network, 7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("models") / "toy"
    save_model(folder, config, network)
    return folder


@pytest.fixture(scope="session")
def onnx_cache(tmp_path_factory):
    """The user's cache for exported files, empty at first and shared by the tests."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield cache / "clustvit_ros" / "onnx"
