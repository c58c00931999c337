# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Exporting a model as one ONNX file whose merge threshold and token capacity are inputs of the call.

The file takes normalised images, not uint8: resizing comes before normalisation and is the engine's work either way, so
an engine has the float tensor at hand, on its device, and all engines share one preprocessing. The numbers that
normalise are in the metadata.

The exporter is PyTorch's TorchScript-based one, which records a tensor-valued slice as it is. `torch.export` refuses
attention over a sequence whose length is computed from data, and PyTorch has had it only since 2.5.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.onnx import symbolic_helper

from clustvit_ros import __version__
from clustvit_ros.engine.ladder import default_ladder
from clustvit_ros.engine.onnx_session import check_against_torch, check_images, fold_and_check
from clustvit_ros.engine.recorded_graph import rebuilt, tensors_of
from clustvit_ros.errors import ConfigError, EngineError
from clustvit_ros.networks.inference import for_inference
from clustvit_ros.networks.model_folder import ModelConfig, hash_weights, load_config, load_segmenter
from clustvit_ros.networks.segmenter import Segmenter
from clustvit_ros.networks.vit import grid_size_of
from clustvit_ros.paths import replacing

FORMAT = "1"
INPUT_NAMES = ("images", "merge_threshold", "token_capacity")
EXEMPT_NAME = "exempt"
"""A fourth input, (N,) bool: tokens that must not be merged. Whoever leaves it out exempts none."""
OUTPUT_NAMES = ("logits", "cluster_ids", "capacity")
# LayerNormalization appeared in 17; onnxruntime 1.17 and TensorRT 8.6 (JetPack 6) both read it.
_OPSET = 17
_MOST_SORTED = 3840  # TensorRT's TopK


class Export(NamedTuple):
    """A finished export.

    Attributes:
        path: the file.
        max_difference: largest difference between its logits and PyTorch's that the check found; of the nine tenths
            that agree best where near ties may be decided either way.
        metadata: what the file says about itself.
    """

    path: Path
    max_difference: float
    metadata: dict[str, str]


