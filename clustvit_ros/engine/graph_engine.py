# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The engine that records a network's work once and replays it: CUDA graphs, for a GPU that waits for its host.

Three graphs make a frame, each replayed as a whole: stage A (resize, normalise, embed, blocks before the injection
point, clusterer, kept count), stage B with the decode head (one for each token capacity), and the label maps (one for
each output size and set of maps). Between A and B one number is read back, the kept count. All of them work on static
buffers, so that nothing is allocated on the device from frame to frame, and settings are values in buffers.

Recording takes a quarter of a second on a small GPU, so what is recorded is kept few: batches are padded to the next
power of two, capacities are those of the ladder, and memory bounds how many sizes are remembered.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from clustvit_ros.engine.engine import Prediction, Settings, as_batch
from clustvit_ros.engine.fallback import FaultKind, classify, first_line
from clustvit_ros.engine.labels import on_device
from clustvit_ros.engine.ladder import choose_capacity, default_ladder, rung_within
from clustvit_ros.engine.network_engine import Lap, Maps, NetworkOutput, StageTimer, cluster_map, most_exempt
from clustvit_ros.engine.pixels import device_input, normalisation
from clustvit_ros.engine.recorded_graph import CudaRecorder, EagerRecorder, Graph, Inlet, Recorder, held_bytes
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.engine.worker import RestartNeeded
from clustvit_ros.errors import EngineError
from clustvit_ros.networks.vit import grid_size_of

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

# Of the memory that recordings may take, for the label maps of one plan.
_MAPS_SHARE = 8


class CaptureError(EngineError):
    """The device cannot record a graph."""


