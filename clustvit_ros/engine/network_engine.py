# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What all engines that run a network share: a device, and image in, normalised input, class logits, label maps out."""

from __future__ import annotations

import abc
import dataclasses
import math
import platform
import re
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.engine.engine import Accuracy, Engine, EngineInfo, Prediction, Settings, Stats, as_batch
from clustvit_ros.engine.exemption import exempt_tokens
from clustvit_ros.engine.labels import label_maps
from clustvit_ros.engine.ladder import INPUT_SCALES, default_ladder, scaled_size
from clustvit_ros.engine.machine import available_bytes, keep_freed_memory
from clustvit_ros.engine.pixels import network_size, to_input
from clustvit_ros.errors import ConfigError, EngineError
from clustvit_ros.networks.model_folder import MeasuredPoint, ModelConfig, hash_model
from clustvit_ros.networks.vit import grid_size_of


def select_device(name: str) -> tuple[torch.device, str]:
    """Resolve a device name.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        The device, and for "auto" the reason for it (else an empty text).

    Raises:
        ConfigError: not such a name.
        EngineError: a GPU was named and does not work.
    """
    if name == "cpu":
        return torch.device("cpu"), ""
    if not re.fullmatch(r"auto|cuda(:\d+)?", name):
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    problem = _gpu_problem("cuda" if name == "auto" else name)
    if not problem:
        return torch.device("cuda" if name == "auto" else name), "a CUDA kernel ran" if name == "auto" else ""
    if name == "auto":
        return torch.device("cpu"), problem
    raise EngineError(f"device {name!r} cannot be used: {problem}; set device to cpu or auto")


def describe_device(device: torch.device) -> str:
    """A device with its hardware's name, e.g. "cuda:0 (Orin)"."""
    if device.type == "cuda":
        return f"cuda:{device.index or 0} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def has_fast_half(device: torch.device) -> bool:
    """Whether a GPU computes in float16 faster than in float32: from Volta on, which has tensor cores."""
    return torch.cuda.get_device_capability(device) >= (7, 0)


def _gpu_problem(name: str) -> str:
    """Why a CUDA device does not work; empty when a kernel ran on it."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return f"PyTorch (built for CUDA {built}) finds no GPU" if built else "this PyTorch is built without CUDA"
    try:
        if float(torch.ones(8, device=name).sum()) == 8.0:
            return ""
        return "a test kernel gave a wrong result"
    except (RuntimeError, AssertionError) as error:
        return f"a test kernel failed ({str(error).splitlines()[0]})"


# Measured at 1024x1024: 83 to 140 with the shipped models. Below a megapixel or two, other buffers are what counts.
_BYTES_PER_PIXEL, _LEAST_BYTES = 144, 256_000_000


def frame_bytes(config: ModelConfig) -> int:
    """About the memory that a frame of a model's full input takes while it is segmented."""
    return max(_BYTES_PER_PIXEL * config.input.size[0] * config.input.size[1], _LEAST_BYTES)


def check_memory(config: ModelConfig, device: torch.device) -> None:
    """Refuse a model whose frames would not fit, before anything of their size is made.

    Raises:
        ConfigError: how much it takes and how much there is.
    """
    needed, free = frame_bytes(config), available_bytes()
    if device.type == "cuda" and torch.cuda.is_available():  # else another library's GPU, of which torch knows nothing
        free = torch.cuda.mem_get_info(device)[0]
    if needed > _LEAST_BYTES and free is not None and needed > free:
        raise ConfigError(
            "model {}: a frame at its input of {}x{} px takes about ".format(config.name, *config.input.size)
            + f"{needed / 1e6:.0f} MB of memory, {free / 1e6:.0f} MB are free; state a smaller input size in model.yaml"
        )


def _accuracy_of(point: MeasuredPoint, config: ModelConfig) -> Accuracy:
    """A measured point by shares, which hold for images of any size."""
    full, patch_size = config.input.size, config.network.patch_size
    rungs = (scale for scale in reversed(INPUT_SCALES) if scaled_size(full, scale, patch_size) == point.size)
    scale = next(rungs, math.sqrt(point.size[0] * point.size[1] / (full[0] * full[1])))
    rows, columns = grid_size_of(point.size, patch_size)
    return Accuracy(scale, point.capacity / (rows * columns), point.miou)


Lap = Callable[[str], None]
"""Called at the end of each stage with its name."""

# Names that not every PyTorch since 2.1 has.
_DEVICE_ERRORS = (
    torch.cuda.OutOfMemoryError,
    *(getattr(torch, name) for name in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, name)),
)


class NetworkOutput(NamedTuple):
    """What a network made of a batch, on the engine's device.

    Attributes:
        logits: (B, Q, h, w) float, class logits per patch.
        cluster_ids: (B, N) int64, 0 = kept; None for a network that does not cluster.
        grid_size: (h, w) patches.
        token_capacity: slots that were available to kept tokens.
    """

    logits: Tensor
    cluster_ids: Tensor | None
    grid_size: tuple[int, int]
    token_capacity: int


