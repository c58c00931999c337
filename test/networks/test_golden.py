# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Parity with the official implementation on its stored inputs, weights and outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clustvit_ros.networks import ViTConfig, build_network
from clustvit_ros.networks.clustvit import ClustViT
from clustvit_ros.networks.model_folder import check_weights
from clustvit_ros.networks.official import from_official

CASES = "abcdefghijklmno"


@pytest.fixture(params=CASES)
def case(request, golden_dir):
    cases = json.loads((golden_dir / "cases.json").read_text())
    name = next(name for name in cases if name.startswith(request.param + "_") and "p_pseudo" not in name)
    if request.param == "d":
        name = "d_all_id0"
    return load_case(golden_dir, cases, name)


def load_case(golden_dir, cases, name):
    config = cases[name]["config"]
    network = build_network(
        ViTConfig(
            backbone=config["arch"],
            image_size=tuple(config["img_size"]),
            embed_dim=config["embed_dims"],
            depth=config["num_layers"],
            num_heads=config["num_heads"],
            num_clusters=config["num_clusters"],
            injection_point=config["injection_point"],
            cluster_mlp_dim=config["cluster_mlp_size"],
            head_depth=config["head_layers"],
            head_heads=config["head_heads"] or 0,
        ),
        config["num_classes"],
    )
    checkpoint = torch.load(golden_dir / config["weights"], weights_only=True)
    weights = from_official(checkpoint["state_dict"])
    check_weights(network, weights, name)
    network.load_state_dict(weights)
    arrays = {key: torch.from_numpy(value) for key, value in np.load(golden_dir / f"{name}.npz").items()}
    return config, network.eval().requires_grad_(False), arrays


def whole_logits(network, images):
    """Class logits at image resolution: (B, 3, H, W) -> (B, Q, H, W), bilinear as mmsegmentation has them."""
    return F.interpolate(network(images).logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_image_case(case):
    config, network, expected = case
    images = expected["input"]
    if config["test_cfg"]["mode"] == "slide":
        logits, count = torch.zeros_like(expected["seg_logits_resized"]), torch.zeros(1, 1, *images.shape[2:])
        for top, left, bottom, right in expected["crop_boxes"].tolist():
            logits[:, :, top:bottom, left:right] += whole_logits(network, images[:, :, top:bottom, left:right])
            count[:, :, top:bottom, left:right] += 1
        logits /= count
    else:
        output = network(images)
        close(output.logits, expected["seg_logits"])
        if config["arch"] == "clustvit":
            close(output.cluster_logits, expected["cluster_logits"])
            assert torch.equal(output.cluster_ids, expected["cluster_ids"])
        logits = whole_logits(network, images)
    close(logits, expected["seg_logits_resized"])
    top2 = expected["seg_logits_resized"].topk(2, dim=1).values
    clear = top2[:, 0] - top2[:, 1] > 2e-4
    assert torch.equal(logits.argmax(1)[clear], expected["pred"].long()[clear])


def test_all_tokens_in_one_cluster_do_not_merge(golden_dir):
    cases = json.loads((golden_dir / "cases.json").read_text())
    _, network, expected = load_case(golden_dir, cases, "d_all_id2")
    output = network(expected["input"])
    assert torch.equal(output.cluster_ids, expected["cluster_ids"])
    close(output.logits, expected["seg_logits"])


def test_backbone_stages(case):
    config, network, expected = case
    if config["test_cfg"]["mode"] == "slide":
        pytest.skip("the sliding-window case stores no intermediate results")
    x, grid_size = network.backbone.embed(expected["input"])
    close(x, expected["x_embed"])
    features = network.backbone(expected["input"])
    assert features.grid_size == grid_size == tuple(expected["feat"].shape[2:])
    close(features.tokens, expected["tokens_final"][:, 1:])
    if isinstance(network.backbone, ClustViT):
        close(network.backbone.encode(expected["input"]).x, expected["x_inject"])


def test_each_window_is_clustered_on_its_own(golden_dir):
    cases = json.loads((golden_dir / "cases.json").read_text())
    _, network, expected = load_case(golden_dir, cases, "n_slide")
    for index, (top, left, bottom, right) in enumerate(expected["crop_boxes"].tolist()):
        output = network(expected["input"][:, :, top:bottom, left:right])
        assert torch.equal(output.cluster_ids, expected["crop_cluster_ids"][index])
        close(output.cluster_logits, expected["crop_cluster_logits"][index])


def test_capacity_of_the_kept_count_equals_exact_mode(case):
    config, network, expected = case
    if config["arch"] != "clustvit" or config["test_cfg"]["mode"] == "slide":
        pytest.skip("nothing is merged here")
    counts = expected["kept_counts"]
    if counts.unique().numel() != 1 or not expected["merged"]:
        pytest.skip("images keep different numbers of tokens, or the batch-wide rule forbids merging")
    output = network(expected["input"], token_capacity=int(counts[0]))
    assert torch.equal(output.cluster_ids, expected["cluster_ids"])
    close(output.logits, expected["seg_logits"])
