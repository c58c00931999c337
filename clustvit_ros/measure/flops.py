# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Floating-point operations and parameters of a network, counted without running it.

Counted is what PyTorch's own counter counts: matrix products, convolutions and both products of attention, two
operations per multiply-add; norms, activations, softmax and the merge's sort are not. Distance matrices (ClusTR), which
it leaves out, are counted as the matrix products that they are. ClustViT's published figures are counted in this way as
well: ViT-B with Segmenter's head at 512x512 and 150 classes has 258.6 GFLOPs here and there.
ClustViT-B with 307 of 1024 tokens kept has 147.8 instead of 148.7, because the representatives' half of the
regenerator's first layer is computed once per cluster here, and once per merged token in the reference implementation;
`Cost.reference_flops` is what that would take (148.6).

What a device could do at best: its measured matrix-product rate and memory bandwidth, and the time they allow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clustvit_ros.networks.architectures import build_network
from clustvit_ros.networks.inference import Int8Linear
from clustvit_ros.networks.segmenter import NetworkConfig
from clustvit_ros.networks.vit import BACKBONE_NORM_EPS, Block, grid_size_of
from clustvit_ros.networks.vit_config import ViTConfig


class Cost(NamedTuple):
    """What one call of a network takes.

    Attributes:
        flops: two per multiply-add, of the whole batch.
        parameters: weights of the network.
        reference_flops: what the reference implementation of ClustViT takes for the same; `flops` where it has no such
            network, or the two do not differ; 0 where it was not counted.
    """

    flops: int
    parameters: int
    reference_flops: int = 0


def count_cost(
    network: NetworkConfig, num_classes: int, size: tuple[int, int], batch: int = 1, token_capacity: int = 0
) -> Cost:
    """Count one call.

    Args:
        network: hyper-parameters.
        num_classes: classes of the head.
        size: (height, width) of the input.
        batch: images of the call.
        token_capacity: tokens kept; 0 is all. A plain ViT keeps all in any case.
    """
    # On the meta device tensors have shapes and no values: nothing is computed and no memory is taken.
    with torch.device("meta"):
        segmenter = build_network(network, num_classes).eval()
        images = torch.empty(batch, 3, *size)
    capacity = token_capacity or images[0, 0].numel()
    flops = count_flops(segmenter, images, merge_threshold=1.0, token_capacity=capacity)
    parameters = sum(parameter.numel() for parameter in segmenter.parameters())
    return Cost(flops, parameters, flops + _regenerator_saving(network, size, batch, capacity))


def count_flops(module: nn.Module, *arguments: Any, **options: Any) -> int:
    """Operations of one call of a module, distances included; its tensors may lie on any device, meta included."""
    return sum(_count(module, *arguments, **options).get_flop_counts()["Global"].values())


def attention_share(embed_dim: int, num_heads: int, num_tokens: int) -> float:
    """Share of a ViT block's operations that the products of attention take, 0..1.

    What is left bounds any method that replaces attention alone: it cannot be faster than 1 / (1 - share) times.
    """
    with torch.device("meta"):
        block = Block(embed_dim, num_heads, 4.0, BACKBONE_NORM_EPS)
        tokens = torch.empty(1, num_tokens, embed_dim)
    counts = _count(block, tokens).get_flop_counts()["Global"]
    # A block's other products are not batched.
    attention = sum(flops for op, flops in counts.items() if "bmm" in str(op))
    return attention / sum(counts.values())


def _count(module: nn.Module, *arguments: Any, **options: Any) -> FlopCounterMode:
    aten = torch.ops.aten
    mapping: dict[Any, Any] = {aten._euclidean_dist: _distance_flops, aten._cdist_forward: _distance_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    # Of a CPU's fused attention PyTorch counts nothing, so it is taken apart into its two products.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*arguments, **options)
    return counter


def _distance_flops(x_shape: Any, y_shape: Any, *_: Any, **__: Any) -> int:
    *batch, rows, width = x_shape
    return 2 * int(torch.Size(batch).numel()) * rows * y_shape[-2] * width


def _regenerator_saving(network: NetworkConfig, size: tuple[int, int], batch: int, capacity: int) -> int:
    """Operations that the reference implementation spends on representatives in the Regenerator, and this one does not.

    It multiplies the representative's half of the first layer with one row per merged token, here with one per cluster,
    at every level that is regenerated.
    """
    if not isinstance(network, ViTConfig) or network.merge_method != "clusters" or network.decode != "full":
        return 0
    if len(network.points) > 1:
        return 0
    grid_size = grid_size_of(size, network.patch_size)
    merged = grid_size[0] * grid_size[1] - capacity
    if merged <= 0:
        return 0
    last = network.depth - 1
    levels = sum(network.points[0] <= block for block in {*network.level_blocks, last})
    return 2 * network.embed_dim**2 * (merged - network.num_clusters) * batch * levels


_REPEATS = 5


class DeviceRates(NamedTuple):
    """Measured in one precision.

    Attributes:
        matmul_gflops: 1e9 floating-point operations per second, two per multiply-add.
        bandwidth_gb_s: 1e9 bytes per second, read and written.
    """

    matmul_gflops: float
    bandwidth_gb_s: float


def measure_rates(device: torch.device, precision: str = "float32") -> DeviceRates:
    """Measure a device with the threads that PyTorch has; takes about a second on a CPU.

    Args:
        device: to be measured.
        precision: precision of the matrix product, one of `PRECISIONS`.
    """
    # A CPU without instructions for a half precision would take minutes for more.
    side = (2048 if precision in ("float32", "int8") else 512) if device.type == "cpu" else 8192
    multiply = _product(side, device, precision)
    # Far beyond any cache.
    source = torch.zeros(64 << 20, device=device)
    target = torch.zeros_like(source)
    matmul_s = _best_s(multiply, device)
    copy_s = _best_s(lambda: target.copy_(source), device)
    return DeviceRates(2 * side**3 / matmul_s / 1e9, 2 * source.numel() * source.element_size() / copy_s / 1e9)


def roofline_ms(cost: Cost, rates: DeviceRates, image_bytes: int, mask_bytes: int, weight_bytes: int = 4) -> float:
    """The time below which a call cannot come on a device with these rates.

    The larger of two: all counted operations at the matrix-product rate; weights (of `weight_bytes` each) and input
    read once and the mask written once at the memory's bandwidth. Traffic of activations, which a larger cache avoids,
    is left out.
    """
    compute_s = cost.flops / (rates.matmul_gflops * 1e9)
    memory_s = (weight_bytes * cost.parameters + image_bytes + mask_bytes) / (rates.bandwidth_gb_s * 1e9)
    return max(compute_s, memory_s) * 1000.0


def _product(side: int, device: torch.device, precision: str) -> Callable[[], object]:
    """Multiplies two square matrices."""
    if precision == "int8":
        layer, x = Int8Linear(nn.Linear(side, side, bias=False)), torch.rand(1, side, side)
        return lambda: layer(x)
    a, b = (torch.rand(side, side, device=device).to(getattr(torch, precision)) for _ in range(2))
    product = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=product)


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    times_s = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - start)
    return min(times_s)
