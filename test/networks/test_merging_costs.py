# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What ways to merge cost, beside what their authors publish and beside sums over plain rows."""

from __future__ import annotations

import pytest
import torch
from small_network import make_small

from clustvit_ros.measure.flops import count_cost, count_flops
from clustvit_ros.networks import network_config


@pytest.mark.parametrize(
    ("head", "classes", "published_gflops"),
    [("segmenter", 9, 183.40), ("segmenter", 3, 183.18), ("upernet", 9, 279.35)],
)
def test_cts_costs_what_is_published(head, classes, published_gflops):
    """612 + 103 tokens of 1024, as ClustViT's authors have it (SUIM and RumexWeeds, 512 x 512, no windows sliding)."""
    config = network_config("vit_b", {"image_size": [512, 512], "merging": "cts", "share_corner": True, "head": head})
    cost = count_cost(config, classes, (512, 512), token_capacity=612 + 103)
    assert cost.flops / 1e9 == pytest.approx(published_gflops, rel=0.005)


@pytest.mark.parametrize(
    ("size", "side", "classes", "published"),
    [("t", 512, 150, 12.8), ("s", 512, 150, 38.6), ("b", 512, 150, 130.0), ("l", 640, 150, 672.0),
     ("s", 768, 19, 116.0), ("s", 480, 60, 32.1)],
)  # fmt: skip
def test_what_algms_authors_compare_with_costs_what_they_publish(size, side, classes, published):
    """Their "GFLOPs" are multiply-adds, on ADE20K, Cityscapes and Pascal Context; their counter has norms as well."""
    counted = count_cost(network_config(f"vit_{size}", {"image_size": [side, side]}), classes, (side, side)).flops / 2e9
    assert counted == pytest.approx(published, rel=0.02)


def block(width, tokens, left):
    """Multiply-adds of a block that merges after its attention."""
    return 4 * width**2 * tokens + 2 * width * tokens**2 + 8 * width**2 * left


@torch.no_grad()
@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.9])
def test_algm_costs_what_its_rows_cost(similarity):
    """Windows go between attention and MLP of the second block here, pairs in the third, and the head is compact."""
    network = make_small(merging="algm", injection_points=(1, 2), merge_similarity=similarity, decode="compact")
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    images[:, :, 40:] *= 0.05  # half of the image is nearly flat
    rows = []
    for each in network.backbone.blocks:
        each.mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    counted = count_flops(network, images)
    first, windows, pairs, last = rows
    assert first == 49 >= windows > pairs == last
    width, classes, kept = 24, 5, pairs - 1
    expected = 48 * width * 3 * 16**2 + block(width, first, first) + block(width, first, windows)
    expected += block(width, windows, pairs) + block(width, pairs, pairs)
    expected += (windows // 2) * (windows - 1 - windows // 2) * width  # how alike the pairs are
    expected += width**2 * kept + block(width, kept + classes, kept + classes)
    expected += width**2 * (kept + classes) + width * kept * classes
    assert counted == pytest.approx(2 * expected, rel=0.01)
