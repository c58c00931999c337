"""The engine that runs a network with PyTorch, eagerly, on a CPU or a CUDA GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from clustvit_ros.errors import EngineError
from clustvit_ros.modeling.clustering import count_kept, merge_scores
from clustvit_ros.modeling.clustvit import ClustViT
from clustvit_ros.modeling.model_folder import ModelConfig, load_config, load_segmenter
from clustvit_ros.modeling.segmenter import Segmenter
from clustvit_ros.modeling.vit import Features, grid_size_of
from clustvit_ros.runtime.capacity import choose_capacity, default_ladder
from clustvit_ros.runtime.device import describe_device, select_device
from clustvit_ros.runtime.engine import Engine, EngineInfo, Prediction, Settings, Stats, as_batch
from clustvit_ros.runtime.postprocess import cluster_map, label_maps
from clustvit_ros.runtime.preprocess import network_size, to_input


class TorchEngine(Engine):
    """Runs a network on one device.

    Args:
        network: in evaluation mode; moved to the device.
        config: its classes and input.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; 0 leaves PyTorch's choice. Process-wide, as PyTorch has it.

    Raises:
        EngineError: the device was named and does not work.
    """

    def __init__(self, network: Segmenter, config: ModelConfig, device: str = "auto", threads: int = 0) -> None:
        if threads > 0:
            torch.set_num_threads(threads)
        self._device, reason = select_device(device)
        self._network = network.to(self._device).eval().requires_grad_(False)
        self._config = config
        grid_size = grid_size_of(config.input.size, config.network.patch_size)
        self._info = EngineInfo(
            model=config.name,
            engine="torch",
            device=describe_device(self._device),
            device_reason=reason,
            precision="float32",
            classes=config.classes,
            input_size=config.input.size,
            tokens_total=grid_size[0] * grid_size[1],
        )

    @classmethod
    def from_model(cls, model: str | Path, device: str = "auto", threads: int = 0) -> TorchEngine:
        """An engine for a model folder or shipped model.

        Raises:
            ModelError, ConfigError: the model cannot be loaded.
            EngineError: the device was named and does not work.
        """
        return cls(load_segmenter(model), load_config(model), device, threads)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Run every capacity of the ladder once, for images of (height, width) `image_size`."""
        image = np.zeros((*(image_size or self._config.input.size), 3), np.uint8)
        tokens_total = self.segment(image).stats.tokens_total
        for capacity in default_ladder(tokens_total):
            self.segment(image, Settings(merge_threshold=1.0, token_capacity=capacity))

    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        batch = as_batch(images)
        timer = _StageTimer(self._device)
        try:
            with torch.inference_mode():
                return self._segment(batch, settings, timer)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise EngineError(f"{self._info.device} failed on an image of {batch.shape[1:3]}: {error}") from error

    def _segment(self, batch: np.ndarray, settings: Settings, timer: _StageTimer) -> Prediction:
        size = network_size(batch.shape[1:3], self._config.input.size, self._config.network.patch_size)
        x = to_input(batch, size, self._config.input, self._device)
        timer.lap("preprocess")
        features, capacity = self._features(x, settings, timer)
        output = self._network.decode(features)
        timer.lap("decode")
        output_size = settings.output_size or batch.shape[1:3]
        mask, confidence = label_maps(output.logits, output_size, settings.confidence_threshold, settings.confidence)
        clusters = None
        tokens_kept = float(capacity)
        if features.cluster_ids is not None:
            tokens_kept = float((features.cluster_ids == 0).sum(dim=1).float().mean())
            if settings.clusters:
                clusters = cluster_map(features.cluster_ids, features.grid_size, output_size).cpu().numpy()
        mask_array = mask.cpu().numpy()
        prediction_mask = mask_array if mask_array.dtype == np.uint8 else mask_array.astype(np.uint16)
        confidence_array = None if confidence is None else confidence.cpu().numpy()
        timer.lap("postprocess")
        stats = Stats(
            tokens_total=features.tokens.shape[1],
            tokens_kept=tokens_kept,
            token_capacity=capacity,
            merge_threshold=settings.merge_threshold,
            total_ms=timer.total_ms,
            stages_ms=timer.stages_ms,
        )
        return Prediction(prediction_mask, confidence_array, clusters, stats)

    def _features(self, x: torch.Tensor, settings: Settings, timer: _StageTimer) -> tuple[Features, int]:
        """Backbone features and the token capacity they were made with."""
        backbone = self._network.backbone
        if not isinstance(backbone, ClustViT):
            features = backbone(x)
            timer.lap("encode")
            return features, features.tokens.shape[1]
        state = backbone.encode(x)
        tokens_total = state.cluster_logits.shape[1]
        if settings.merge_threshold >= 1.0:
            kept = tokens_total
        else:
            kept = int(count_kept(merge_scores(state.cluster_logits), settings.merge_threshold).max())
        capacity = choose_capacity(default_ladder(tokens_total), kept, settings.token_capacity)
        timer.lap("encode")
        return backbone.finish(state, token_capacity=capacity), capacity


class _StageTimer:
    """Milliseconds by stage; on a GPU each lap waits for the device, so that a stage's time is its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._last = time.perf_counter()
        self.stages_ms: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.stages_ms[stage] = (now - self._last) * 1000.0
        self._last = now

    @property
    def total_ms(self) -> float:
        return (self._last - self._start) * 1000.0
