# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The engine that records a network's work once and replays it: CUDA graphs, for a GPU that waits for its host.

Four kinds of graphs, each replayed as a whole: the input (resize, normalise), stage A (embed, blocks before the
injection point, clusterer, kept count), stage B with the decode head (one for each token capacity), and the label maps
(one for each output size and set of maps). Between A and B one number is read back, the kept count. All of them work on
static buffers, so that nothing is allocated on the device from frame to frame, and settings are values in buffers.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from clustvit_ros.engine.engine import Prediction, Settings
from clustvit_ros.engine.labels import cluster_map, static_label_maps, upsampling
from clustvit_ros.engine.ladder import choose_capacity, default_ladder
from clustvit_ros.engine.network_engine import Lap, Maps, NetworkOutput, StageTimer, most_exempt
from clustvit_ros.engine.pixels import device_input
from clustvit_ros.engine.recorded_graph import CudaRecorder, EagerRecorder, Graph, Recorder
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import EngineError
from clustvit_ros.networks.vit import grid_size_of

T = TypeVar("T")

# Of each kind; a ladder has eight capacities, and a camera as many sizes as the ladder of input sizes has.
_MOST_GRAPHS = 16
_MOST_SIZES = 16


class CaptureError(EngineError):
    """The device cannot record a graph."""


class _Recent(OrderedDict):
    """Keeps the entries that were used last; what is forgotten frees its memory.

    Args:
        size: entries that are kept.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def get_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        """The entry, made first if need be."""
        if key not in self:
            value = make()
            while len(self) >= self._size:
                self.popitem(last=False)
            self[key] = value
        self.move_to_end(key)
        return self[key]


class _Source(NamedTuple):
    """Where camera images of one size enter, and how they become the network's input."""

    host: Tensor
    device: Tensor
    graph: Graph[Tensor]


class _LabelMaps(NamedTuple):
    """One set of label maps: the graph that makes them, and where they arrive in host memory."""

    graph: Graph[Maps]
    host: Maps


@dataclasses.dataclass
class _Plan:
    """Everything for one shape of the network's input.

    Args:
        x: (B, 3, H, W) float32, the input.
        merge_threshold, confidence_threshold: () float32, settings as the graphs read them.
        exempt: (B, N) bool, tokens that are not to be merged.
        exempt_host, kept_host: host buffers of `exempt` and the kept count.
        stage_a: the state, and the kept count () int64 (None for a network that merges nothing).
        logits, cluster_ids: what every stage B leaves; the second None for a network that does not cluster.
        stage_b: token capacity -> recording of what follows the merge.
        label_maps: (output size, maps wanted) -> recording of the label maps.
    """

    x: Tensor
    merge_threshold: Tensor
    confidence_threshold: Tensor
    exempt: Tensor
    exempt_host: Tensor
    kept_host: Tensor
    grid_size: tuple[int, int]
    stage_a: Graph[tuple[Any, Tensor | None]] = None  # type: ignore[assignment]  # recorded on the buffers above
    logits: Tensor = None  # type: ignore[assignment]
    cluster_ids: Tensor | None = None
    any_exempt: bool = False
    stage_b: _Recent = dataclasses.field(default_factory=lambda: _Recent(_MOST_GRAPHS))
    label_maps: _Recent = dataclasses.field(default_factory=lambda: _Recent(_MOST_GRAPHS))


