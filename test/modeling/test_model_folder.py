"""Model folders: written, read back, and refused when they are damaged."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clustvit_ros.classes import ClassSet
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.modeling import ModelConfig, build_network, load_config, load_segmenter, network_config, save_model
from clustvit_ros.modeling.model_folder import InputConfig

OVERRIDES = {"image_size": [64, 96], "embed_dim": 24, "depth": 2, "num_heads": 2, "injection_point": 1, "head_depth": 1}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(
        name="toy",
        architecture="clustvit_t",
        network=network_config("clustvit_t", OVERRIDES),
        classes=ClassSet(("soil", "crop"), ((0, 0, 0), (0, 255, 0))),
        input=InputConfig(size=(64, 96)),
        overrides=OVERRIDES,
        scores={"miou": 12.5},
        licence="CC0",
    )
    network = build_network(config.network, 2)
    save_model(tmp_path / "toy", config, network)
    return tmp_path / "toy", config, network.eval()


def edit(folder, **changes):
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def test_round_trip(folder):
    path, config, network = folder
    assert load_config(path) == config
    images = torch.randn(1, 3, 64, 96)
    output = load_segmenter(str(path))(images)
    assert torch.equal(output.logits, network(images).logits)
    assert output.logits.shape == (1, 2, 4, 6)
    assert output.cluster_logits.shape == (1, 24, 4) and output.cluster_ids.shape == (1, 24)


def test_half_precision_weights_load_as_float32(folder):
    path, config, network = folder
    save_model(path, config, network, dtype=torch.float16)
    loaded = load_segmenter(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_missing_model_names_the_shipped_ones():
    with pytest.raises(ModelError, match="model 'camvid_huge' is not shipped"):
        load_segmenter("camvid_huge")


def test_folder_without_model_file(tmp_path):
    with pytest.raises(ModelError, match=r"holds no model\.yaml"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": []}, "at least one"),
        ({"classes": [{"name": "a", "colour": [0, 0, 300]}]}, "three integers 0..255"),
        ({"classes": [{"name": "a", "colour": [0, 0, 0]}] * 2}, "unique"),
        ({"architecture": "resnet50"}, "unknown architecture 'resnet50'"),
        ({"input": {"size": [64, 96], "std": [0, 1, 1]}}, "std"),
        ({"format": 2}, "format"),
        ({"weights": "../../etc/passwd"}, "unknown key 'weights'"),
    ],
)
def test_unusable_model_files_are_refused(folder, changes, message):
    edit(folder[0], **changes)
    with pytest.raises(ConfigError) as error:
        load_config(folder[0])
    assert message in str(error.value)


def test_weights_that_do_not_fit_are_listed(folder):
    path = folder[0]
    edit(path, network={**OVERRIDES, "depth": 3, "cluster_mlp_dim": 50})
    with pytest.raises(ModelError) as error:
        load_segmenter(path)
    assert "missing: backbone.blocks.2." in str(error.value)
    assert "mis-shaped: backbone.clusterer.fc1.weight (96, 24) instead of (50, 24)" in str(error.value)


def test_unknown_weights_are_listed(folder):
    weights = load_file(folder[0] / "model.safetensors")
    save_file({**weights, "backdoor": torch.zeros(1)}, folder[0] / "model.safetensors")
    with pytest.raises(ModelError, match="unknown: backdoor"):
        load_segmenter(folder[0])


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickled", b"\xff" * 64])
def test_damaged_weights_are_refused(folder, content):
    (folder[0] / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        load_segmenter(folder[0])


def test_configuration_is_frozen(folder):
    with pytest.raises(dataclasses.FrozenInstanceError):
        folder[1].name = "other"


def test_weights_are_readable_for_other_users(folder):
    assert (folder[0] / "model.safetensors").stat().st_mode & 0o044 == 0o044
