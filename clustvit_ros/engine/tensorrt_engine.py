# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The engine that runs a network compiled by TensorRT, in the graph engine's two steps.

TensorRT compiles files of static shapes (`export_static`): one up to the kept count, one for each capacity. Compiling
takes minutes, so another process does it, once per device and version, while frames run as the graph engine's; when all
files of a size are there, the next frame takes them. Single images are compiled; batches stay the graph engine's.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clustvit_ros import __version__
from clustvit_ros.engine.engine import EngineInfo, Prediction, Settings
from clustvit_ros.engine.graph_engine import GraphEngine
from clustvit_ros.engine.network_engine import StageTimer
from clustvit_ros.engine.onnx_export import export_static
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import EngineError
from clustvit_ros.paths import replacing, user_cache_dir

_LOG = logging.getLogger(__name__)
_DONE = "complete"
# What decides or normalises stays in float32, by the names that its layers have from PyTorch.
_PRECISE = re.compile(r"clusterer|norm", re.IGNORECASE)
_TYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32, "INT64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip


def import_tensorrt() -> Any:
    """TensorRT's Python package.

    Raises:
        EngineError: it cannot be imported, and how to get it.
    """
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise EngineError(
            f"engine tensorrt: the package 'tensorrt' cannot be imported ({error}); on a Jetson install "
            "python3-libnvinfer by apt, elsewhere `pip install tensorrt`, or set engine to cuda_graph"
        ) from error


class CompiledFile:
    """One compiled file, ready to be run on the device's tensors.

    Args:
        path: what `compile_file` wrote.
        device: where its inputs and outputs lie.
        tensorrt: the package.

    Raises:
        EngineError: TensorRT cannot read it.
    """

    def __init__(self, path: Path, device: torch.device, tensorrt: Any) -> None:
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engine = engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(f"{path}: TensorRT cannot read it; delete its folder, and it is compiled again")
        self._context = engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._types = {name: _TYPES[engine.get_tensor_dtype(name).name] for name in names}
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        self._given: dict[str, Tensor] = {}
        self._outputs = {
            name: torch.empty(tuple(engine.get_tensor_shape(name)), dtype=self._types[name], device=device)
            for name in names
            if name not in self._inputs
        }

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it on the current stream; returns outputs by name, which the next call overwrites."""
        # Kept: the device reads them after this returns.
        self._given = {name: tensors[name].to(self._types[name]).contiguous() for name in self._inputs}
        for name, tensor in (*self._given.items(), *self._outputs.items()):
            self._context.set_tensor_address(name, tensor.data_ptr())
        on_gpu = next(iter(self._outputs.values())).is_cuda
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream if on_gpu else 0):
            raise EngineError("TensorRT did not run a compiled file; its log says why")
        return self._outputs


class _State(NamedTuple):
    """What stage A hands to stage B, and what the latter is."""

    tensors: tuple[Tensor, ...]
    rest: Mapping[int, CompiledFile]


class TensorRtEngine(GraphEngine):
    """Runs compiled files once they are there, and PyTorch's operations as the graph engine until then.

    `info.engine` tells which of them runs now. On a CPU it is the eager engine, and `info.device_reason` says so.

    Args:
        arguments: as in `GraphEngine`.
        source: the model's name or folder, for the compiling process.
        tensorrt: the package; None imports it.
        compile_model: gets model, (height, width), precision and folder, fills the folder, and yields what it does, in
            words; None does so in a process of its own.
        options: as in `GraphEngine`.

    Raises:
        EngineError: TensorRT is not installed.
    """

    engine_name = "cuda_graph"  # until compiled files are there

    def __init__(
        self, *arguments: Any, source: str | Path, tensorrt: Any = None,
        compile_model: Callable[[str, tuple[int, int], str, Path], Any] | None = None, cache_dir: Path | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*arguments, **options)
        self._model, self._compile = str(source), compile_model or _compile_apart
        self._compiles = self._device.type == "cuda" or tensorrt is not None
        self._cache_dir = cache_dir or user_cache_dir() / "tensorrt"
        self._asked: set[tuple[int, int]] = set()
        self._ready: list[tuple[tuple[int, int], Path]] = []
        self._files: dict[tuple[int, int], tuple[CompiledFile, dict[int, CompiledFile]]] = {}
        self._closed = False
        if self._compiles:
            self._tensorrt = tensorrt or import_tensorrt()

    @classmethod
    def from_model(cls, model: str | Path, *arguments: Any, **options: Any) -> TorchEngine:
        """An engine for a model folder or shipped model; raises as `TorchEngine.from_model`."""
        return super().from_model(model, *arguments, source=model, **options)

    @property
    def info(self) -> EngineInfo:
        return replace(self._info, engine="tensorrt") if self._files else self._info

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Warm the graph engine's way, and begin to compile for images of (height, width) `image_size`."""
        super().warmup(image_size)
        size = self.input_size(image_size or self._config.input.size)
        if self._compiles and size not in self._asked:
            self._asked.add(size)
            # A daemon, as the engine's own thread: minutes of compiling keep no process alive.
            threading.Thread(target=self._compile_for, args=(size,), name="tensorrt", daemon=True).start()

    def run_first(self, x: Tensor, merge_threshold: Tensor, exempt: Tensor) -> tuple[Any, Tensor | None]:
        files = self._files.get((x.shape[2], x.shape[3])) if x.shape[0] == 1 else None
        if files is None:
            return super().run_first(x, merge_threshold, exempt)
        first, rest = files
        outputs = first({"images": x, "merge_threshold": merge_threshold, "exempt": exempt})
        if "kept" not in outputs:
            return _State((outputs["logits"],), {}), None
        names = sorted((name for name in outputs if name != "kept"), key=lambda name: int(name.rpartition("_")[2]))
        return _State(tuple(outputs[name] for name in names), rest), outputs["kept"].long()

    def run_rest(self, state: Any, capacity: int) -> tuple[Tensor, Tensor | None]:
        if not isinstance(state, _State):
            return super().run_rest(state, capacity)
        if not state.rest:
            return state.tensors[0], None
        outputs = state.rest[capacity]({f"state_{index}": tensor for index, tensor in enumerate(state.tensors)})
        return outputs["logits"], outputs.get("cluster_ids")

    def close(self) -> None:
        self._closed = True
        self._files.clear()
        super().close()

    def _segment(self, batch: np.ndarray, settings: Settings, timer: StageTimer) -> Prediction:
        while self._ready:
            self._take(*self._ready.pop(0))
        return super()._segment(batch, settings, timer)

    def _take(self, size: tuple[int, int], folder: Path) -> None:
        """Run compiled files from now on."""
        rest = {int(path.stem.rpartition("_")[2]): path for path in folder.glob("stage_b_*.plan")}
        first = folder / ("stage_a.plan" if rest else "network.plan")
        try:
            compiled = [CompiledFile(path, self._device, self._tensorrt) for path in (first, *rest.values())]
        except EngineError as error:
            self._tell(str(error))
            return
        self._files[size] = compiled[0], dict(zip(rest, compiled[1:], strict=True))
        self._forget()
        _LOG.info("TensorRT takes over at %dx%d", size[1], size[0])

    def _compile_for(self, size: tuple[int, int]) -> None:
        folder = self._cache_dir / self._folder_name(size)
        try:
            if not (folder / _DONE).exists():
                _LOG.info("TensorRT compiles %s for %dx%d, for minutes; masks flow", self._model, size[1], size[0])
                folder.mkdir(parents=True, exist_ok=True)
                for step in self._compile(self._model, size, self._info.precision, folder):
                    _LOG.info("TensorRT: %s", step)
                    if self._closed:
                        return
                (folder / _DONE).touch()
            self._ready.append((size, folder))
        except (EngineError, OSError) as error:
            self._tell(str(error))

    def _tell(self, problem: str) -> None:
        self._fault = f"TensorRT cannot be used ({problem}): frames run as {self._info.engine}"
        _LOG.warning(self._fault)

    def _folder_name(self, size: tuple[int, int]) -> str:
        """A compiled file is for one device, version and network."""
        info = self._info
        what = (info.model_sha256, info.device, info.precision, size, self._tensorrt.__version__, __version__)
        return f"{info.model}-{size[0]}x{size[1]}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"