class GraphEngine(TorchEngine):
    """Runs a network as recorded graphs.

    Where the device cannot capture them (a CPU; an operation that PyTorch cannot record), the same work is called
    again for each frame; `info.engine` then is `torch`, and `info.device_reason` says why.

    Args:
        arguments: as in `TorchEngine`.
        recorder: how graphs are recorded; None takes CUDA graphs on a GPU.
    """

    engine_name = "cuda_graph"

    def __init__(self, *arguments: Any, recorder: Recorder | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sources, self._plans = _Recent(_MOST_SIZES), _Recent(_MOST_SIZES)
        self._plan: _Plan | None = None
        self._recorder: Recorder = EagerRecorder()
        self._eager = False
        if recorder is not None:
            self._recorder = recorder
        elif self._device.type == "cuda":
            self._recorder = CudaRecorder(self._device)
        else:
            self._go_eager("CUDA graphs need a CUDA GPU")

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Record every capacity for images of (height, width) `image_size`, with and without confidence."""
        super().warmup(image_size)
        self.segment(np.zeros((*(image_size or self._config.input.size), 3), np.uint8), Settings(confidence=False))

    def preprocess(self, batch: np.ndarray, size: tuple[int, int]) -> Tensor:
        with self._recorder.in_order():
            source = self._sources.get_or_make((batch.shape, size), lambda: self._make_source(batch.shape, size))
            source.host.numpy()[:] = batch
            self._recorder.upload(source.device, source.host)
            source.graph.replay()
        return source.graph.outputs

    def infer(
        self, x: Tensor, settings: Settings, lap: Lap = lambda stage: None, exempt: Tensor | None = None
    ) -> NetworkOutput:
        """Run the network alone; stages are `encode` and `finish`, which holds the decode head as well.

        The result is overwritten by the next call.
        """
        with self._recorder.in_order():
            plan = self._plans.get_or_make(tuple(x.shape), lambda: self._make_plan(x))
            self._plan = plan
            plan.x.copy_(x)
            tokens_total = capacity = plan.grid_size[0] * plan.grid_size[1]
            if self._network.backbone.merges:
                self._set_inputs(plan, settings, exempt)
            plan.stage_a.replay()
            state, kept = plan.stage_a.outputs
            if kept is not None:
                count = tokens_total
                if settings.merge_threshold < 1.0:
                    self._recorder.download(plan.kept_host, kept)
                    self._recorder.wait()
                    count = max(int(plan.kept_host), min(settings.min_tokens, tokens_total))
                capacity = choose_capacity(
                    default_ladder(tokens_total), count, settings.token_capacity, most_exempt(exempt)
                )
            lap("encode")
            stage_b = plan.stage_b.get_or_make(capacity, lambda: self._record(self._stage_b(plan, state, capacity)))
            stage_b.replay()
            lap("finish")
        return NetworkOutput(plan.logits, plan.cluster_ids, plan.grid_size, capacity)

    def postprocess(self, output: NetworkOutput, size: tuple[int, int], settings: Settings) -> Maps:
        """Label maps in host buffers that the next call overwrites; `output` is of the latest `infer`."""
        plan = self._plan
        if plan is None or output.logits is not plan.logits:
            raise EngineError("postprocess: got the output of an earlier call, expected that of the latest infer()")
        confident = settings.confidence or settings.confidence_threshold > 0.0
        clusters = settings.clusters and plan.cluster_ids is not None
        with self._recorder.in_order():
            plan.confidence_threshold.fill_(settings.confidence_threshold)
            maps = plan.label_maps.get_or_make(
                (size, confident, clusters), lambda: self._make_label_maps(plan, size, confident, clusters)
            )
            maps.graph.replay()
            for host, device in zip(maps.host, maps.graph.outputs, strict=True):
                if host is not None and device is not None:
                    self._recorder.download(host, device)
            self._recorder.wait()
        return maps.host._replace(confidence=maps.host.confidence if settings.confidence else None)

    def download(self, maps: Tensor) -> np.ndarray:
        # Copied: the host buffer is the next call's.
        return np.array(maps.numpy(), dtype=np.uint8 if maps.dtype == torch.uint8 else np.uint16)

    def close(self) -> None:
        self._forget()

    def _segment(self, batch: np.ndarray, settings: Settings, timer: StageTimer) -> Prediction:
        try:
            return super()._segment(batch, settings, timer)
        except CaptureError as error:
            self._forget()
            self._go_eager(str(error))
            return super()._segment(batch, settings, timer)

    def _go_eager(self, reason: str) -> None:
        self._recorder, self._eager = EagerRecorder(), True
        told = "; ".join(filter(None, (self._info.device_reason, f"{reason}: frames run without graphs")))
        self._info = dataclasses.replace(self._info, engine=TorchEngine.engine_name, device_reason=told)

    def _forget(self) -> None:
        self._sources.clear()
        self._plans.clear()
        self._plan = None

    def _record(self, work: Callable[[], T]) -> Graph[T]:
        try:
            return self._recorder.record(work)
        except RuntimeError as error:
            if self._eager:
                raise
            problem = str(error).strip().splitlines()[0]
            raise CaptureError(f"{self._info.device} cannot capture CUDA graphs ({problem})") from error

    def _make_source(self, shape: tuple[int, ...], size: tuple[int, int]) -> _Source:
        host = self._recorder.host_buffer(shape, torch.uint8)
        device = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        mean, std = (
            torch.tensor(values, device=self._device).view(1, 3, 1, 1)
            for values in (self._config.input.mean, self._config.input.std)
        )
        return _Source(host, device, self._record(lambda: device_input(device, size, mean, std)))

    def _make_plan(self, x: Tensor) -> _Plan:
        backbone = self._network.backbone
        grid_size = grid_size_of((x.shape[2], x.shape[3]), backbone.patch_size)
        B, N = x.shape[0], grid_size[0] * grid_size[1]
        plan = _Plan(
            x=torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x),
            merge_threshold=torch.ones((), device=x.device), confidence_threshold=torch.zeros((), device=x.device),
            exempt=torch.zeros(B, N, dtype=torch.bool, device=x.device),
            exempt_host=self._recorder.host_buffer((B, N), torch.bool),
            kept_host=self._recorder.host_buffer((), torch.int64), grid_size=grid_size,
        )  # fmt: skip

        def stage_a() -> tuple[Any, Tensor | None]:
            state = self.encode(plan.x)
            if not backbone.merges:
                return state, None
            if backbone.exempts:
                state = backbone.exempt(state, plan.exempt)
            return state, backbone.count_kept(state, plan.merge_threshold).max()

        plan.stage_a = self._record(stage_a)
        # Once without a graph: the head knows the shape of its logits.
        features = backbone.finish(plan.stage_a.outputs[0], token_capacity=N)
        plan.logits = self.decode(features)
        plan.cluster_ids = None if features.cluster_ids is None else features.cluster_ids.clone()
        return plan

    def _stage_b(self, plan: _Plan, state: Any, capacity: int) -> Callable[[], tuple]:
        def stage_b() -> tuple:
            features = self._network.backbone.finish(state, token_capacity=capacity)
            # Into buffers that all capacities share: one set of label maps serves them all.
            plan.logits.copy_(self.decode(features))
            if plan.cluster_ids is not None and features.cluster_ids is not None:
                plan.cluster_ids.copy_(features.cluster_ids)
            return ()

        return stage_b

    def _make_label_maps(self, plan: _Plan, size: tuple[int, int], confident: bool, clusters: bool) -> _LabelMaps:
        how = upsampling((plan.logits.shape[2], plan.logits.shape[3]), size, self._device)
        tokens_total = float(plan.grid_size[0] * plan.grid_size[1])

        def label_maps() -> Maps:
            mask, confidence = static_label_maps(plan.logits, how, plan.confidence_threshold if confident else None)
            ids = plan.cluster_ids
            if ids is None:
                return Maps(mask, confidence, None, torch.full((), tokens_total, device=self._device))
            cluster_maps = cluster_map(ids, plan.grid_size, size) if clusters else None
            return Maps(mask, confidence, cluster_maps, (ids == 0).sum(dim=1).float().mean())

        graph = self._record(label_maps)
        found = graph.outputs
        host = Maps(
            self._host_buffer_like(found.mask),
            None if found.confidence is None else self._host_buffer_like(found.confidence),
            None if found.clusters is None else self._host_buffer_like(found.clusters),
            self._host_buffer_like(found.tokens_kept),
        )
        return _LabelMaps(graph, host)

    def _host_buffer_like(self, tensor: Tensor) -> Tensor:
        return self._recorder.host_buffer(tuple(tensor.shape), tensor.dtype)

    def _set_inputs(self, plan: _Plan, settings: Settings, exempt: Tensor | None) -> None:
        plan.merge_threshold.fill_(settings.merge_threshold)
        if exempt is not None and not self._network.backbone.exempts:
            self._network.backbone.exempt(None, plan.exempt)  # says that it cannot
        if exempt is not None or plan.any_exempt:
            plan.exempt_host.copy_(torch.zeros((), dtype=torch.bool) if exempt is None else exempt)
            self._recorder.upload(plan.exempt, plan.exempt_host)
            plan.any_exempt = exempt is not None
