"""A small random model and a few labelled images to run commands on."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from clustvit_ros.classes import ClassSet
from clustvit_ros.modeling import ModelConfig, build_network, network_config, save_model
from clustvit_ros.modeling.model_folder import InputConfig


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Folder of an untrained model with three classes."""
    torch.manual_seed(0)
    overrides = {"image_size": [96, 128], "embed_dim": 48, "depth": 3, "injection_point": 1, "head_depth": 1}
    config = ModelConfig(
        name="toy",
        architecture="clustvit_t",
        network=network_config("clustvit_t", overrides),
        classes=ClassSet(("sky", "road", "car"), ((0, 0, 255), (90, 90, 90), (255, 0, 0))),
        input=InputConfig(size=(96, 128)),
        overrides=overrides,
    )
    network = build_network(config.network, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("models") / "toy"
    save_model(folder, config, network)
    return folder


@pytest.fixture(scope="session")
def labelled_dir(tmp_path_factory):
    """Folder with images/ and labels/, three of each."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (root / name).mkdir()
    for stem in ("a", "b", "c"):
        cv2.imwrite(str(root / "images" / f"{stem}.png"), rng.integers(0, 256, (120, 160, 3), np.uint8))
        labels = rng.integers(0, 3, (12, 16), np.uint8).repeat(10, axis=0).repeat(10, axis=1)
        labels[:10] = 255
        cv2.imwrite(str(root / "labels" / f"{stem}.png"), labels)
    return root
