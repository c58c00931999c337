"""Engines: a network that runs somewhere, behind one interface."""

from __future__ import annotations

from clustvit_ros.errors import ConfigError
from clustvit_ros.runtime.engine import Engine, EngineInfo, Prediction, Settings, Stats
from clustvit_ros.runtime.scripted_engine import ScriptedEngine

ENGINES = ("torch", "onnxruntime", "scripted")

__all__ = [
    "ENGINES", "Engine", "EngineInfo", "Prediction", "ScriptedEngine", "Settings", "Stats", "create_engine",
]  # fmt: skip


def create_engine(model: str, engine: str = "torch", device: str = "auto", threads: int = 0) -> Engine:
    """Make an engine by name.

    Args:
        model: a shipped model's name or a model folder's path; "scripted" needs none.
        engine: one of `ENGINES`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; 0 is automatic.

    Raises:
        ConfigError: unknown engine or device name, or an unusable model configuration.
        ModelError: the model cannot be loaded.
        EngineError: the device does not work, or the engine's packages are not installed.
    """
    if engine == "scripted":
        return ScriptedEngine()
    if engine == "torch":
        # Here and not above: the scripted engine serves machines and tests without PyTorch.
        from clustvit_ros.runtime.torch_engine import TorchEngine

        return TorchEngine.from_model(model, device, threads)
    if engine == "onnxruntime":
        from clustvit_ros.runtime.onnx_engine import OnnxEngine

        return OnnxEngine(model, device, threads)
    raise ConfigError(f"engine: got {engine!r}, expected one of {', '.join(ENGINES)}")