class _Recent(OrderedDict):
    """Keeps the entries that were used last; what is forgotten frees its memory.

    Args:
        limit_bytes: memory of what is kept; the newest entry is, whatever it takes.
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self._limit_bytes = limit_bytes

    def get_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        """The entry, made first if need be."""
        if key not in self:
            self[key] = make()
            while len(self) > 1 and held_bytes(self) > self._limit_bytes:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


@dataclasses.dataclass
class _LabelMaps:
    """One set of label maps: the graph that makes them, and where they arrive in host memory."""

    graph: Graph[Maps]
    host: Maps


@dataclasses.dataclass
class _Plan:
    """Everything for images of one size and number.

    Args:
        images: (B, H, W, 3) uint8, where images enter.
        merge_threshold, confidence_threshold: () float32, settings as the graphs read them.
        exempt: (B, N) bool, tokens that are not to be merged.
        kept_host: host buffer of the kept count.
        label_maps: (output size, maps wanted) -> recording of the label maps.
        count: images at hand, at most B; the others repeat the first one.
        ahead: images that were sent before they were asked for.
        stage_a: the network's input, the state, and the kept count () int64 (None for a network that merges nothing).
        logits, cluster_ids: what every stage B leaves; the second None for a network that does not cluster.
        stage_b: token capacity -> recording of what follows the merge.
        set: what the buffers of settings hold, by name.
        constants: what the network reads in every call and would forget.
    """

    images: Inlet
    merge_threshold: Tensor
    confidence_threshold: Tensor
    exempt: Inlet
    kept_host: Tensor
    grid_size: tuple[int, int]
    label_maps: _Recent
    count: int = 1
    ahead: np.ndarray | None = None
    stage_a: Graph[tuple[Tensor, Any, Tensor | None]] = None  # type: ignore[assignment]  # recorded on the buffers
    logits: Tensor = None  # type: ignore[assignment]
    cluster_ids: Tensor | None = None
    stage_b: dict[int, Graph] = dataclasses.field(default_factory=dict)
    set: dict[str, Any] = dataclasses.field(default_factory=dict)
    constants: tuple[Tensor, ...] = ()

    @property
    def x(self) -> Tensor:
        """(B, 3, H, W), normalised: what the network gets, once stage A has been replayed."""
        return self.stage_a.outputs[0]

    def fill(self, name: str, value: float) -> None:
        """Let the graphs find a setting in its buffer; a kernel only where it is another one than before."""
        if self.set.get(name) != value:
            getattr(self, name).fill_(value)
            self.set[name] = value


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
        self._plan: _Plan | None = None
        self._fault = ""
        self.look_ahead(lambda: None)
        self._recorder: Recorder = EagerRecorder()
        if recorder is not None:
            self._recorder = recorder
        elif self._device.type == "cuda":
            self._recorder = CudaRecorder(self._device)
        else:
            self._go_eager("CUDA graphs need a CUDA GPU")
        self._plans = _Recent(self._recorder.memory_bytes)

    @property
    def fault(self) -> str:
        return self._fault

    @property
    def _records(self) -> bool:
        return type(self._recorder) is not EagerRecorder

    _prepares_capacities = _records

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Record every capacity for images of (height, width) `image_size`, with and without confidence."""
        super().warmup(image_size)
        self.segment(np.zeros((*(image_size or self._config.input.size), 3), np.uint8), Settings(confidence=False))

    def preprocess(self, batch: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Bring images to the device; the input that is returned holds them once `infer` ran."""
        padded = 1 << (len(batch) - 1).bit_length()
        shape = (padded, *batch.shape[1:])
        plan = self._plans.get_or_make((shape, size), lambda: self._make_plan(shape, size))
        self._plan, plan.count = plan, len(batch)
        ahead, plan.ahead = plan.ahead, None
        if not _same_memory(ahead, batch):
            plan.images.send(batch)
        self._recorder.receive()
        return plan.x

    def look_ahead(self, upcoming: Callable[[], np.ndarray | None]) -> None:
        self._upcoming = upcoming

    def infer(
        self, x: Tensor, settings: Settings, lap: Lap = lambda stage: None, exempt: Tensor | None = None
    ) -> NetworkOutput:
        """Run the network on what `preprocess` returned last; stages are `encode` and `finish`, with the decode head.

        The result is overwritten by the next call.
        """
        plan = self._plan
        if plan is None or x is not plan.x:
            raise EngineError("infer: got another input, expected what the latest preprocess() returned")
        tokens_total = capacity = plan.grid_size[0] * plan.grid_size[1]
        if self._network.backbone.merges:
            self._set_inputs(plan, settings, exempt)
        plan.stage_a.replay()
        self._recorder.release()
        _, state, kept = plan.stage_a.outputs
        if kept is not None:
            count, ladder = tokens_total, default_ladder(tokens_total)
            if settings.merge_threshold < 1.0:
                self._recorder.download(plan.kept_host, kept)
                self._recorder.wait()
                count = max(int(plan.kept_host), min(settings.min_tokens, tokens_total))
            ceiling = rung_within(ladder, settings.token_capacity)
            capacity = choose_capacity(ladder, count, ceiling, most_exempt(exempt))
        lap("encode")
        if capacity not in plan.stage_b:
            plan.stage_b[capacity] = self._record(self._stage_b(plan, state, capacity))
        plan.stage_b[capacity].replay()
        lap("finish")
        ids = None if plan.cluster_ids is None else plan.cluster_ids[: plan.count]
        return NetworkOutput(plan.logits[: plan.count], ids, plan.grid_size, capacity)

    def postprocess(self, output: NetworkOutput, size: tuple[int, int], settings: Settings) -> Maps:
        """Label maps in host buffers that the next call overwrites; `output` is of the latest `infer`."""
        plan = self._plan
        if plan is None or output.logits.data_ptr() != plan.logits.data_ptr():
            raise EngineError("postprocess: got the output of an earlier call, expected that of the latest infer()")
        confident = settings.confidence or settings.confidence_threshold > 0.0
        clusters = settings.clusters and plan.cluster_ids is not None
        plan.fill("confidence_threshold", settings.confidence_threshold)
        maps = plan.label_maps.get_or_make(
            (size, confident, clusters), lambda: self._make_label_maps(plan, size, confident, clusters)
        )
        maps.graph.replay()
        for host, device in zip(maps.host, maps.graph.outputs, strict=True):
            if host is not None and device is not None:
                self._recorder.download(host, device)
        self._send_ahead(settings)
        self._recorder.wait()
        mask, confidence, cluster_maps, kept = (None if t is None else t[: plan.count] for t in maps.host)
        assert mask is not None and kept is not None  # these two are always made
        return Maps(mask, confidence if settings.confidence else None, cluster_maps, kept)

    def download(self, maps: Tensor) -> np.ndarray:
        # Copied: the host buffer is the next call's.
        return np.array(maps.numpy(), dtype=np.uint8 if maps.dtype == torch.uint8 else np.uint16)

    def close(self) -> None:
        self._forget()
        self.look_ahead(lambda: None)
        super().close()

    def _segment(self, batch: np.ndarray, settings: Settings, timer: StageTimer) -> Prediction:
        try:
            with self._recorder.in_order():
                return super()._segment(batch, settings, timer)
        except CaptureError as error:
            self._check_capture(error)
            with self._recorder.in_order():
                return super()._segment(batch, settings, StageTimer(self._device))

    def _check_capture(self, error: CaptureError) -> None:
        """Go on without graphs, where the device still can.

        Raises:
            RestartNeeded: it cannot.
        """
        self._forget()
        try:
            self._recorder.check()
        except RuntimeError as problem:
            raise RestartNeeded(
                f"{error}, and left PyTorch {torch.__version__} unable to go on ({first_line(problem)}); "
                "a new process is needed"
            ) from error
        self._fault = f"{error}: frames run without graphs, which is slower"
        _LOG.warning(self._fault)
        self._go_eager(str(error))

    def _go_eager(self, reason: str) -> None:
        self._recorder = EagerRecorder()
        self.explain(f"{reason}: frames run without graphs", engine=TorchEngine.engine_name)

    def _send_ahead(self, settings: Settings) -> None:
        """Bring the images of the next call to the device while it is at this one's."""
        images = self._upcoming() if self._records else None
        if images is None:
            return
        batch = as_batch(images)
        plan = self._plans.get((batch.shape, self.input_size(batch.shape[1:3], settings.input_scale)))
        if plan is not None and not _same_memory(plan.ahead, batch):
            plan.ahead = None  # until it is under way
            plan.images.send(batch)
            plan.ahead = batch

    def _forget(self) -> None:
        self._plans.clear()
        self._plan = None

    def _record(self, work: Callable[[], T]) -> Graph[T]:
        try:
            return self._recorder.record(work)
        except RuntimeError as error:
            if classify(error) is not FaultKind.CAPTURE:
                raise
            raise CaptureError(f"{self._info.device} cannot capture CUDA graphs ({first_line(error)})") from error

    def _make_plan(self, shape: tuple[int, ...], size: tuple[int, int]) -> _Plan:
        backbone, device = self._network.backbone, self._device
        grid_size = grid_size_of(size, backbone.patch_size)
        B, N = shape[0], grid_size[0] * grid_size[1]
        plan = _Plan(
            images=Inlet(self._recorder, torch.zeros(shape, dtype=torch.uint8, device=device)),
            merge_threshold=torch.ones((), device=device), confidence_threshold=torch.zeros((), device=device),
            exempt=Inlet(self._recorder, torch.zeros(B, N, dtype=torch.bool, device=device)),
            kept_host=self._recorder.host_buffer((), torch.int64), grid_size=grid_size,
            label_maps=_Recent(self._recorder.memory_bytes // _MAPS_SHARE),
        )  # fmt: skip
        # A CPU cannot shrink images in float16.
        half = self._dtype == torch.float16 and device.type == "cuda"
        normalised = normalisation(self._config.input, device, torch.float16 if half else torch.float32)
        plan.constants = backbone.constants(grid_size)

        def stage_a() -> tuple[Tensor, Any, Tensor | None]:
            x = device_input(plan.images.target, size, *normalised)
            return x, *self.run_first(x, plan.merge_threshold, plan.exempt.target)

        plan.stage_a = self._record(stage_a)
        # Once without a graph: the head knows the shape of its logits.
        logits, ids = self.run_rest(plan.stage_a.outputs[1], N)
        plan.logits, plan.cluster_ids = logits.clone(), None if ids is None else ids.long()
        return plan

    def run_first(self, x: Tensor, merge_threshold: Tensor, exempt: Tensor) -> tuple[Any, Tensor | None]:
        """Stage A, as it is recorded: the state, and the kept count () int64 where the network merges.

        Args:
            x: (B, 3, H, W), normalised.
            merge_threshold: () float32.
            exempt: (B, N) bool, true where a token must not be merged.
        """
        backbone = self._network.backbone
        state = self.encode(x)
        if not backbone.merges:
            return state, None
        if backbone.exempts:
            state = backbone.exempt(state, exempt)
        return state, backbone.count_kept(state, merge_threshold).max()

    def run_rest(self, state: Any, capacity: int) -> tuple[Tensor, Tensor | None]:
        """Stage B, as it is recorded: class logits (B, Q, h, w), and cluster ids (B, N) where the network clusters."""
        features = self._network.backbone.finish(state, token_capacity=capacity)
        return self.decode(features), features.cluster_ids

    def _stage_b(self, plan: _Plan, state: Any, capacity: int) -> Callable[[], tuple]:
        def stage_b() -> tuple:
            logits, ids = self.run_rest(state, capacity)
            # Into buffers that all capacities share: one set of label maps serves them all.
            plan.logits.copy_(logits)
            if plan.cluster_ids is not None and ids is not None:
                plan.cluster_ids.copy_(ids)
            return ()

        return stage_b

    def _make_label_maps(self, plan: _Plan, size: tuple[int, int], confident: bool, clusters: bool) -> _LabelMaps:
        make = on_device(plan.logits, size)
        tokens_total = float(plan.grid_size[0] * plan.grid_size[1])

        def label_maps() -> Maps:
            mask, confidence = make(plan.logits, plan.confidence_threshold if confident else None)
            ids = plan.cluster_ids
            if ids is None:
                return Maps(mask, confidence, None, torch.full((len(mask),), tokens_total, device=self._device))
            cluster_maps = cluster_map(ids, plan.grid_size, size) if clusters else None
            return Maps(mask, confidence, cluster_maps, (ids == 0).sum(dim=1).float())

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
        plan.fill("merge_threshold", settings.merge_threshold)
        if exempt is not None and not self._network.backbone.exempts:
            self._network.backbone.exempt(None, plan.exempt.target)  # says that it cannot
        if exempt is not None or plan.set.get("exempt"):
            tokens = torch.zeros(plan.exempt.target.shape[1], dtype=torch.bool) if exempt is None else exempt
            plan.exempt.send(tokens.expand(plan.count, -1).numpy())
            self._recorder.receive()
            plan.set["exempt"] = exempt is not None


def _same_memory(one: np.ndarray | None, other: np.ndarray) -> bool:
    """Whether two arrays are views of the same pixels."""
    return one is not None and one.__array_interface__ == other.__array_interface__
