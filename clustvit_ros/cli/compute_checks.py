# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Checks that compute: a kernel on the GPU, a session on every ONNX Runtime provider, a mask from the model.

Each runs in a process of its own (`python -m clustvit_ros.cli.compute_checks NAME ...`): a driver that crashes or hangs
is a finding then, not the end of the doctor.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

from clustvit_ros.cli.machine_checks import Finding, Level, gpu_hardware, import_remedy
from clustvit_ros.errors import ClustvitError

# A graph of one node, y = x + x on four floats: ONNX, opset 13.
_TINY_GRAPH = (
    b'\x08\x07\x12\x00:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04'
    b"\n\x02\x08\x04b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x04B\x04\n\x00\x10\r"
)
# Sends graphs to a service; there is nothing to be tried here.
_REMOTE_PROVIDERS = ("AzureExecutionProvider",)
_JETSON_TORCH = "install NVIDIA's build of PyTorch for your JetPack (pip's is for the CPU there)"


def run_isolated(name: str, *arguments: str, timeout_s: float = 180.0) -> list[Finding]:
    """Run a check of this module in a process of its own."""
    command = [sys.executable, "-m", "clustvit_ros.cli.compute_checks", name, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        remedy = "restart the machine; if it happens again, reinstall the GPU's driver"
        return [Finding(name, Level.FAIL, f"did not answer within {timeout_s:g} s", remedy)]
    try:
        return [Finding(**finding) for finding in json.loads(done.stdout.strip().splitlines()[-1])]
    except (ValueError, IndexError, TypeError):
        code = done.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        remedy = f"run `{' '.join(command)}` to see all of it, and reinstall the package it names"
        return [Finding(name, Level.FAIL, f"ended with {how}, its last words: {said}", remedy)]


def check_torch(device: str = "auto") -> list[Finding]:
    """PyTorch and the GPU: a kernel runs, or why not."""
    hardware = gpu_hardware()
    try:
        import torch
    except (ImportError, OSError, AttributeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        remedy = import_remedy(str(error), "torch")
        if platform.machine() == "aarch64":
            remedy = _JETSON_TORCH
        elif missing:
            remedy = "pip install torch, or this package with its 'torch' extra"
        return [Finding("torch", Level.FAIL, f"cannot be imported by {sys.executable}: {error}", remedy)]
    try:
        from clustvit_ros.engine.network_engine import describe_device, select_device
        from clustvit_ros.networks.inference import int8_problem
    except Exception as error:  # a damaged package may raise anything
        return [_not_tried("torch", error)]
    findings = []
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    a = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64) % 7.0
    if torch.equal(a @ torch.eye(64), a):
        problem = int8_problem()
        int8 = f"not in int8 ({problem})" if problem else "in int8 as well"
        findings.append(Finding("torch", Level.OK, f"{torch.__version__}, {built}; computes on the CPU, {int8}"))
    else:
        findings.append(Finding("torch", Level.FAIL, "computes wrong results on the CPU", "reinstall torch"))
    try:
        selected, reason = select_device(device)
    except ClustvitError as error:
        return [*findings, Finding("gpu", Level.FAIL, str(error), _gpu_remedy(bool(torch.version.cuda)))]
    if selected.type == "cuda":
        b = a.to(selected)
        if torch.equal((b @ torch.eye(64, device=selected)).cpu(), a):
            text = (
                f"{describe_device(selected)}, {torch.cuda.get_device_properties(selected).total_memory / 1e9:.1f} GB"
            )
            return [*findings, Finding("gpu", Level.OK, f"{text}; kernels run")]
        return [*findings, Finding("gpu", Level.FAIL, "computes wrong results", "reinstall driver and torch")]
    if hardware:
        text = f"{hardware} is there, but PyTorch does not use it: {reason or 'the CPU was asked for'}"
        level = Level.FAIL if device != "cpu" else Level.WARN
        return [*findings, Finding("gpu", level, text, _gpu_remedy(bool(torch.version.cuda)))]
    return [*findings, Finding("gpu", Level.OK, f"none; the node runs on the CPU ({reason or 'as asked'})")]


def _not_tried(package: str, error: Exception) -> Finding:
    """A package that is none the worse for what is amiss elsewhere, and must not be installed again for it."""
    text = f"was not tried, for what uses it cannot be loaded: {error}"
    return Finding(package, Level.WARN, text, "mend that first, see above")


def _gpu_remedy(built_for_cuda: bool) -> str:
    if platform.machine() == "aarch64":
        return _JETSON_TORCH
    if not built_for_cuda:
        return "install a CUDA build of PyTorch (pip install --force-reinstall torch), or set device to cpu"
    return "check the driver with nvidia-smi; in Docker start with --gpus all; or set device to cpu"


def check_onnxruntime() -> list[Finding]:
    """Every provider of ONNX Runtime that this build claims to have runs a session, and none is missing for a GPU."""
    if importlib.util.find_spec("onnxruntime") is None:
        return [Finding("onnxruntime", Level.OK, "is not installed; only engine onnxruntime needs it")]
    try:
        import numpy as np

        from clustvit_ros.engine.onnx_session import import_onnxruntime
    except Exception as error:  # a damaged package may raise anything
        return [_not_tried("onnxruntime", error)]
    try:
        onnxruntime = import_onnxruntime()
    except (ImportError, OSError, AttributeError, ClustvitError) as error:
        remedy = "reinstall onnxruntime, or on a GPU an onnxruntime-gpu that fits its CUDA"
        return [Finding("onnxruntime", Level.FAIL, f"cannot be imported: {error}", remedy)]
    providers = [name for name in onnxruntime.get_available_providers() if name not in _REMOTE_PROVIDERS]
    x = np.arange(4, dtype=np.float32)
    findings = _check_onnxruntime_builds(providers)
    for provider in providers:
        check = f"onnxruntime {provider}"
        remedy = (
            f"install the CUDA, cuDNN and TensorRT versions that onnxruntime {onnxruntime.__version__} was built for, "
            "or set engine to torch"
        )
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(_TINY_GRAPH, options, providers=[provider])
            (y,) = session.run(None, {"x": x})
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            findings.append(Finding(check, Level.FAIL, f"does not run: {str(error).splitlines()[0]}", remedy))
            continue
        running = session.get_providers()[0]
        if running != provider:
            findings.append(Finding(check, Level.FAIL, f"does not load; {running} ran instead", remedy))
        elif not np.array_equal(y, 2 * x):
            findings.append(Finding(check, Level.FAIL, f"computed {y.tolist()} for {(2 * x).tolist()}", remedy))
        else:
            findings.append(Finding(check, Level.OK, f"runs ({onnxruntime.__version__})"))
    return findings


def _check_onnxruntime_builds(providers: list[str]) -> list[Finding]:
    """Both builds at once overwrite each other's files; the CPU's beside a GPU leaves that idle."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    again = "pip uninstall -y onnxruntime onnxruntime-gpu, then "
    if platform.machine() == "aarch64":
        again += "pip install onnxruntime-gpu from the Jetson index (docs/quick_start_jetson.md)"
    else:
        again += "pip install onnxruntime-gpu (extra onnx-gpu)"
    if len(installed) > 1:
        text = "onnxruntime and onnxruntime-gpu are both installed and share one folder; the last one's providers count"
        return [Finding("onnxruntime", Level.FAIL, text, f"{again}; on a machine without a GPU, onnxruntime alone")]
    hardware = gpu_hardware()
    if hardware and "CUDAExecutionProvider" not in providers:
        text = f"{hardware} is there, but this build has no CUDA provider: engine onnxruntime runs on the CPU"
        return [Finding("onnxruntime", Level.WARN, text, again)]
    return []


def _is_installed(distribution: str) -> bool:
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def try_model(model: str, device: str = "auto") -> list[Finding]:
    """The model's weights load and fit, and it makes a mask of a test picture, the same one twice."""
    try:
        import numpy as np

        from clustvit_ros.classes import IGNORE_INDEX
        from clustvit_ros.engine import Settings, create_engine
        from clustvit_ros.networks.model_folder import hash_weights
    except (ImportError, OSError, AttributeError) as error:
        return [Finding("model", Level.FAIL, f"cannot be tried: {error}", "install what is missing, see above")]
    refetch = "fetch or train the model again, or name another one with --model"
    try:
        digest = hash_weights(model)
        engine = create_engine(model, "torch", device)
        height, width = engine.info.input_size
        rows, columns = np.mgrid[0:height, 0:width]
        picture = np.stack([255 * rows // height, 255 * columns // width, (rows ^ columns) & 255], -1).astype(np.uint8)
        first, second = (engine.segment(picture, Settings()).mask[0] for _ in range(2))
    except ClustvitError as error:
        return [Finding("model", Level.FAIL, str(error), refetch)]
    labels = np.unique(first)
    unknown = [int(label) for label in labels if label >= len(engine.info.classes) and label != IGNORE_INDEX]
    problem = ""
    if first.shape != (height, width):
        problem = f"a mask of {first.shape} for a picture of {(height, width)}"
    elif unknown:
        problem = f"labels {unknown} of {len(engine.info.classes)} classes"
    elif not np.array_equal(first, second):
        problem = f"two masks that differ in {np.mean(first != second):.1%} of the pixels for one picture"
    elif np.all(first == IGNORE_INDEX):
        problem = "a mask without a label"
    if problem:
        return [Finding("model", Level.FAIL, f"{model} on {engine.info.device} gives {problem}", refetch)]
    return [
        Finding(
            "model", Level.OK,
            f"{model}: weights sha256 {digest[:16]}..., {len(engine.info.classes)} classes, mask of a test picture on "
            f"{engine.info.device}",
        )
    ]  # fmt: skip


_CHECKS: dict[str, Callable[..., list[Finding]]] = {
    "torch": check_torch, "onnxruntime": check_onnxruntime, "model": try_model,
}  # fmt: skip


def main() -> int:
    """Run the check that the command line names and print its findings as one line of JSON."""
    findings = _CHECKS[sys.argv[1]](*sys.argv[2:])
    print(json.dumps([asdict(finding) for finding in findings]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
