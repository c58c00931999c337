# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Masked auto-encoding: what the encoder sees, that it learns, and that training starts from it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from clustvit_ros.cli.main import main
from clustvit_ros.networks import build_network, network_config
from clustvit_ros.training.masked_autoencoder import MaskedAutoencoder


def autoencoder(stem, mask_ratio=0.75):
    torch.manual_seed(0)
    overrides = {"image_size": [64, 96], "stem": stem, "embed_dim": 48, "depth": 2, "drop_path": 0.0}
    backbone = build_network(network_config("vit_t", overrides), 2).backbone
    return MaskedAutoencoder(backbone, (4, 6), mask_ratio, 32, 1)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_the_encoder_does_not_see_masked_patches(stem):
    model = autoencoder(stem).eval()
    images, order = torch.randn(2, 3, 64, 96), torch.rand(2, 24).argsort(dim=1)
    assert model.num_kept == 6
    changed = images.clone()
    for image in range(2):
        for patch in order[image, 6:].tolist():
            row, column = 16 * (patch // 6), 16 * (patch % 6)
            changed[image, :, row : row + 16, column : column + 16] += 1.0
    masked = torch.ones(2, 24).scatter(1, order[:, :6], 0.0)
    with torch.no_grad():
        before, after = (model._encode(x, order[:, :6], masked) for x in (images, changed))
    assert torch.equal(before, after)


def test_the_loss_is_that_of_masked_patches_normalised():
    model = autoencoder("patch").eval()
    images, order = torch.randn(1, 3, 64, 96), torch.arange(24)[None]
    with torch.no_grad():
        model.paint.weight.zero_()
        model.paint.bias.zero_()
        # Painting zeros costs each patch's normalised variance, which is one, whatever its mean and contrast are.
        loss = model(30.0 * images + 7.0, order).losses["reconstruction_loss"]
    assert float(loss) == pytest.approx(1.0, abs=0.01)


def test_visible_patches_return_to_their_places():
    """With nothing but a linear way through, an order must not change what is painted where."""
    model = autoencoder("patch", mask_ratio=0.01).eval()
    images = torch.randn(1, 3, 64, 96)
    losses = []
    with torch.no_grad():
        for seed in range(3):
            order = torch.rand(1, 24, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
            encoded = model._encode(images, order, torch.zeros(1, 24))
            losses.append(model._decode(encoded, order))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-3, atol=1e-5)


def test_pretrain_then_train_from_it(scenes, train, write_recipe, tmp_path, capsys):
    recipe = write_recipe(pretraining={"epochs": 12, "batch_size": 5, "decoder_dim": 32, "decoder_depth": 1})
    command = ["pretrain", str(recipe), "--images", str(scenes / "train/images"), str(scenes / "val/images")]
    assert main([*command, "--out", str(tmp_path / "pre"), "--device", "cpu"]) == 0
    log = [json.loads(line) for line in (tmp_path / "pre/log.jsonl").read_text().splitlines()]
    assert len(log) == 12 and log[-1]["loss"] < 0.95 * log[0]["loss"]
    encoder = tmp_path / "pre/encoder.safetensors"
    weights = load_file(encoder)
    assert not any("clusterer" in name or "regenerator" in name or "mask_token" in name for name in weights)
    capsys.readouterr()
    assert train(recipe, tmp_path / "run", "--init", str(encoder), "--epochs", "1") == 0
    assert f"init: {encoder}: {len(weights)} tensors loaded" in capsys.readouterr().out
    report = json.loads((tmp_path / "run/init.json").read_text())
    assert set(report["loaded"]) == set(weights) and not report["unknown"]


def test_pretraining_continues_with_the_same_weights(scenes, write_recipe, tmp_path, capsys):
    recipe = write_recipe(pretraining={"epochs": 4, "batch_size": 5, "decoder_dim": 32, "decoder_depth": 1})
    command = ["pretrain", str(recipe), "--images", str(scenes / "train/images"), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert main([*command, "--out", str(tmp_path / "parts"), "--time-limit", "0.00001"]) == 75
    assert main([*command, "--out", str(tmp_path / "parts")]) == 0
    other = [*command[:3], str(scenes / "val/images"), *command[4:]]
    assert main([*other, "--out", str(tmp_path / "parts")]) == 2
    assert "checkpoint.pt was made with other images" in capsys.readouterr().err
    whole, parts = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_recipes_that_cannot_pretrain(scenes, write_recipe, tmp_path, capsys):
    images = ["--images", str(scenes / "train/images"), "--out", str(tmp_path / "x"), "--device", "cpu"]
    assert main(["pretrain", str(write_recipe()), *images]) == 2
    assert "pretraining is missing" in capsys.readouterr().err
    assert main(["pretrain", str(write_recipe()), *images[:2], images[1], *images[2:]]) == 2
    assert "expected each folder once" in capsys.readouterr().err
    recipe = write_recipe(pretraining={"epochs": 1, "crop_size": [40, 64]})
    assert main(["pretrain", str(recipe), *images]) == 2
    assert "crop_size is [40, 64], expected multiples of the patch size 16" in capsys.readouterr().err
    recipe = write_recipe(pretraining={"epochs": 1, "mask_ratio": 1.0})
    assert main(["pretrain", str(recipe), *images]) == 2
    assert "mask_ratio is 1.0, expected in (0, 1)" in capsys.readouterr().err