class CapacitySegmenter(nn.Module):
    """A segmenter whose threshold and capacity are tensors, and which chooses the rung of the ladder by itself.

    It knows no architecture: what merges, and how, is the backbone's.

    Args:
        network: network in evaluation mode.
        tokens_total: N, patch tokens of the images it will get.
    """

    ladder: Tensor

    def __init__(self, network: Segmenter, tokens_total: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("ladder", torch.tensor(default_ladder(tokens_total)), persistent=False)

    def forward(
        self, images: Tensor, merge_threshold: Tensor, token_capacity: Tensor, exempt: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Segment normalised images.

        Args:
            images: (B, 3, H, W) float32, normalised.
            merge_threshold: () float32 in 0..1.
            token_capacity: () int64, upper bound on kept tokens; 0 is none.
            exempt: (N,) bool, tokens that are kept, before the upper bound; of networks that can do so.

        Returns:
            logits: (B, Q, h, w) float32.
            cluster_ids: (B, N) int64, 0 = kept; all 0 for a network that does not merge.
            capacity: () int64, tokens kept per image.
        """
        backbone = self.network.backbone
        state = backbone.encode(images)
        if not backbone.merges:
            # The unused inputs take part, so that one signature serves all architectures.
            capacity = self.ladder[-1] + 0 * token_capacity + (0 * merge_threshold).long()
            features = backbone.finish(state)
        else:
            if exempt is not None:
                state = backbone.exempt(state, exempt)
            capacity = self._capacity(backbone.count_kept(state, merge_threshold).max(), token_capacity, exempt)
            features = backbone.finish(state, token_capacity=capacity)
        ids = features.cluster_ids
        if ids is None:
            ids = images.new_zeros((images.shape[0], features.grid_size[0] * features.grid_size[1]), dtype=torch.int64)
        return self.network.decode(features).logits, ids, capacity

    def _capacity(self, kept: Tensor, token_capacity: Tensor, exempt: Tensor | None) -> Tensor:
        """`choose_capacity` as tensor operations: () int64, all of them, -> () int64."""
        rung = self._rung(kept)
        bounded = torch.where(token_capacity > 0, torch.minimum(rung, token_capacity), rung)
        if exempt is None:
            return bounded
        count = exempt.sum()
        return torch.where(bounded >= count, bounded, self._rung(count))

    def _rung(self, tokens: Tensor) -> Tensor:
        return torch.where(self.ladder >= tokens, self.ladder, self.ladder[-1]).min()


def describe_export(
    config: ModelConfig, weights_sha256: str, size: tuple[int, int], batch: int | None
) -> dict[str, str]:
    """The metadata of an export: everything that decides its content.

    Args:
        config: the model's.
        weights_sha256: hash of the model's safetensors file.
        size: (height, width) of the network's input.
        batch: fixed batch size; None is dynamic.

    Returns:
        Texts by name; what is not text is JSON.
    """
    classes = zip(config.classes.names, config.classes.colours, strict=True)
    grid_size = grid_size_of(size, config.network.patch_size)
    values: dict[str, Any] = {
        "classes": [{"name": name, "colour": colour} for name, colour in classes],
        "normalisation": {"channels": "RGB", "range": [0, 255], "mean": config.input.mean, "std": config.input.std},
        "input_size": size, "batch": batch or "dynamic", "patch_size": config.network.patch_size,
        "capacity_ladder": default_ladder(grid_size[0] * grid_size[1]), "network": dataclasses.asdict(config.network),
        "temperature": config.temperature,
    }  # fmt: skip
    return {
        "format": FORMAT, "optional_inputs": EXEMPT_NAME, "model": config.name, "architecture": config.architecture,
        "exporter_version": __version__, "precision": "float32", "weights_sha256": weights_sha256,
        **{name: json.dumps(value, separators=(",", ":")) for name, value in values.items()},
    }  # fmt: skip


def export_onnx(model: str | Path, path: Path, size: tuple[int, int] | None = None, batch: int | None = None) -> Export:
    """Export a model and compare the file with PyTorch; the file appears only when its numbers match.

    Args:
        model: a shipped model's name or a model folder's path.
        path: ONNX file to write; its folder is made if it does not exist.
        size: (height, width) of the network's input; None is the size the model was trained for.
        batch: a fixed batch size; None makes it an input dimension.

    Raises:
        ModelError, ConfigError: the model cannot be loaded, or size or batch are not positive.
        EngineError: a package of the `onnx` extra is missing, the exporter failed, or the numbers do not match.
        OSError: the file cannot be written.
    """
    config = load_config(model)
    size = size or config.input.size
    if min(*size, 1 if batch is None else batch) < 1:
        raise ConfigError(f"export: got size {size} and batch {batch}, expected positive numbers")
    network = load_segmenter(model).requires_grad_(False)
    metadata = describe_export(config, hash_weights(model), size, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as partial:  # two processes may export the same model into one cache
        metadata["logits_size"] = json.dumps(_trace(network, partial, size, batch), separators=(",", ":"))
        _write_metadata(partial, metadata)
        difference = check_against_torch(partial, network, size, batch)
    return Export(path, difference, metadata)


class StaticExport(NamedTuple):
    """A network as files of which no shape depends on an image.

    Attributes:
        first: stage A; the whole network where it merges nothing.
        by_capacity: stage B for each rung of the ladder; empty where nothing is merged.
        max_difference: largest difference from PyTorch that the check found.
    """

    first: Path
    by_capacity: dict[int, Path]
    max_difference: float


class _First(nn.Module):
    """Up to the kept count: images, threshold and exempt tokens to the state's tensors and the count, or to logits."""

    def __init__(self, network: Segmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, *settings: Tensor) -> tuple[Tensor, ...]:
        backbone = self.network.backbone
        state = backbone.encode(images)
        if not backbone.merges:
            return (self.network.decode(backbone.finish(state)).logits,)
        if len(settings) > 1:
            state = backbone.exempt(state, settings[1])
        # While it is traced, sizes are tensors as well.
        tensors = [tensor for tensor in tensors_of(state) if tensor.ndim > 0]
        return (*tensors, backbone.count_kept(state, settings[0]).max())


class _Rest(nn.Module):
    """From there: the state's tensors to logits and cluster ids."""

    def __init__(self, network: Segmenter, state: Any, capacity: int) -> None:
        super().__init__()
        self.network, self._state, self._capacity = network, state, capacity

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        features = self.network.backbone.finish(
            rebuilt(self._state, lambda _: next(given)), token_capacity=self._capacity
        )
        logits, ids = self.network.decode(features).logits, features.cluster_ids
        return (logits,) if ids is None else (logits, ids.contiguous())


def export_static(model: str | Path, folder: Path, size: tuple[int, int] | None = None, batch: int = 1) -> StaticExport:
    """Export a model for compilers that want all shapes: what runs before the kept count, and the rest per capacity.

    A compiler of whole files such as TensorRT keeps out of a graph where a shape depends on the image, which in the
    one file of `export_onnx` is nearly all of it. Files are compared with PyTorch before the folder appears complete.

    Args:
        model: a shipped model's name or a model folder's path.
        folder: where the files go; made if it does not exist.
        size: (height, width) of the network's input; None is the size the model was trained for.
        batch: images per call.

    Raises:
        ModelError, ConfigError: the model cannot be loaded, or the input has more tokens than TensorRT can sort.
        EngineError: a package of the `onnx` extra is missing, the exporter failed, or the numbers do not match.
    """
    config = load_config(model)
    size = size or config.input.size
    network = for_inference(load_segmenter(model))
    backbone = network.backbone
    rows, columns = grid_size_of(size, backbone.patch_size)
    tokens_total = rows * columns
    if backbone.merges and tokens_total > _MOST_SORTED:
        raise ConfigError(
            f"export: {size[0]}x{size[1]} has {tokens_total} tokens, TensorRT sorts at most {_MOST_SORTED}; choose a "
            "smaller size"
        )
    folder.mkdir(parents=True, exist_ok=True)
    images = check_images(size, batch)[1]
    settings: tuple[Tensor, ...] = (torch.tensor(0.5),) if backbone.merges else ()
    if backbone.exempts:
        settings += (torch.zeros(batch, tokens_total, dtype=torch.bool),)
    with torch.inference_mode():
        state = rebuilt(backbone.encode(images), Tensor.clone)
    names = [f"state_{index}" for index in range(len(tensors_of(state)))] if backbone.merges else []
    metadata = describe_export(config, hash_weights(model), size, batch)
    first = folder / ("stage_a.onnx" if backbone.merges else "network.onnx")
    inputs = [INPUT_NAMES[0], INPUT_NAMES[1], EXEMPT_NAME][: 1 + len(settings)]
    outputs = [*names, "kept"] if backbone.merges else [OUTPUT_NAMES[0]]
    deciding = network if backbone.decides else None
    difference = _write_static(_First(network), (images, *settings), inputs, outputs, first, metadata, deciding)
    by_capacity = {}
    for capacity in default_ladder(tokens_total) if backbone.merges else ():
        by_capacity[capacity] = path = folder / f"stage_b_{capacity}.onnx"
        rest = _Rest(network, state, capacity)
        found = _write_static(rest, tuple(tensors_of(state)), names, list(OUTPUT_NAMES[:2]), path, metadata)
        difference = max(difference, found)
    return StaticExport(first, by_capacity, difference)


def _write_static(
    module: nn.Module, example: tuple[Tensor, ...], inputs: list[str], outputs: list[str], path: Path,
    metadata: dict[str, str], deciding: Segmenter | None = None,
) -> float:  # fmt: skip
    """Write one file, its shapes folded into constants; returns its largest difference from PyTorch."""
    with torch.inference_mode():
        expected = [tensor.clone() for tensor in module.eval()(*example)]
    names = outputs[: len(expected)]
    with replacing(path, shared=True) as partial:
        _export(module, example, partial, inputs, names, None)
        difference = fold_and_check(partial, dict(zip(inputs, example, strict=True)), expected, deciding)
        _write_metadata(partial, metadata)
    return difference


def _trace(network: Segmenter, path: Path, size: tuple[int, int], batch: int | None) -> tuple[int, int]:
    """Write the file; returns (h, w) of its logits, which heads may compute on a finer grid than the tokens'."""
    grid_size = grid_size_of(size, network.backbone.patch_size)
    tokens_total = grid_size[0] * grid_size[1]
    # Neither 1 image nor 0 or all tokens kept: the tracer must not meet a special case.
    example: tuple[Tensor, ...] = (
        torch.zeros(batch or 2, 3, *size), torch.tensor(0.5), torch.tensor(max(tokens_total // 2, 1)),
    )  # fmt: skip
    names = list(INPUT_NAMES)
    if network.backbone.exempts:
        example += (torch.arange(tokens_total) % 7 == 0,)
        names.append(EXEMPT_NAME)
    module = CapacitySegmenter(network, tokens_total).eval()
    with torch.inference_mode():
        height, width = network(example[0][:1], token_capacity=int(example[2])).logits.shape[2:]
    dynamic_axes = None if batch else {name: {0: "batch"} for name in (INPUT_NAMES[0], *OUTPUT_NAMES[:2])}
    _export(module, example, path, names, list(OUTPUT_NAMES), dynamic_axes)
    return height, width


def _export(
    module: nn.Module, example: tuple[Tensor, ...], path: Path, inputs: list[str], outputs: list[str],
    dynamic_axes: dict[str, dict[int, str]] | None,
) -> None:  # fmt: skip
    # Older versions of PyTorch have no such choice, and only this exporter.
    choice: dict[str, Any] = {"dynamo": False} if "dynamo" in signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings(), _stable_argsort():
        # The tracer warns of each shape that becomes a constant (size and grid are meant to be, the check that follows
        # finds any other) and of being the older one of two exporters.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                module, example, str(path), opset_version=_OPSET,
                input_names=inputs, output_names=outputs, dynamic_axes=dynamic_axes, **choice,
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ImportError) as error:
            problem = str(error).strip().splitlines()[-1]
            raise EngineError(f"PyTorch {torch.__version__} cannot export the network to ONNX: {problem}") from error


@contextmanager
def _stable_argsort() -> Iterator[None]:
    """Lets the exporter write a stable argsort, for which it has no rule: ONNX's TopK prefers the lower index."""

    @symbolic_helper.parse_args("v", "b", "i", "b")
    def argsort(g, x, stable, dim, descending):
        axis = g.op("Constant", value_t=torch.tensor([dim]))
        count = g.op("Gather", g.op("Shape", x), axis, axis_i=0)
        _, indices = g.op("TopK", x, count, axis_i=dim, largest_i=int(descending), sorted_i=1, outputs=2)
        return indices

    torch.onnx.register_custom_op_symbolic("aten::argsort", argsort, _OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::argsort", _OPSET)


def _write_metadata(path: Path, metadata: dict[str, str]) -> None:
    try:
        import onnx
    except ImportError as error:
        raise EngineError(
            f"export needs the package 'onnx', which cannot be imported ({error}); "
            "install clustvit_ros with its 'onnx' extra"
        ) from error
    file = onnx.load(str(path))
    for value in file.graph.input:
        if value.name == EXEMPT_NAME and len(value.type.tensor_type.shape.dim) == 1:
            # An input with a value of its own is optional (ONNX IR, "graph inputs and initializers").
            tokens_total = value.type.tensor_type.shape.dim[0].dim_value
            none = onnx.numpy_helper.from_array(np.zeros(tokens_total, bool), EXEMPT_NAME)
            file.graph.initializer.append(none)
    domains = {node.domain for node in file.graph.node}
    unused = [entry for entry in file.opset_import if entry.domain not in domains]  # ONNX Runtime names its own
    for entry in unused:
        file.opset_import.remove(entry)
    file.producer_name, file.producer_version = "clustvit_ros", __version__
    onnx.helper.set_model_props(file, metadata)
    onnx.save(file, str(path))
