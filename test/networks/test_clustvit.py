# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Properties of merging and regeneration, on small random networks."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clustvit_ros.errors import ConfigError, ImageError
from clustvit_ros.networks import ViTConfig, build_network, network_config
from clustvit_ros.networks.architectures import ARCHITECTURES, without_merging
from clustvit_ros.networks.clustering import (
    Regenerator,
    count_kept,
    merge_exactly,
    merge_scores,
    merge_to_capacity,
    unmerge,
)
from clustvit_ros.networks.vit import Attention

SMALL = ViTConfig(
    backbone="clustvit", image_size=(96, 128), embed_dim=24, depth=3, num_heads=2, injection_point=1, head_depth=1
)


@pytest.fixture(params=["patch", "conv"])
def network(request):
    torch.manual_seed(0)
    config = ViTConfig(**{**vars(SMALL), "stem": request.param})
    network = build_network(config, 5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


@pytest.fixture
def images():
    return torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))


def test_threshold_one_is_the_plain_vit_bit_for_bit(network, images):
    plain = build_network(without_merging(SMALL), 5).requires_grad_(False)
    if hasattr(network.backbone.patch_embed, "layers"):
        plain.backbone.patch_embed = network.backbone.patch_embed
    weights = {name: tensor for name, tensor in network.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(weights)
    assert torch.equal(network(images, merge_threshold=1.0).logits, plain.eval()(images).logits)
    assert torch.equal(network(images, token_capacity=48).logits, plain(images).logits)
    assert (network(images, merge_threshold=1.0).cluster_ids == 0).all()


@pytest.mark.parametrize("merging", ["algm", "algm+clusters", "cts", "tome", "kmeans", "stvit"])
def test_threshold_one_merges_nothing_in_any_way_to_merge(merging, images):
    torch.manual_seed(0)
    backbone = "clustvit" if "clusters" in merging else "vit"
    config = ViTConfig(**{**vars(SMALL), "depth": 4, "backbone": backbone, "merging": merging})
    network = build_network(config, 5).eval().requires_grad_(False)
    plain = build_network(without_merging(config), 5).eval().requires_grad_(False)
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if name in plain.state_dict()})
    expected = plain(images).logits
    assert torch.equal(network(images, merge_threshold=1.0).logits, expected)
    assert torch.equal(network(images, merge_threshold=1.0, token_capacity=48).logits, expected)


def test_threshold_zero_merges_everything(network, images):
    assert (network(images, merge_threshold=0.0).cluster_ids > 0).all()


