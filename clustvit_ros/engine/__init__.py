# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Engines: a network that runs somewhere, behind one interface."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine.engine import (
    PRECISION_CHOICES,
    PRECISIONS,
    Engine,
    EngineInfo,
    Prediction,
    Settings,
    Stats,
    check_precision,
)
from clustvit_ros.engine.scripted_engine import ScriptedEngine
from clustvit_ros.errors import ConfigError, EngineError, missing_package

if TYPE_CHECKING:
    from clustvit_ros.engine.network_engine import NetworkEngine

_LOG = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "cuda_graph", "tensorrt", "onnxruntime", "onnxruntime_tensorrt", "scripted")

__all__ = [
    "ENGINES", "PRECISIONS", "PRECISION_CHOICES", "Engine", "EngineInfo", "Prediction", "ScriptedEngine", "Settings",
    "Stats", "check_model", "create_engine",
]  # fmt: skip


def create_engine(
    model: str, engine: str = "torch", device: str = "auto", threads: int = 0, precision: str = "float32",
    compiled: bool = False, share_cores: bool = False,
) -> Engine:  # fmt: skip
    """Make an engine by name.

    Args:
        model: a shipped model's name or a model folder's path; "scripted" needs none.
        engine: one of `ENGINES`; "auto" is "cuda_graph" on a GPU, on a CPU what was measured to be the fastest there
            (`choice`), or "torch"; so is the precision "auto".
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; 0 is automatic.
        precision: one of `PRECISION_CHOICES`; `onnxruntime` has float16 with TensorRT alone, and int8 is for a CPU.
        compiled: `torch.compile` the blocks of "torch" and "cuda_graph".
        share_cores: let "torch" on a CPU, with `threads` 0, compute with fewer threads while others use cores.

    Raises:
        ConfigError: unknown engine, device or precision, one that the engine lacks, or an unusable model configuration.
        ModelError: the model cannot be loaded.
        EngineError: the device does not work, or the engine's packages are not installed.
    """
    check_precision(precision)
    if engine == "scripted":
        return ScriptedEngine()
    try:
        # Imported here and not above: the scripted engine serves machines and tests without PyTorch.
        if engine in ("auto", "torch") and "auto" in (engine, precision) and not compiled:
            from clustvit_ros.engine.network_engine import select_device

            if select_device(device)[0].type == "cpu":
                return _fastest_on_cpu(model, engine, device, threads, precision, share_cores)
            engine = "cuda_graph" if engine == "auto" else engine
        if engine == "torch":
            from clustvit_ros.engine.torch_engine import TorchEngine

            return TorchEngine.from_model(model, device, threads, precision, compiled, share_cores=share_cores)
        if engine == "cuda_graph":
            from clustvit_ros.engine.graph_engine import GraphEngine

            return GraphEngine.from_model(model, device, threads, precision, compiled)
        if engine == "tensorrt":
            from clustvit_ros.engine.tensorrt_engine import TensorRtEngine

            if compiled:
                raise ConfigError("compiled: the engine tensorrt compiles in its own way; leave compilation off")
            return TensorRtEngine.from_model(model, device, threads, precision)
        if engine in ("onnxruntime", "onnxruntime_tensorrt"):
            from clustvit_ros.engine.network_engine import select_device
            from clustvit_ros.engine.onnx_engine import OnnxEngine

            if compiled:
                raise ConfigError("compiled: the engine onnxruntime compiles in its own way; leave compilation off")
            on_gpu = engine != "onnxruntime" and select_device(device)[0].type == "cuda"
            return OnnxEngine(model, device, threads, "tensorrt" if on_gpu else "", precision=precision)
    except ImportError as error:
        raise EngineError(missing_package(error, f"engine {engine}")) from error
    raise ConfigError(f"engine: got {engine!r}, expected one of {', '.join(ENGINES)}")


def _fastest_on_cpu(
    model: str, engine: str, device: str, threads: int, precision: str, share_cores: bool
) -> NetworkEngine:
    """What was measured to be the fastest here, or else PyTorch in float32."""
    from clustvit_ros.engine.choice import fastest, load
    from clustvit_ros.engine.onnx_engine import OnnxEngine
    from clustvit_ros.engine.torch_engine import TorchEngine

    rows = load(model, threads)
    row = fastest(rows, engine, precision)
    try:
        if row is not None and row.engine == "onnxruntime":
            made: NetworkEngine = OnnxEngine(model, device, threads, "cpu")
        else:
            chosen = row.precision if row is not None else "float32" if precision == "auto" else precision
            made = TorchEngine.from_model(model, device, threads, chosen, share_cores=share_cores)
    except (EngineError, ConfigError, ImportError) as error:
        if row is None:
            raise
        _LOG.warning("%s in %s was the fastest and cannot be had now (%s)", row.engine, row.precision, error)
        return TorchEngine.from_model(model, device, threads, "float32", share_cores=share_cores)
    if row is not None:
        same = f"{100 * row.equal:.1f} % of the pixels the same"
        made.explain(f"{row.engine} in {row.precision} took {row.share:.2f} of float32's time here, {same}")
    elif precision == "auto":
        made.explain("nothing else was faster" if rows else "`tune --engines` finds out whether others are faster")
    return made


def check_model(model: str) -> tuple[ClassSet, int]:
    """Refuse a model that cannot be loaded, by its configuration and the header of its weights: a matter of moments.

    Args:
        model: a shipped model's name or a model folder's path.

    Returns:
        Its classes, and the bytes that loading and running it take.

    Raises:
        ConfigError, ModelError: it cannot be loaded, and why.
    """
    from clustvit_ros.engine.network_engine import frame_bytes  # needs PyTorch
    from clustvit_ros.networks.model_folder import check_folder

    config, weights_bytes = check_folder(model)
    # Weights are there in several forms for a moment.
    return config.classes, 6 * weights_bytes + frame_bytes(config)