def _compile_apart(model: str, size: tuple[int, int], precision: str, folder: Path) -> Any:
    """Compile in another process, whose waits for the device spoil no capture of this one."""
    words = model, *map(str, size), precision, str(folder)
    command = [sys.executable, "-m", "clustvit_ros.engine.tensorrt_engine", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None  # it is a pipe
        last = ""
        try:
            for line in process.stdout:
                last = line.strip() or last
                yield last
        except GeneratorExit:  # nobody wants it any more
            process.kill()
            raise
    if process.returncode != 0:
        raise EngineError(f"compiling ended with exit code {process.returncode}, its last words: {last}")


def compile_file(source: Path, target: Path, half: bool, tensorrt: Any) -> None:
    """Compile one ONNX file of static shapes for this machine's GPU.

    Raises:
        EngineError: TensorRT cannot read or compile it.
    """
    builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.WARNING))
    explicit = getattr(tensorrt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # the only way since 10
    network = builder.create_network(1 << int(explicit) if explicit is not None else 0)
    parser = tensorrt.OnnxParser(network, tensorrt.Logger(tensorrt.Logger.WARNING))
    if not parser.parse_from_file(str(source)):
        problems = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineError(f"{source.name}: TensorRT {tensorrt.__version__} cannot read it: {problems}")
    config = builder.create_builder_config()
    if half:
        config.set_flag(tensorrt.BuilderFlag.FP16)
        config.set_flag(tensorrt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if _PRECISE.search(layer.name) and layer.get_output(0).dtype == tensorrt.DataType.FLOAT:
                layer.precision = tensorrt.DataType.FLOAT
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{source.name}: TensorRT {tensorrt.__version__} cannot compile it; its log says why")
    with replacing(target) as partial:
        partial.write_bytes(bytes(plan))


def compile_model(model: str, size: tuple[int, int], precision: str, folder: Path, tensorrt: Any) -> Any:
    """Export a model in static shapes and compile each file, yielding what was done, in words."""
    export = export_static(model, folder, size)
    files = [export.first, *export.by_capacity.values()]
    yield f"{len(files)} files exported"
    for index, path in enumerate(files):
        compile_file(path, path.with_suffix(".plan"), precision == "float16", tensorrt)
        yield f"{path.stem} compiled, {index + 1} of {len(files)}"


if __name__ == "__main__":
    name, rows, columns, kind, where = sys.argv[1:]
    for done in compile_model(name, (int(rows), int(columns)), kind, Path(where), import_tensorrt()):
        print(done, flush=True)
