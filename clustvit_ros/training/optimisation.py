# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Optimiser, learning rate, averaged weights and precision, shared by every training."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from clustvit_ros.errors import ConfigError

_EMBEDDINGS = ("cls_token", "pos_embed", "class_embed", "mask_token")


@dataclass(frozen=True)
class Optimisation:
    """What every training has.

    Args:
        epochs: passes over the training images.
        batch_size: crops per step, of all processes together.
        learning_rate: peak of AdamW's.
        warmup: share of all steps over which the learning rate rises linearly; then it decays.
        poly_power: exponent of the decay (1 - progress) ** poly_power.
        weight_decay: on matrices and kernels only, not on biases, norms and embeddings.
        clip_norm: largest gradient norm.
        ema_decay: decay of the averaged weights that are validated and shipped.
        precision: precision of the forward pass; "auto" is bfloat16 on GPUs and CPUs that have instructions for it,
            float32 elsewhere. Weights and losses are float32 in any case.
        seed: seed of everything random.
    """

    epochs: int
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.05
    poly_power: float = 0.9
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("at least 1", {n: getattr(self, n) >= 1 for n in ("epochs", "batch_size")})
        self._require("above 0", {n: getattr(self, n) > 0 for n in ("learning_rate", "clip_norm")})
        self._require("0 or above", {n: getattr(self, n) >= 0 for n in ("poly_power", "weight_decay", "seed")})
        self._require("at most 2147483647", {"seed": self.seed < 1 << 31})
        self._require("in [0, 1)", {n: 0.0 <= getattr(self, n) < 1.0 for n in ("warmup", "ema_decay")})

    def _require(self, expected: str, holds: dict[str, bool]) -> None:
        for name, good in holds.items():
            if not good:
                raise ConfigError(f"{self._section}: {name} is {getattr(self, name)}, expected {expected}")

    @property
    def _section(self) -> str:
        return "schedule"


def build_optimizer(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW of what wants gradients, with weight decay for matrices and kernels only; one fused kernel on a GPU."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        (plain if parameter.ndim < 2 or name.endswith(_EMBEDDINGS) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = next(network.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, learning_rate, fused=fused)


def relative_rate(progress: float, warmup: float, poly_power: float) -> float:
    """Learning rate relative to its peak at `progress` (0..1) of all steps."""
    if progress < warmup:
        return (progress + 1e-4) / warmup
    return (1.0 - (progress - warmup) / (1.0 - warmup)) ** poly_power


@torch.no_grad()
def update_average(averaged: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the current ones (exponential moving average).

    Args:
        decay: share of the average that a step keeps, in the long run.
        step: steps done before; the average follows closely at first, or it would stay near the initial weights.
    """
    decay = min(decay, (1 + step) / (10 + step))
    floats, currents = [], []
    for average, current in zip(averaged.state_dict().values(), network.state_dict().values(), strict=True):
        if average.is_floating_point():
            floats.append(average)
            currents.append(current)
        else:
            average.copy_(current)
    # One launch for all tensors on a GPU.
    torch._foreach_lerp_(floats, currents, 1.0 - decay)


def _cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it: with AVX-512's, a step takes six tenths of what it takes in float32."""
    # PyTorch before 2.10 does not say.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


class Precision:
    """Mixed precision: autocast around the forward pass, and loss scaling where float16 needs it.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        device: device that trains.

    Raises:
        ConfigError: float16 on a CPU.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        if name == "auto":
            on_gpu = device.type == "cuda"
            faster = torch.cuda.is_bf16_supported() if on_gpu else _cpu_multiplies_bfloat16()
            name = "bfloat16" if faster else "float32"
        if name == "float16" and device.type == "cpu":
            raise ConfigError("schedule: precision is float16, which needs a GPU; use bfloat16 or float32 on a CPU")
        self.name = name
        self.scaler = torch.cuda.amp.GradScaler(enabled=True) if name == "float16" else None

    def autocast(self) -> contextlib.AbstractContextManager:
        """Around forward passes."""
        if self.name == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.name))

    def step(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, network: nn.Module, clip_norm: float) -> None:
        """Backward pass, clipping and one step of the optimiser; float16 steps whose gradients overflow are skipped."""
        optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            return
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
