"""Sessions of ONNX Runtime on a chosen execution provider, which is made sure to be the one that runs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from clustvit_ros.errors import ConfigError, EngineError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's names of execution providers by ours."""


def import_onnxruntime() -> ModuleType:
    """The package, or an error that says how to get it.

    Raises:
        EngineError: it cannot be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"engine onnxruntime: the package 'onnxruntime' cannot be imported ({error}); install clustvit_ros with "
            "its 'onnx' extra, or on a GPU a build of onnxruntime-gpu that fits its CUDA"
        ) from error
    return onnxruntime


def open_session(
    path: Path,
    device: torch.device,
    threads: int = 0,
    execution_provider: str = "",
    cache_dir: Path | None = None,
    half: bool = False,
) -> tuple[Any, str]:
    """Open an exported file.

    Args:
        path: the file.
        device: where its input and output will lie.
        threads: CPU threads; 0 leaves ONNX Runtime's choice.
        execution_provider: one of `PROVIDERS`; empty takes the device's own.
        cache_dir: where TensorRT keeps the engines it builds; None builds them at each start.
        half: let TensorRT compute in float16.

    Returns:
        The `onnxruntime.InferenceSession`, and why it does not run on the wanted provider; empty if it does.

    Raises:
        ConfigError: unknown provider, or one that does not run on this device.
        EngineError: onnxruntime is missing or cannot read the file.
    """
    onnxruntime = import_onnxruntime()
    name = execution_provider or device.type
    if name not in PROVIDERS or (name == "cpu") != (device.type == "cpu"):
        raise ConfigError(
            f"execution_provider: got {name!r} for device {device}, expected cpu on a CPU, cuda or tensorrt on a GPU"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # a provider that does not load is reported below, once, not as a warning per start
    # Threads that wait by spinning take the cores from the post-processing that follows.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            str(path),
            options,
            providers=_providers(name, device, cache_dir, half, onnxruntime.get_available_providers()),
        )
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise EngineError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot open it: {error}") from error
    running = session.get_providers()
    if running[0] == PROVIDERS[name]:
        return session, ""
    return session, (
        f"ONNX Runtime {onnxruntime.__version__} runs on {running[0]} instead of {PROVIDERS[name]} "
        f"(it was built with {', '.join(onnxruntime.get_available_providers())})"
    )


def read_metadata(path: Path) -> dict[str, str]:
    """What an exported file says about itself.

    Raises:
        EngineError: onnxruntime is missing or cannot read the file.
    """
    session, _ = open_session(path, torch.device("cpu"))
    return session.get_modelmeta().custom_metadata_map


def _providers(
    name: str, device: torch.device, cache_dir: Path | None, half: bool, available: list[str]
) -> list[str | tuple[str, dict[str, str]]]:
    """Providers in order of preference; each takes the operators that those before it leave."""
    on_gpu = {"device_id": str(device.index or 0)}
    preferred: list[tuple[str, dict[str, str]]] = []
    if name == "tensorrt":
        cache = {"trt_fp16_enable": "1", "trt_layer_norm_fp32_fallback": "1"} if half else {}
        if cache_dir is not None:
            cache |= {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(cache_dir),
                "trt_timing_cache_enable": "1",
            }
        preferred.append((PROVIDERS["tensorrt"], {**on_gpu, **cache}))
    if name in ("tensorrt", "cuda"):
        preferred.append((PROVIDERS["cuda"], on_gpu))
    # Asking for a provider that this build lacks would be an error in some versions and a warning in others.
    return [*(provider for provider in preferred if provider[0] in available), PROVIDERS["cpu"]]
