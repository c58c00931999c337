# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The engine that runs a network with PyTorch, eagerly, on a CPU or a CUDA GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clustvit_ros.engine.engine import Prediction, Settings, check_precision
from clustvit_ros.engine.ladder import choose_capacity, default_ladder
from clustvit_ros.engine.machine import CoreShare, CoreTeam, return_freed_memory
from clustvit_ros.engine.network_engine import (
    Lap,
    NetworkEngine,
    NetworkOutput,
    describe_device,
    has_fast_half,
    most_exempt,
    select_device,
)
from clustvit_ros.errors import ConfigError, EngineError
from clustvit_ros.networks.inference import for_inference, int8_problem, pack_layers, to_int8
from clustvit_ros.networks.model_folder import ModelConfig, hash_weights, load_config, load_segmenter
from clustvit_ros.networks.segmenter import Features, Segmenter
from clustvit_ros.networks.vit import Block, grid_size_of

_ALL_THREADS = torch.get_num_threads()  # before anybody changed it
_TEAMS = threading.local()


class TorchEngine(NetworkEngine):
    """Runs a network on one device.

    Args:
        network: copied, and the copy made ready to be run only.
        config: its classes and input.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; 0 leaves PyTorch's choice. Process-wide, as PyTorch has it.
        weights_sha256: hash of the weights file, where the network comes from one.
        precision: "auto" or one of `PRECISIONS`. Half precisions are for a GPU; a CPU without instructions for them is
            slower. "auto" is float16 on a GPU that computes in it fast, else float32, of whose products a GPU's tensor
            cores (TF32) round the factors to 10 bits. int8 is for a CPU: linear and large convolutional layers in 8-bit
            integers, all else in float32.
        compiled: run the transformer blocks through `torch.compile`, which needs a C++ compiler on a CPU and Triton on
            a GPU, and minutes at the first start.
        share_cores: compute with fewer threads while other processes use cores, and with one on each core otherwise;
            has an effect on a CPU, with `threads` 0. Results may then differ in the last bit from frame to frame.

    Raises:
        ConfigError: unknown precision, or one that the device lacks.
        EngineError: the device was named and does not work, or the blocks cannot be compiled.
    """

    engine_name = "torch"

    def __init__(
        self, network: Segmenter, config: ModelConfig, device: str = "auto", threads: int = 0, weights_sha256: str = "",
        precision: str = "float32", compiled: bool = False, share_cores: bool = False,
    ) -> None:  # fmt: skip
        check_precision(precision)
        selected, reason = select_device(device)
        if precision == "auto":
            precision = "float16" if selected.type == "cuda" and has_fast_half(selected) else "float32"
        if precision == "int8":
            _check_int8(selected, compiled)
        self._core_share: CoreShare | None = None
        if threads > 0:
            torch.set_num_threads(threads)
        elif share_cores and selected.type == "cpu":
            self._core_share = CoreShare(_ALL_THREADS)
            _use_threads(_ALL_THREADS)  # an engine before this one may have left fewer
        super().__init__(
            self.engine_name, config, selected, describe_device(selected), reason, weights_sha256, precision
        )
        self._dtype: torch.dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
        # Halved before it is moved: in float32, a large network would need twice the device's memory for a moment.
        self._network = for_inference(network, self._dtype)
        if selected.type == "cuda":
            # Sizes are few: the fastest kernel is looked for once.
            self._network.to(selected)
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if precision == "int8":
            to_int8(self._network)
        elif precision in ("float32", "bfloat16") and selected.type == "cpu" and not compiled:
            pack_layers(self._network)
        self._compiled = compiled
        if compiled:
            for module in self._network.modules():
                if isinstance(module, Block):
                    # One length of sequence for each capacity: compiled once, for all of them.
                    module.compile(dynamic=True)

    @classmethod
    def from_model(
        cls, model: str | Path, device: str = "auto", threads: int = 0, precision: str = "float32",
        compiled: bool = False, **arguments: Any,
    ) -> TorchEngine:  # fmt: skip
        """An engine for a model folder or shipped model.

        Raises:
            ModelError, ConfigError: the model cannot be loaded, or the precision is unknown or not to be had.
            EngineError: the device was named and does not work.
        """
        config, weights_sha256 = load_config(model), hash_weights(model)
        if arguments.get("share_cores"):
            _team()  # before the network is made, which computes
        # The network as it was loaded is not kept: the engine has its own copy.
        engine = cls(load_segmenter(model), config, device, threads, weights_sha256, precision, compiled, **arguments)
        return_freed_memory()
        return engine

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """As every engine's.

        Raises:
            EngineError: the blocks cannot be compiled.
        """
        try:
            super().warmup(image_size)
        except Exception as error:
            if not self._compiled or isinstance(error, EngineError):
                raise
            problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise EngineError(f"torch.compile failed ({problem}); leave compilation off") from error

    @property
    def _prepares_capacities(self) -> bool:
        return self._compiled or super()._prepares_capacities

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """All that PyTorch takes, half of them and one, where cores are shared; else what was asked for."""
        if self._core_share is None:
            return (0,)
        return tuple(sorted({_ALL_THREADS, max(_ALL_THREADS // 2, 1), 1}, reverse=True))

    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        if self._core_share is None:
            return super().segment(images, settings)
        threads = settings.threads or self._core_share.threads()
        if threads != torch.get_num_threads():
            _use_threads(threads)
        with _team().in_place():
            return super().segment(images, settings)

    def close(self) -> None:
        """Forget the network, which gives its memory back."""
        del self._network
        super().close()

    def infer(
        self, x: Tensor, settings: Settings, lap: Lap = lambda stage: None, exempt: Tensor | None = None
    ) -> NetworkOutput:
        """Run the network alone; stages are `encode`, `finish` (only where the network merges) and `decode`."""
        backbone = self._network.backbone
        state = self.encode(x)
        grid_size = grid_size_of((x.shape[2], x.shape[3]), backbone.patch_size)
        capacity = tokens_total = grid_size[0] * grid_size[1]
        if backbone.merges:
            if exempt is not None:
                state = backbone.exempt(state, exempt.to(x.device))
            # The count is one number read back from the device; nothing needs counting when nothing may be merged.
            count = settings.merge_threshold < 1.0
            kept = int(backbone.count_kept(state, settings.merge_threshold).max()) if count else tokens_total
            kept = max(kept, min(settings.min_tokens, tokens_total))
            capacity = choose_capacity(default_ladder(tokens_total), kept, settings.token_capacity, most_exempt(exempt))
        lap("encode")
        features = backbone.finish(state, token_capacity=capacity)
        if backbone.merges:
            lap("finish")
        logits = self.decode(features)
        lap("decode")
        return NetworkOutput(logits, features.cluster_ids, grid_size, capacity)

    def encode(self, x: Tensor) -> Any:
        """Normalised images (B, 3, H, W) to the backbone's state."""
        return self._network.backbone.encode(x.to(self._dtype))

    def decode(self, features: Features) -> Tensor:
        """Features to class logits (B, Q, h, w), as precise as the network has them."""
        return self._network.decode(features).logits


def _team() -> CoreTeam:
    """The calling thread's."""
    if not hasattr(_TEAMS, "own"):
        _TEAMS.own = CoreTeam(_compute, torch.get_num_threads())
    return _TEAMS.own


def _use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    _team().resize(threads)


def _compute(threads: int) -> Tensor:
    return torch.zeros(threads << 16, dtype=torch.uint8).add_(1)  # a part of 2^15 elements or more for each thread


def _check_int8(device: torch.device, compiled: bool) -> None:
    if compiled:
        raise ConfigError("compiled: torch.compile cannot take int8's layers; leave compilation off, or use float32")
    if device.type != "cpu":
        raise ConfigError(f"precision: got int8 on {describe_device(device)}, it is for a CPU; use float16 on a GPU")
    problem = int8_problem()
    if problem:
        raise ConfigError(f"precision: got int8, but {problem}; use float32")
