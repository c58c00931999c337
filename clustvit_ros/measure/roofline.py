"""What a device could do at best: its measured matrix-product rate and memory bandwidth, and the time they allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from clustvit_ros.measure.flops import Cost
from clustvit_ros.networks.cpu_layers import Int8Linear

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
        precision: of the matrix product, one of `PRECISIONS`.
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
