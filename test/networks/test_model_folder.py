# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Model folders: written, read back, and refused when they are damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import struct

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clustvit_ros.classes import ClassSet
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks import ModelConfig, build_network, load_config, load_segmenter, network_config, save_model
from clustvit_ros.networks.model_folder import InputConfig, hash_model

OVERRIDES = {"image_size": [64, 96], "embed_dim": 24, "depth": 2, "num_heads": 2, "injection_point": 1, "head_depth": 1}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(
        name="toy", architecture="clustvit_t", network=network_config("clustvit_t", OVERRIDES),
        classes=ClassSet(("soil", "crop"), ((0, 0, 0), (0, 255, 0))), input=InputConfig(size=(64, 96)),
        overrides=OVERRIDES, scores={"miou": 12.5}, licence="CC0",
    )  # fmt: skip
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
    loaded = load_segmenter(str(path))
    assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}  # else sums differ in last bits
    output = loaded(images)
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


def test_numbers_that_are_none_are_refused(folder):
    weights = load_file(folder[0] / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, folder[0] / "model.safetensors")
    with pytest.raises(ModelError, match=f"no numbers in {name}"):
        load_segmenter(folder[0])


@pytest.mark.parametrize(
    "network",
    [
        {"depth": 10**9},
        {"embed_dim": 10**12, "num_heads": 1},
        {"image_size": [10**9, 10**9]},
        {"head_depth": 10**6},
        {"mlp_ratio": 1e18},
        {"embed_dim": 60_000, "num_heads": 1, "depth": 500},
    ],
)
def test_networks_of_absurd_size_cost_nothing(folder, network):
    edit(folder[0], network={**OVERRIDES, **network})
    with pytest.raises((ConfigError, ModelError), match=r"expected (a number of )?at most|do not fit"):
        load_segmenter(folder[0])


def test_a_number_that_is_none_is_told(folder):
    edit(folder[0], network={**OVERRIDES, "merge_similarity": float("nan")})
    with pytest.raises(ConfigError, match="merge_similarity is nan, expected a number of at most"):
        load_config(folder[0])


@pytest.mark.parametrize("size", [[10**6, 10**6], [8192, 8192], [4096, 4112], [1, 10**5]])
def test_absurd_inputs_are_refused(folder, size):
    edit(folder[0], input={"size": size})
    with pytest.raises(ConfigError, match=r"expected at most 8192 px each and 16777216 pixels in all"):
        load_config(folder[0])


def header(content, tail=b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + tail


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        header(b"{" * 100_000),
        header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        header({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
    ],
)  # fmt: skip
def test_lying_headers_are_refused(folder, content):
    (folder[0] / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        load_segmenter(folder[0])


def test_a_large_file_of_other_tensors_is_refused_by_its_header(folder):
    shape = {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}
    path = folder[0] / "model.safetensors"
    path.write_bytes(header({"backdoor": shape}))
    os.truncate(path, path.stat().st_size + 2**32)  # 4 GB without a byte on disk
    with pytest.raises(ModelError, match="unknown: backdoor"):
        load_segmenter(folder[0])


def test_links_must_not_lead_out_of_the_folder(folder, tmp_path):
    path = folder[0]
    elsewhere = tmp_path / "elsewhere.safetensors"
    (path / "model.safetensors").rename(elsewhere)
    (path / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(ModelError, match="outside of the model's folder"):
        load_segmenter(path)
    elsewhere.rename(path / "real")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("real")
    load_segmenter(path)
    linked = tmp_path / "install" / "toy"  # as `colcon build --symlink-install` lays it out
    linked.mkdir(parents=True)
    for name in ("model.yaml", "model.safetensors"):
        (linked / name).symlink_to(path / name)
    load_segmenter(linked)


def test_devices_and_folders_are_no_weights(folder):
    weights = folder[0] / "model.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        load_segmenter(folder[0])
    weights.rmdir()
    os.mkfifo(weights)
    with pytest.raises(ModelError, match="cannot be read"):
        load_segmenter(folder[0])


def test_nothing_is_unpickled(folder):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder[0] / "pwned"),)

    torch.save({"weights": Payload()}, folder[0] / "model.safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        load_segmenter(folder[0])
    assert not (folder[0] / "pwned").exists()


@pytest.mark.parametrize(
    "change", [{"head_channels": -7, "head": "upernet"}, {"head_heads": -1}, {"cluster_mlp_dim": -4},
               {"mlp_ratio": -2.0}, {"injection_point": -1}, {"head_heads": 7}],
)  # fmt: skip
def test_hyper_parameters_that_no_network_has_are_errors_of_the_configuration(change):
    from clustvit_ros.errors import ConfigError
    from clustvit_ros.networks import build_network, network_config

    with pytest.raises(ConfigError, match="network: "):
        build_network(network_config("clustvit_t", {"image_size": [64, 64], **change}), 3)


def test_what_decides_masks_and_cost_decides_the_models_hash():
    config = load_config("sim_tiny")
    changes = [
        {"network": dataclasses.replace(config.network, merging="tome")}, {"temperature": 2.0},
        {"input": dataclasses.replace(config.input, mean=(1.0, 2.0, 3.0))},
    ]  # fmt: skip
    hashes = [hash_model(dataclasses.replace(config, **change), "1234") for change in ({}, *changes)]
    assert len({*hashes, hash_model(config, "5678")}) == 5
    assert hash_model(dataclasses.replace(config, name="other"), "1234") == hashes[0] and hash_model(config, "") == ""
