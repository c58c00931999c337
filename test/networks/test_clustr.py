# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""ClusTR: parity with the official implementation's stored cases, published sizes, and the bounded forms."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clustvit_ros.config import from_mapping
from clustvit_ros.errors import ConfigError, ImageError, ModelError
from clustvit_ros.measure.flops import count_flops
from clustvit_ros.networks import build_network, network_config
from clustvit_ros.networks import density_peaks as density_peaks_module
from clustvit_ros.networks.architectures import ARCHITECTURES
from clustvit_ros.networks.clustr import ClusTRAttention, ClusTRConfig, cluster_tokens
from clustvit_ros.networks.density_peaks import density_peaks, split_windows
from clustvit_ros.networks.official import clustr_shape, from_official_clustr

TINY = {
    "embed_dims": [16, 24, 32, 48], "num_heads": [1, 2, 2, 3], "depths": [1, 2, 2, 1], "head_dim": 32,
}  # fmt: skip


def load(golden_dir, name):
    folder = golden_dir / "clustr"
    weights = torch.load(folder / f"{name}.pth", weights_only=True)["state_dict"]
    return weights, {key: torch.from_numpy(value) for key, value in np.load(folder / f"{name}.npz").items()}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "sr_ratio", "heads"), [("attention_sr4", 4, 4), ("attention_sr2", 2, 2)])
@torch.no_grad()
def test_clustered_attention_is_the_official_one(golden_dir, name, sr_ratio, heads):
    weights, expected = load(golden_dir, name)
    x = expected["x"]
    attention = ClusTRAttention(x.shape[2], heads, sr_ratio)
    attention.load_state_dict(weights)
    clusters = cluster_tokens(x, (1, x.shape[1]), sr_ratio)
    assert [clusters.num_coarse, clusters.num_fine] == expected["num_clusters"].tolist()
    assert torch.equal(clusters.coarse_ids, expected["cluster_ids_coarse"])
    assert torch.equal(clusters.fine_ids, expected["cluster_ids_fine"])
    # Up to hundreds: float32 holds them to a relative 1e-5.
    torch.testing.assert_close(attention.weight_layer(x).exp(), expected["token_weight"], rtol=1e-5, atol=1e-4)
    coarse, fine = attention.merge(x, clusters)
    close(coarse, expected["merged_coarse"])
    close(fine, expected["merged_fine"])
    close(attention(x, clusters), expected["out"])


@torch.no_grad()
def test_plain_attention_is_the_official_one(golden_dir):
    weights, expected = load(golden_dir, "attention_sr1")
    attention = ClusTRAttention(32, 4, 1)
    attention.load_state_dict(weights)
    close(attention(expected["x"]), expected["out"])


class Classifier(nn.Module):
    """The paper's image classifier, always the exact form: for its reference case and published figures."""

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dims[-1], num_classes)

    def forward(self, images):
        tokens, _ = self.backbone.stage_tokens(images)[-1]
        return self.head(tokens.mean(dim=1))


def classifier(config, num_classes):
    exact = dataclasses.replace(config, window_tokens=0, cluster_once=False)
    return Classifier(exact.build(1).backbone, num_classes).eval()


@pytest.mark.parametrize("max_distances", [1 << 24, 100_000], ids=["whole", "in_bands"])
@torch.no_grad()
def test_the_network_is_the_official_one(golden_dir, monkeypatch, max_distances):
    monkeypatch.setattr(density_peaks_module, "_MAX_DISTANCES", max_distances)
    weights, expected = load(golden_dir, "network_small")
    network = classifier(from_mapping(ClusTRConfig, {**clustr_shape(weights), "num_heads": [1, 2, 5, 8]}, "golden"), 10)
    network.load_state_dict(from_official_clustr(weights))
    for stage, (tokens, grid_size) in enumerate(network.backbone.stage_tokens(expected["image"]), start=1):
        close(tokens, expected[f"stage{stage}_tokens"])
        assert grid_size[0] * grid_size[1] == tokens.shape[1]
    logits = network(expected["image"])
    close(logits, expected["logits"])
    assert torch.equal(logits, network(expected["image"]))


