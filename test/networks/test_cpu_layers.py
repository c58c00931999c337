# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Layers in a CPU's own form compute what the layers compute that they stand for."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clustvit_ros.networks import build_network, network_config
from clustvit_ros.networks.clustr import ResidualDepthwise
from clustvit_ros.networks.inference import (
    FusedDepthwise,
    Int8Conv2d,
    Int8Linear,
    PackedLinear,
    for_inference,
    int8_problem,
    pack_layers,
    to_int8,
)


@pytest.fixture
def needs_packing():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs a PyTorch with oneDNN")


def make_network(arch="clustvit_t", **overrides):
    torch.manual_seed(0)
    if "vit" in arch:
        overrides = {"image_size": [64, 96], "depth": 4, **overrides}
    return build_network(network_config(arch, overrides), 40).eval()


def whole_numbers(*shape, low, high):
    """Random integers as floats, both bounds among them, so that rounding has nothing to lose."""
    numbers = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(1)).float()
    numbers.view(len(numbers), -1)[:, 0] = low
    numbers.view(len(numbers), -1)[:, -1] = high
    return numbers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_packed_layers_compute_the_same(needs_packing, gelu, bias, dtype, tolerance):
    layer = nn.Linear(96, 64, bias=bias).to(dtype)
    for shape in ((2, 50, 96), (1, 3, 96), (7, 96)):
        x = torch.randn(shape).to(dtype)
        expected = F.gelu(layer(x)) if gelu else layer(x)
        torch.testing.assert_close(PackedLinear(layer, gelu)(x), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_fused_convolution_holds_its_skip_connection_and_gelu(needs_packing):
    layer, x = ResidualDepthwise(48).to(memory_format=torch.channels_last), torch.randn(2, 7, 9, 48).permute(0, 3, 1, 2)
    weight = layer.weight.clone()
    fused = FusedDepthwise(layer)(x)
    torch.testing.assert_close(fused, F.gelu(layer(x)), rtol=1e-5, atol=1e-5)
    assert fused.is_contiguous(memory_format=torch.channels_last) and torch.equal(layer.weight, weight)


@pytest.mark.parametrize(("low", "high"), [(-100, 154), (0, 254), (-254, 0)])
@torch.no_grad()
def test_whole_numbers_are_multiplied_exactly(vnni, low, high):
    layer = nn.Linear(64, 48)
    layer.weight.copy_(whole_numbers(48, 64, low=-127, high=127))
    x = whole_numbers(1, 30, 64, low=low, high=high)
    torch.testing.assert_close(Int8Linear(layer)(x), layer(x), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_convolutions_are_exact_up_to_their_borders(vnni, stride):
    # The offset is not zero: what is padded must be, all the same.
    layer = nn.Conv2d(32, 40, 3, stride=stride, padding=1)
    layer.weight.copy_(whole_numbers(40, 32, 3, 3, low=-127, high=127))
    x = whole_numbers(2, 32, 9, 13, low=-54, high=200)
    torch.testing.assert_close(Int8Conv2d(layer)(x), layer(x), rtol=1e-6, atol=1e-2)


@torch.no_grad()
def test_rounding_costs_one_percent(vnni):
    torch.manual_seed(0)
    layer, x = nn.Linear(384, 192), torch.randn(1, 200, 384)
    for gelu in (False, True):
        expected = F.gelu(layer(x)) if gelu else layer(x)
        assert (Int8Linear(layer, gelu)(x) - expected).norm() < 0.015 * expected.norm()


@torch.no_grad()
def test_an_image_does_not_hang_on_its_batch(vnni):
    layer, x = Int8Linear(nn.Linear(64, 48)), torch.randn(3, 20, 64) * torch.tensor([0.1, 1.0, 30.0])[:, None, None]
    together = layer(x)
    assert all(torch.equal(together[index : index + 1], layer(x[index : index + 1])) for index in range(3))


@pytest.mark.parametrize("value", [0.0, -3.0, torch.nan, torch.inf, -torch.inf])
@torch.no_grad()
def test_inputs_without_a_range_are_taken(vnni, value):
    layer, x = nn.Linear(64, 48), torch.full((1, 4, 64), value)
    result = Int8Linear(layer)(x)
    assert result.shape == (1, 4, 48)
    if x.isfinite().all():
        torch.testing.assert_close(result, layer(x), rtol=0.02, atol=0.05)


@torch.no_grad()
def test_what_decides_and_regenerates_stays_in_float32(vnni):
    network = make_network(stem="conv", head="detail")
    rounded = for_inference(network)
    to_int8(rounded)
    kinds = {name: type(module) for name, module in rounded.named_modules()}
    for name in ("clusterer.fc1", "clusterer.fc2", "regenerator.fc1", "regenerator.fc2"):
        assert kinds[f"backbone.{name}"] is nn.Linear
    assert kinds["backbone.blocks.0.mlp.fc1"] is kinds["backbone.blocks.3.attn.qkv"] is Int8Linear
    assert Int8Conv2d in kinds.values()
    assert next(iter(kinds.values())) is type(network) and not any("Int8" in str(type(m)) for m in network.modules())


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("vit_t", {}),
        ("clustvit_t", {}),
        ("clustvit_t", {"stem": "conv", "head": "detail"}),
        ("clustvit_t", {"head": "upernet", "depth": 12}),
        ("clustr_b1", {}),
        ("cast_t", {}),
    ],
)
@pytest.mark.parametrize(
    ("convert", "dtype", "difference"),
    [(pack_layers, torch.float32, 1e-5), (pack_layers, torch.bfloat16, 0.05), (to_int8, torch.float32, 0.05)],
)
@torch.no_grad()
def test_networks_compute_nearly_the_same(request, arch, overrides, convert, dtype, difference):
    if convert is to_int8:
        request.getfixturevalue("vnni")
    network = for_inference(make_network(arch, **overrides), dtype)
    converted = copy.deepcopy(network)
    convert(converted)
    images = torch.randn(2, 3, 64, 96).to(dtype)
    # Unmerged: which of a random network's tokens are merged turns on the last digit.
    options = {"merge_threshold": 1.0} if network.backbone.merges else {}
    expected, got = network(images, **options).logits, converted(images, **options).logits
    assert (got - expected).norm() <= difference * expected.norm()


def test_a_cpu_without_the_instructions_is_found_out():
    probe = "from clustvit_ros.networks.inference import int8_problem; print(int8_problem())"
    # oneDNN takes it for such a CPU, which are all x86 CPUs at times.
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41"}
    run = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    if not run.stdout.strip() and not int8_problem():
        pytest.skip("this CPU's products do not overflow in any case")
    assert "no VNNI instructions" in run.stdout or "no 8-bit layers" in run.stdout