class Maps(NamedTuple):
    """Label maps of a batch, on the engine's device.

    Attributes:
        mask: (B, H, W) uint8 (int32 above 255 classes).
        confidence: (B, H, W) uint8; None when not asked for.
        clusters: (B, H, W) uint8; None when not asked for or without clusters.
        tokens_kept: (B,) float.
    """

    mask: Tensor
    confidence: Tensor | None
    clusters: Tensor | None
    tokens_kept: Tensor


class NetworkEngine(Engine):
    """An engine around a network; what runs the network is the subclass's.

    Args:
        engine: the implementation's name.
        config: the model's classes and input.
        device: device that holds input and output of the network, and runs pre- and post-processing.
        device_name: the same for people.
        device_reason: why this device, when it was chosen automatically; else empty.
        weights_sha256: hash of the model's weights file; empty for a network that comes from none.
        precision: one of `PRECISIONS`, what the network computes in.

    Raises:
        ConfigError: a frame takes more memory than there is.
    """

    def __init__(
        self, engine: str, config: ModelConfig, device: torch.device, device_name: str, device_reason: str,
        weights_sha256: str = "", precision: str = "float32",
    ) -> None:  # fmt: skip
        check_memory(config, device)
        keep_freed_memory()
        self._config = config
        self._device = device
        self._warm_sizes: set[tuple[int, int]] = set()
        grid_size = grid_size_of(config.input.size, config.network.patch_size)
        self._info = EngineInfo(
            model=config.name, engine=engine, device=device_name, device_reason=device_reason, precision=precision,
            classes=config.classes, input_size=config.input.size, tokens_total=grid_size[0] * grid_size[1],
            weights_sha256=weights_sha256, model_sha256=hash_model(config, weights_sha256),
            accuracies=tuple(_accuracy_of(point, config) for point in config.operating_points),
            merges=config.network.merges,
        )  # fmt: skip

    @abc.abstractmethod
    def infer(
        self, x: Tensor, settings: Settings, lap: Lap = lambda stage: None, exempt: Tensor | None = None
    ) -> NetworkOutput:
        """Run the network alone.

        Args:
            x: (B, 3, H, W) float32, normalised, on the engine's device.
            settings: threshold and capacity are used.
            lap: called after each of the stages that this engine can tell apart.
            exempt: (N,) or (B, N) bool in host memory, true where a token must not be merged; None exempts none. They
                come before the token capacity.

        Raises:
            EngineError: the device failed.
        """

    def preprocess(self, batch: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Resize and normalise: (B, H, W, 3) uint8 -> (B, 3, *size) float32 on the engine's device."""
        return to_input(batch, size, self._config.input, self._device)

    def postprocess(self, output: NetworkOutput, size: tuple[int, int], settings: Settings) -> Maps:
        """Label maps of (height, width) `size`; maps that the settings do not ask for are left out."""
        mask, confidence = label_maps(output.logits, size, settings.confidence_threshold, settings.confidence)
        ids = output.cluster_ids
        if ids is None:
            tokens_total = output.grid_size[0] * output.grid_size[1]
            return Maps(mask, confidence, None, torch.full((len(mask),), float(tokens_total)))
        clusters = cluster_map(ids, output.grid_size, size) if settings.clusters else None
        return Maps(mask, confidence, clusters, (ids == 0).sum(dim=1).float())

    def download(self, maps: Tensor) -> np.ndarray:
        """Maps in host memory, in an array that is the caller's own."""
        array = maps.cpu().numpy()
        return array if array.dtype == np.uint8 else array.astype(np.uint16)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def explain(self, reason: str, **changed: Any) -> None:
        """Add why it runs as it does to what it tells of itself, with what else that changes there."""
        told = "; ".join(filter(None, (self._info.device_reason, reason)))
        self._info = dataclasses.replace(self._info, device_reason=told, **changed)

    @property
    def device(self) -> torch.device:
        """Where `infer` takes its input and leaves its output."""
        return self._device

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Run every capacity once, for images of (height, width) `image_size`; on a CPU, the largest.

        A CPU has nothing to make ready for a capacity: first frames took as long as later ones, to a few milliseconds.
        """
        size = image_size or self._config.input.size
        image = np.zeros((*size, 3), np.uint8)
        self.segment(image)
        # Cameras of one aspect end in one network size: once is enough, and a node waits for this.
        warm = self.input_size(size)
        if warm in self._warm_sizes:
            return
        self._warm_sizes.add(warm)
        capacities = self.capacities(size)
        for capacity in capacities if self._prepares_capacities else capacities[-1:]:
            self.segment(image, Settings(merge_threshold=1.0, token_capacity=capacity))

    @property
    def _prepares_capacities(self) -> bool:
        """Whether the first call with a capacity makes what later ones need."""
        return self._device.type != "cpu"

    def input_size(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, int]:
        patch_size = self._config.network.patch_size
        return scaled_size(network_size(image_size, self._config.input.size, patch_size), input_scale, patch_size)

    def capacities(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, ...]:
        """The ladder for images of (height, width) `image_size`; a network that does not merge keeps all tokens."""
        grid_size = grid_size_of(self.input_size(image_size, input_scale), self._config.network.patch_size)
        tokens_total = grid_size[0] * grid_size[1]
        return default_ladder(tokens_total) if self._config.network.merges else (tokens_total,)

    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        batch = as_batch(images)
        timer = StageTimer(self._device)
        try:
            with torch.inference_mode():
                return self._segment(batch, settings, timer)
        except _DEVICE_ERRORS as error:
            raise EngineError(f"{self._info.device} failed on an image of {batch.shape[1:3]}: {error}") from error

    def _segment(self, batch: np.ndarray, settings: Settings, timer: StageTimer) -> Prediction:
        size = self.input_size(batch.shape[1:3], settings.input_scale)
        x = self.preprocess(batch, size)
        timer.lap("preprocess")
        exempt = self._exempt(x, settings, timer.lap)
        output = self.infer(x, settings, timer.lap, exempt)
        maps = self.postprocess(output, settings.output_size or batch.shape[1:3], settings)
        mask = self.download(maps.mask)
        confidence = None if maps.confidence is None else self.download(maps.confidence)
        clusters = None if maps.clusters is None else self.download(maps.clusters)
        class_grid = self.download(_class_grid(output.logits)) if settings.looks_back else None
        tokens_kept = float(maps.tokens_kept.mean())
        timer.finish("postprocess")
        stats = Stats(
            tokens_total=output.grid_size[0] * output.grid_size[1], tokens_kept=tokens_kept,
            token_capacity=output.token_capacity, merge_threshold=settings.merge_threshold, total_ms=timer.total_ms,
            stages_ms=timer.stages_ms, tokens_exempt=most_exempt(exempt),
            threads=torch.get_num_threads() if self._device.type == "cpu" else 0, input_size=size,
            input_scale=settings.input_scale,
        )  # fmt: skip
        return Prediction(mask, confidence, clusters, stats, class_grid)

    def _exempt(self, x: Tensor, settings: Settings, lap: Lap) -> Tensor | None:
        """Tokens that must not be merged, as `infer` takes them."""
        classes = settings.merge_exempt_classes
        if not (settings.merge_exempt_region or classes) or not self._config.network.merges:
            return None
        grid_size = grid_size_of((x.shape[2], x.shape[3]), self._config.network.patch_size)
        masks = settings.previous_mask
        if classes and settings.merge_exempt_source == "two_pass":
            masks = self.download(_class_grid(self.infer(x, settings).logits))
            lap("first_pass")
        tokens = exempt_tokens(grid_size, settings.merge_exempt_region, masks, classes)
        return None if tokens is None else torch.from_numpy(tokens)


def _class_grid(logits: Tensor) -> Tensor:
    """The winning class of each cell: (B, Q, h, w) -> (B, h, w), uint8 where that holds all classes."""
    return logits.argmax(dim=1).to(torch.uint8 if logits.shape[1] <= IGNORE_INDEX else torch.int32)


def most_exempt(exempt: Tensor | None) -> int:
    """Exempt tokens of the image that has the most: (N,) or (B, N) bool in host memory."""
    return 0 if exempt is None else int(exempt.sum(dim=-1).max())


class StageTimer:
    """Milliseconds by stage: on a GPU by events on the stream that computes, which nothing waits for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start_s = time.perf_counter()
        self._marks = [self._mark()]
        self._names: list[str] = []
        self.stages_ms: dict[str, float] = {}
        self.total_ms = 0.0

    def lap(self, stage: str) -> None:
        """End a stage; the next one begins."""
        self._marks.append(self._mark())
        self._names.append(stage)

    def finish(self, stage: str) -> None:
        """End the last stage, after everything before it has been waited for, and sum up."""
        self.total_ms = (time.perf_counter() - self._start_s) * 1000.0
        for name, (begin, end) in zip(self._names, pairwise(self._marks), strict=True):
            self.stages_ms[name] = begin.elapsed_time(end) if self._device.type == "cuda" else (end - begin) * 1000.0
        self.stages_ms[stage] = max(self.total_ms - sum(self.stages_ms.values()), 0.0)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def cluster_map(cluster_ids: Tensor, grid_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cluster id per pixel, nearest: (B, N) int64 -> (B, H, W) uint8, 0 = kept; ids above 255 begin at 1 again."""
    grid = torch.where(cluster_ids > 255, (cluster_ids - 1) % 255 + 1, cluster_ids)
    grid = grid.to(torch.uint8).unflatten(1, grid_size)
    rows = torch.arange(size[0], device=grid.device) * grid_size[0] // size[0]
    columns = torch.arange(size[1], device=grid.device) * grid_size[1] // size[1]
    return grid.index_select(2, columns).index_select(1, rows)  # small maps first; a tenth of indexing's time on a CPU