def test_fewer_tokens_are_kept_as_the_threshold_falls(network, images):
    scores = merge_scores(network(images).cluster_logits)
    counts = [int(count_kept(scores, threshold).sum()) for threshold in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 96


@pytest.mark.parametrize("capacity", [0, 1, 17, 47, 48, 1000])
def test_capacity_keeps_the_tokens_with_the_lowest_scores(network, images, capacity):
    output = network(images, token_capacity=capacity)
    kept = output.cluster_ids == 0
    assert (kept.sum(dim=1) == min(capacity, 48)).all()
    margin = merge_scores(output.cluster_logits).margin
    if 0 < capacity < 48:
        assert (margin.where(kept, -torch.inf).amax(1) <= margin.where(~kept, torch.inf).amin(1)).all()


def test_a_batch_equals_its_images_alone(network, images):
    both = network(images, token_capacity=20)
    for index in range(2):
        alone = network(images[index : index + 1], token_capacity=20)
        assert torch.equal(alone.cluster_ids[0], both.cluster_ids[index])
        torch.testing.assert_close(alone.logits[0], both.logits[index], rtol=0, atol=1e-5)


def test_regeneration_leaves_kept_tokens_untouched():
    torch.manual_seed(0)
    x, logits = torch.randn(2, 1 + 30, 8), torch.randn(2, 30, 4)
    scores, regenerator = merge_scores(logits), Regenerator(8)
    for merge in (merge_to_capacity(x, scores, 11, 3), merge_exactly(x, scores, 0.5, 3)):
        full = unmerge(merge.compact, x, merge, 3, regenerator)
        kept = merge.cluster_ids == 0
        assert torch.equal(full[:, 1:][kept], x[:, 1:][kept])
        assert torch.equal(full[:, 0], x[:, 0])
        assert not torch.equal(full[:, 1:][~kept], x[:, 1:][~kept])


def test_regenerator_equals_the_mlp_on_the_concatenation():
    torch.manual_seed(0)
    regenerator, tokens, reps = Regenerator(8), torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    ids = torch.randint(1, 4, (2, 5))
    pairs = torch.cat([tokens, reps.gather(1, (ids - 1)[..., None].expand(-1, -1, 8))], dim=2)
    expected = regenerator.fc2(torch.nn.functional.gelu(regenerator.fc1(pairs)))
    torch.testing.assert_close(regenerator(tokens, reps, ids), expected)


def test_saturated_scores_are_still_told_apart():
    # Both scores round to 1.0 in float32; the less certain token must be the one that is kept.
    logits = torch.tensor([[[0.0, 60.0], [0.0, 50.0]]])
    merge = merge_to_capacity(torch.randn(1, 3, 4), merge_scores(logits), 1, 1)
    assert merge.cluster_ids.tolist() == [[1, 0]]


class _NoHostRead(TorchDispatchMode):
    """Fails on operators that make the host wait for the device, or whose result's shape depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} in the capacity path"
        return func(*args, **(kwargs or {}))


def test_capacity_path_reads_nothing_back(network, images):
    with _NoHostRead():
        network(images, token_capacity=20)
    with pytest.raises(AssertionError, match="in the capacity path"), _NoHostRead():
        network(images)  # exact mode does: the check can fail


def test_capacity_path_runs_without_data():
    # On the meta device tensors have shapes and no values, so no shape can depend on a value.
    network = build_network(SMALL, 5).to("meta").eval()
    output = network(torch.empty(2, 3, 96, 128, device="meta"), token_capacity=20)
    assert output.logits.shape == (2, 5, 6, 8)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    network = build_network(ViTConfig(**{**vars(SMALL), "stem": "conv", "drop_path": 0.1}), 5).train()
    output = network(torch.randn(2, 3, 96, 128), token_capacity=20)
    (output.logits.square().mean() + output.cluster_logits.square().mean()).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("shape", [(3, 96, 128), (1, 1, 96, 128), (1, 3, 0, 128)])
def test_wrong_images_are_named(network, shape):
    with pytest.raises(ImageError, match=r"expected \(batch, 3, height, width\)"):
        network(torch.zeros(shape))


def test_published_sizes():
    for name, parameters_m in {"vit_t": 5.6, "vit_s": 22, "vit_b": 86}.items():
        config = network_config(name, {"head_depth": 0})
        backbone = build_network(config, 1).backbone
        assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(parameters_m, rel=0.03)
    vits = {f"{kind}_{size}" for kind in ("vit", "clustvit") for size in "tsbl"}
    others = {f"clustr_{size}" for size in ("b1", "b2", "b3", "t")} | {f"cast_{size}" for size in "tsb"}
    assert set(ARCHITECTURES) == vits | others


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depht": 8}, "unknown key 'depht'; did you mean 'depth'"),
        ({"embed_dim": 100}, "embed_dim 100 is not a multiple of num_heads 3"),
        ({"depth": "8"}, "depth: got '8' (str), expected int"),
        ({"stem": "pool"}, "expected one of 'patch', 'conv'"),
        ({"image_size": [8, 8]}, "below one patch"),
        ({"stem": "conv", "patch_size": 12}, "needs a power of two"),
    ],
)
def test_unusable_hyper_parameters_are_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        network_config("clustvit_t", overrides)
    assert message in str(error.value)


def test_injection_point_beyond_the_last_block_is_refused():
    with pytest.raises(ConfigError, match="injection_point: got 3 with 3 blocks, expected 0 to 2"):
        build_network(ViTConfig(**{**vars(SMALL), "injection_point": 3}), 5)


@pytest.mark.parametrize("mask", ["none", "kept", "weights"])
def test_attention_learns_the_same_in_bfloat16(mask):
    torch.manual_seed(0)
    attention = Attention(24, 2)
    tokens = torch.randn(2, 7, 24)
    key_mask = {"none": None, "kept": torch.arange(7) < 4, "weights": torch.arange(7) / 7}[mask]
    if key_mask is not None:
        key_mask = key_mask.expand(2, 7)
    results = []
    for precise in (True, False):
        tokens.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            out = attention(tokens.requires_grad_(), key_mask)
        (out.float() * torch.arange(24.0)).sum().backward()
        results.append((out.detach().float(), tokens.grad))
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).abs().max() < 0.02 * exact.abs().max()
