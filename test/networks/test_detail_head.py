# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The detail head: finer than the tokens, at every capacity."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks import ViTConfig, build_network
from clustvit_ros.networks.inference import for_inference

SMALL = {
    "image_size": (96, 128), "embed_dim": 32, "depth": 2, "num_heads": 2, "injection_point": 1, "stem": "conv",
    "head": "detail",
}  # fmt: skip


def make(**changes):
    torch.manual_seed(0)
    return build_network(ViTConfig(**{**SMALL, **changes}), 2)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_logits_are_at_a_quarter_of_the_resolution(patch_size):
    network = make(patch_size=patch_size).eval()
    for height, width in ((96, 128), (64, 160)):
        logits = network(torch.zeros(2, 3, height, width), token_capacity=5).logits
        assert logits.shape == (2, 2, height // 4, width // 4)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [8, 16])
def test_logits_may_be_at_half_of_the_resolution(patch_size):
    network = make(patch_size=patch_size, head_stride=2, head_refine=1, head_channels=8).eval()
    for height, width in ((96, 128), (64, 160)):
        logits = network(torch.zeros(2, 3, height, width), token_capacity=5).logits
        assert logits.shape == (2, 2, height // 2, width // 2)


def test_every_weight_of_a_finer_head_learns():
    network = make(stem_blocks=1, head_stride=2, head_refine=1).train()
    network.head(network.backbone(torch.randn(2, 3, 96, 128))).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.head.parameters())
    # A residual block starts as the identity, and all but its last norm learns from the second step on.
    stem = network.backbone.patch_embed
    assert all(float(layer.weight.grad.abs().sum()) > 0 for layer in stem.layers if hasattr(layer, "weight"))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"stem_blocks": 2}, {"head_stride": 2, "head_refine": 2}])
def test_the_folded_copy_gives_the_same(changes):
    network = make(**changes)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
    network(torch.randn(2, 3, 96, 128))  # moves the batch norms' statistics away from their start
    network.eval()
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in for_inference(network).modules()) == 0
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    expected, folded = (
        network(images, token_capacity=20).logits,
        for_inference(network)(images, token_capacity=20).logits,
    )
    assert float((folded - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_stem_blocks_start_as_the_identity():
    """So that weights of a stem without them lose nothing; on patches of 16 px they are at strides 4 and 8."""
    plain, refined = make().eval(), make(stem_blocks=2).eval()
    missing, unexpected = refined.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[3] for name in missing} == {"0", "1"}
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(refined(images, token_capacity=10).logits, plain(images, token_capacity=10).logits)


def thin_lines(seed):
    """A vertical line 3 px wide at a random place on noise: (4, 3, 64, 64) and labels (4, 64, 64)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(4, 64, 64, dtype=torch.int64)
    for index, column in enumerate(torch.randint(4, 58, (4,), generator=generator).tolist()):
        labels[index, :, column : column + 3] = 1
    return 0.3 * torch.randn(4, 3, 64, 64, generator=generator) + 2.0 * labels[:, None], labels


def test_it_draws_what_is_thinner_than_a_patch():
    """Learnt in a few steps with most tokens merged, on patches more than five times as wide as the line."""
    network = make(image_size=(64, 64)).train()
    optimiser = torch.optim.AdamW(network.parameters(), 5e-3)
    for step in range(60):
        images, labels = thin_lines(step)
        logits = F.interpolate(network(images, token_capacity=4).logits, size=(64, 64), mode="bilinear")
        optimiser.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimiser.step()
    images, labels = thin_lines(1000)
    with torch.no_grad():
        logits = network.eval()(images, token_capacity=4).logits
    found = F.interpolate(logits, size=(64, 64), mode="bilinear").argmax(1)
    iou = ((found == 1) & (labels == 1)).sum() / ((found == 1) | (labels == 1)).sum()
    assert iou > 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "linear", "head_stride": 2}, "head_refine 0 are for head 'detail', got head 'linear'"),
        ({"head": "segmenter", "head_refine": 1}, "are for head 'detail', got head 'segmenter'"),
        ({"head_refine": -1}, "head_refine is -1, expected 0 or above"),
    ],
)
def test_what_only_the_detail_head_has_is_refused_elsewhere(changes, message):
    with pytest.raises(ConfigError, match=message):
        ViTConfig(**{**SMALL, **changes})


@pytest.mark.parametrize(
    "changes", [{"stem": "patch"}, {"patch_size": 4}, {"head": "linear", "stem_blocks": 1, "stem": "patch"}]
)
def test_what_has_no_finer_maps_is_refused(changes):
    with pytest.raises(ConfigError, match="needs stem conv and patches of at least 8 px"):
        ViTConfig(**{**SMALL, **changes})
