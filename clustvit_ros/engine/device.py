"""Choosing a device: a GPU is believed in only after it has run a kernel."""

from __future__ import annotations

import platform
import re

import torch

from clustvit_ros.errors import ConfigError, EngineError


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
