"""The engine that runs a network with PyTorch, eagerly, on a CPU or a CUDA GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clustvit_ros.modeling.model_folder import ModelConfig, hash_weights, load_config, load_segmenter
from clustvit_ros.modeling.segmenter import Segmenter
from clustvit_ros.modeling.vit import grid_size_of
from clustvit_ros.runtime.capacity import choose_capacity, default_ladder
from clustvit_ros.runtime.device import describe_device, select_device
from clustvit_ros.runtime.engine import Settings
from clustvit_ros.runtime.network_engine import Lap, NetworkEngine, NetworkOutput


class TorchEngine(NetworkEngine):
    """Runs a network on one device.

    Args:
        network: in evaluation mode; moved to the device.
        config: its classes and input.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; 0 leaves PyTorch's choice. Process-wide, as PyTorch has it.
        weights_sha256: of the weights file, where the network comes from one.

    Raises:
        EngineError: the device was named and does not work.
    """

    def __init__(
        self,
        network: Segmenter,
        config: ModelConfig,
        device: str = "auto",
        threads: int = 0,
        weights_sha256: str = "",
    ) -> None:
        if threads > 0:
            torch.set_num_threads(threads)
        selected, reason = select_device(device)
        super().__init__("torch", config, selected, describe_device(selected), reason, weights_sha256)
        self._network = network.to(selected).eval().requires_grad_(False)

    @classmethod
    def from_model(cls, model: str | Path, device: str = "auto", threads: int = 0) -> TorchEngine:
        """An engine for a model folder or shipped model.

        Raises:
            ModelError, ConfigError: the model cannot be loaded.
            EngineError: the device was named and does not work.
        """
        return cls(load_segmenter(model), load_config(model), device, threads, hash_weights(model))

    def infer(self, x: Tensor, settings: Settings, lap: Lap = lambda stage: None) -> NetworkOutput:
        """Run the network alone; stages are `encode`, `finish` (only where the network merges) and `decode`."""
        backbone = self._network.backbone
        state = backbone.encode(x)
        grid_size = grid_size_of((x.shape[2], x.shape[3]), backbone.patch_size)
        capacity = tokens_total = grid_size[0] * grid_size[1]
        if backbone.merges:
            # The count is one number read back from the device; nothing needs counting when nothing may be merged.
            count = settings.merge_threshold < 1.0
            kept = int(backbone.count_kept(state, settings.merge_threshold).max()) if count else tokens_total
            capacity = choose_capacity(default_ladder(tokens_total), kept, settings.token_capacity)
        lap("encode")
        features = backbone.finish(state, token_capacity=capacity)
        if backbone.merges:
            lap("finish")
        output = self._network.decode(features)
        lap("decode")
        return NetworkOutput(output.logits, output.cluster_ids, grid_size, capacity)
