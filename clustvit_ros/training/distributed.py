# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Training with several processes, as `torchrun` starts them: PyTorch's own DistributedDataParallel underneath.

The global batch is split between the processes, and what is computed over a batch (loss normalisation, batch-norm
statistics) is computed over the global one, so that the number of processes does not change the result.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clustvit_ros.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Args:
        rank: 0 validates, writes and prints.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over all processes; no gradient."""
        if self.world_size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def share(self, batch: list[T]) -> list[T]:
        """This process's part of a global batch."""
        size = len(batch) // self.world_size
        return batch[self.rank * size : (self.rank + 1) * size]

    def agree(self, value: bool) -> bool:
        """Whether any process says so."""
        if self.world_size == 1:
            return value
        # NCCL moves tensors of the GPU only.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([float(value)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def wait(self) -> None:
        """Until all have come here."""
        if self.world_size > 1:
            dist.barrier()

    def wrap(self, step: nn.Module, device: torch.device) -> nn.Module:
        """The module with gradients averaged over all processes."""
        if self.world_size == 1:
            return step
        device_ids = [device.index] if device.type == "cuda" else None
        # A step that merges nothing leaves the Regenerator without gradient.
        return DistributedDataParallel(step, device_ids=device_ids, find_unused_parameters=True)

    def synchronise_norms(self, network: nn.Module, device: torch.device) -> None:
        """Let batch norms see the global batch."""
        if self.world_size == 1:
            return
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                # PyTorch's own runs on GPUs only.
                module.__class__ = GlobalBatchNorm


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, in training; for CPUs, where SyncBatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # with gradient

        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = all_reduce((centred * centred).sum(dim=(0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            momentum = self.momentum or 0.1
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(variance.detach() * count / max(count - 1, 1), momentum)
            self.num_batches_tracked.add_(1)
        # The statistics carry gradient, so this is the whole batch norm, backward included.
        scale = self.weight / torch.sqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that `torchrun` started; alone without it.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N", as asked for.

    Yields:
        This process, and the device it should ask for: one GPU each.

    Raises:
        ConfigError: one named GPU for several processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(), device
        return
    if device.startswith("cuda:"):
        raise ConfigError(f"--device: got {device} for {world_size} processes, expected cuda (one GPU each) or cpu")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), world_size), device if on_gpu else "cpu"
    finally:
        dist.destroy_process_group()