def test_checkpoints_that_are_no_clustr_say_so(golden_dir):
    weights, _ = load(golden_dir, "network_small")
    assert clustr_shape(weights)["embed_dims"] == [16, 32, 40, 64]
    with pytest.raises(ModelError, match=r"has no patch_embed3\.proj\.weight"):
        clustr_shape({name: value for name, value in weights.items() if "patch_embed3" not in name})
    with pytest.raises(ModelError, match=r"neck\.weight is no parameter of a ClusTR"):
        from_official_clustr({**weights, "neck.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="not a multiple"):
        from_mapping(ClusTRConfig, {**clustr_shape(weights), "num_heads": [1, 2, 3, 8]}, "golden")


def published_multiply_adds(config, flops, distances, side):
    """What the paper counts: one per multiply-add, without distances and without the fine scale's two products."""
    fine = 0
    for stage in range(3):
        tokens = (side >> (2 + stage)) ** 2
        keys = 4 * (tokens // config.sr_ratios[stage] ** 2)
        fine += config.depths[stage] * 2 * tokens * keys * config.embed_dims[stage]
    return (flops - distances) / 2 - fine


@pytest.mark.parametrize(
    ("name", "parameters", "published", "counted"),
    [("clustr_b1", 11.68, 2.15, 4.84), ("clustr_b2", 22.69, 4.8, 10.93), ("clustr_b3", 40.25, 7.48, 16.67)],
)
def test_sizes_are_the_published_ones(name, parameters, published, counted):
    config = ARCHITECTURES[name]
    with torch.device("meta"):
        network, image = classifier(config, 1000), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    # PyTorch counts no operations for its distance function.
    flops = counter.get_total_flops()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert flops / 1e9 == pytest.approx(counted, rel=0.01)
    assert published_multiply_adds(config, flops, 0, 224) / 1e9 == pytest.approx(published, rel=0.01)


def test_distances_are_counted():
    with torch.device("meta"):
        flops = count_flops(classifier(ARCHITECTURES["clustr_b1"], 1000), torch.empty(1, 3, 224, 224))
    distances = sum(depth * 2 * side**4 * dim for depth, side, dim in ((1, 56, 64), (2, 28, 128), (6, 14, 256)))
    assert flops - distances == pytest.approx(4.84e9, rel=0.01)


def loop_density_peaks(x, num_clusters):
    """The definition, token by token, for one image (N, C): cluster ids."""
    n, width = x.shape
    d = [[float((x[i] - x[j]).square().sum().sqrt()) / math.sqrt(width) for j in range(n)] for i in range(n)]
    density = [math.exp(-sum(v * v for v in sorted(row)[:5]) / 5) for row in d]
    largest = max(max(row) for row in d)
    score = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if density[j] > density[i]]
        score.append(density[i] * (min(denser) if denser else largest))
    centres = sorted(range(n), key=lambda i: -score[i])[:num_clusters]
    ids = [min(range(num_clusters), key=lambda c: d[i][centres[c]]) for i in range(n)]
    for cluster, centre in enumerate(centres):
        ids[centre] = cluster
    return ids


def test_density_peaks_follow_their_definition():
    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for count, ids in zip((3, 12), density_peaks(x, (3, 12)), strict=True):
        for image in range(2):
            assert ids[image].tolist() == loop_density_peaks(x[image], count)


def test_images_are_clustered_alike_a_few_at_a_time(monkeypatch):
    x = torch.randn(5, 40, 6, generator=torch.Generator().manual_seed(5))
    together = density_peaks(x, (3, 12))
    monkeypatch.setattr(density_peaks_module, "_CACHED_DISTANCES", 2 * 40**2)
    assert all(torch.equal(a, b) for a, b in zip(density_peaks(x, (3, 12)), together, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [6, 40])
def test_half_precision_clusters_as_float32_does(dtype, tokens):
    """Few tokens or many, and where squares are beyond float16."""
    x = (100.0 * torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(3))).to(dtype)
    for found, expected in zip(density_peaks(x, (2, 4)), density_peaks(x.float(), (2, 4)), strict=True):
        assert torch.equal(found, expected)


def test_equal_tokens_are_clustered_all_the_same():
    ids = density_peaks(torch.zeros(1, 30, 8), (2, 8))
    assert [int(i.max()) for i in ids] == [1, 7]
    assert all(torch.equal(i, j) for i, j in zip(ids, density_peaks(torch.zeros(1, 30, 8), (2, 8)), strict=True))


@pytest.mark.parametrize("grid_size", [(8, 8), (13, 29), (1, 200), (200, 1), (64, 64), (33, 65)])
@pytest.mark.parametrize("window_tokens", [1, 16, 50, 256, 10_000])
def test_windows_cover_the_grid_in_equal_rectangles(grid_size, window_tokens):
    windows = split_windows(grid_size, window_tokens, torch.device("cpu"))
    height, width = grid_size
    assert windows.shape[1] <= window_tokens
    assert sorted(set(windows.flatten().tolist())) == list(range(height * width))
    for window in windows.tolist():
        rows, columns = {i // width for i in window}, {i % width for i in window}
        assert len(rows) * len(columns) == len(window) == len(set(window))
        assert max(rows) - min(rows) + 1 == len(rows) and max(columns) - min(columns) + 1 == len(columns)


def test_one_window_is_the_exact_form():
    x = torch.randn(2, 96, 16)
    exact, windowed = cluster_tokens(x, (8, 12), 2), cluster_tokens(x, (8, 12), 2, window_tokens=96)
    assert torch.equal(exact.fine_ids, windowed.fine_ids) and torch.equal(exact.coarse_ids, windowed.coarse_ids)


def test_windows_do_not_meet():
    x = torch.randn(1, 16 * 16, 8)
    clusters = cluster_tokens(x, (16, 16), 2, window_tokens=64)
    assert clusters.windows.shape == (4, 64) and (clusters.num_coarse, clusters.num_fine) == (16, 64)
    alone = cluster_tokens(x[:, clusters.windows[2]], (8, 8), 2)
    assert torch.equal(clusters.coarse_ids[2], alone.coarse_ids[0])


def test_the_published_form_is_what_is_bounded():
    """Windows that hold the whole grid and a clustering per block are the exact network; others come close to it."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 128, 128)
    networks = {}
    for name, options in {
        "exact": {"window_tokens": 0, "cluster_once": False},
        "roomy": {"window_tokens": 1024, "cluster_once": False},
        "bounded": {"window_tokens": 256, "cluster_once": True},
    }.items():
        torch.manual_seed(1)
        network = build_network(network_config("clustr_b1", {**TINY, **options}), 5).eval()
        with torch.no_grad():
            networks[name] = network(images).logits
    assert torch.equal(networks["exact"], networks["roomy"])
    difference = (networks["exact"] - networks["bounded"]).abs().mean() / networks["exact"].std()
    assert 0 < difference < 0.5


def test_distances_are_held_in_proportion_to_the_tokens():
    def windows(side):
        x = torch.randn(1, side * side, 4)
        return tuple(cluster_tokens(x, (side, side), 4, window_tokens=256).windows.shape)

    assert windows(32) == (4, 256) and windows(64) == (16, 256)


@pytest.mark.parametrize("size", [(64, 96), (50, 130), (33, 31), (1, 1)])
def test_the_segmenter_takes_any_size(size):
    network = build_network(network_config("clustr_b1", TINY), 5).eval()
    with torch.no_grad():
        output = network(torch.randn(1, 3, *size))
    assert output.logits.shape == (1, 5, -(-size[0] // 4), -(-size[1] // 4)) and output.cluster_ids is None
    with pytest.raises(ImageError, match="expected"):
        network(torch.zeros(1, 1, 8, 8))


def test_every_parameter_learns():
    network = build_network(network_config("clustr_b1", {**TINY, "drop_path": 0.1}), 5)
    network(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


def test_a_batch_equals_its_images():
    network = build_network(network_config("clustr_b1", {**TINY, "window_tokens": 256}), 5).eval()
    images = torch.randn(3, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(network(images).logits[1:2], network(images[1:2]).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        {"patch_size": 16},
        {"depths": [1, 0, 1, 1]},
        {"num_heads": [3, 2, 4, 8]},
        {"window_tokens": 100},
        {"head_dim": 40},
    ],
)
def test_hyper_parameters_that_make_no_network_are_refused(overrides):
    with pytest.raises(ConfigError):
        network_config("clustr_b1", overrides)
