# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Sessions of ONNX Runtime on a chosen execution provider, and whether an exported file gives the network's numbers.

Does an exported file compute what PyTorch computes? Asked after every export.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clustvit_ros.engine.ladder import choose_capacity, default_ladder
from clustvit_ros.errors import ConfigError, EngineError
from clustvit_ros.networks.segmenter import Backbone, Segmenter
from clustvit_ros.networks.vit import grid_size_of

PROVIDERS = {
    "cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider",
}  # fmt: skip
"""ONNX Runtime's names of execution providers by ours."""


def import_onnxruntime() -> ModuleType:
    """The package, or an error that says how to get it.

    Raises:
        EngineError: it cannot be imported.
    """
    # Since 1.29 it sends the names and hashes of models to its makers, unless this is set before it is loaded.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"engine onnxruntime: the package 'onnxruntime' cannot be imported ({error}); install clustvit_ros with "
            "its 'onnx' extra, or on a GPU a build of onnxruntime-gpu that fits its CUDA"
        ) from error
    return onnxruntime


def open_session(
    path: Path, device: torch.device, threads: int = 0, execution_provider: str = "", cache_dir: Path | None = None,
    half: bool = False,
) -> tuple[Any, str]:  # fmt: skip
    """Open an exported file.

    Args:
        path: the file.
        device: device that its input and output will lie on.
        threads: CPU threads; 0 leaves ONNX Runtime's choice.
        execution_provider: one of `PROVIDERS`; empty takes the device's own.
        cache_dir: folder that TensorRT keeps its engines in; None builds them at each start.
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
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(path),
            options,
            providers=_providers(name, device, cache_dir, half, onnxruntime.get_available_providers()),
        )
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        text = f"{path}: ONNX Runtime {onnxruntime.__version__} cannot open it: {error}; export it again"
        raise EngineError(text) from error
    running = session.get_providers()
    if running[0] == PROVIDERS[name]:
        return session, ""
    return session, (
        f"ONNX Runtime {onnxruntime.__version__} runs on {running[0]} instead of {PROVIDERS[name]} "
        f"(it was built with {', '.join(onnxruntime.get_available_providers())})"
    )


def describe_providers(session: Any) -> str:
    """Providers that a session runs on, each with its share of the file's operations, the largest first.

    What one of them was preferred for is not what it took: TensorRT leaves what has no static shape to CUDA, and that
    leaves to the CPU what it has no kernel for.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # since 1.24
        return ", ".join(session.get_providers()) + " (this ONNX Runtime does not tell shares)"
    counts: Counter[str] = Counter()
    for assigned in session.get_provider_graph_assignment_info():
        counts[assigned.ep_name] += len(assigned.get_nodes())
    total = sum(counts.values())
    return ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in counts.most_common())


def read_metadata(path: Path) -> dict[str, str]:
    """What an exported file says about itself.

    Raises:
        EngineError: onnxruntime is missing or cannot read the file.
    """
    session, _ = open_session(path, torch.device("cpu"))
    try:
        return session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise EngineError(f"{path}: its metadata is no text ({error}); delete the file, or export it again") from error


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
                "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache_dir), "trt_timing_cache_enable": "1",
            }  # fmt: skip
        preferred.append((PROVIDERS["tensorrt"], {**on_gpu, **cache}))
    if name in ("tensorrt", "cuda"):
        preferred.append((PROVIDERS["cuda"], on_gpu))
    # Asking for a provider that this build lacks would be an error in some versions and a warning in others.
    return [*(provider for provider in preferred if provider[0] in available), PROVIDERS["cpu"]]


LOGIT_TOLERANCE = 1e-3
# Tokens whose merge score's logit is closer than this to the threshold's may be decided either way.
_TIE = 1e-3
# Share of tokens that may be decided the other way, where several are equally good to the last bit. The others' logits
# then follow PyTorch's but for a few. So they do where a backbone decides inside what no result shows.
_TIED_TOKENS = 0.02
# Of normalised pixels, whose own float32 has 1e-7.
_ROUNDING = 1e-6
# Where pairs are merged by how alike they are, one that swaps changes what follows. Where a file and PyTorch differ, so
# many times what rounding does to PyTorch's own result is allowed, at half of the settings at most.
_JUMPS = 4
_OTHER_VERSIONS = f"try other versions than PyTorch {torch.__version__} and the ONNX Runtime here"


def check_against_torch(path: Path, network: Segmenter, size: tuple[int, int], batch: int | None) -> float:
    """Compare an exported file with its network on several images, thresholds and capacities.

    Args:
        path: the file.
        network: network in evaluation mode, on the CPU.
        size: (height, width) of the file's input.
        batch: its batch size; None (dynamic) is checked with one and two images.

    Returns:
        The largest difference of logits; of a backbone that decides inside, of nine tenths of them. Settings at which
        rounding decides what is merged are left out.

    Raises:
        EngineError: the file cannot be run, or a capacity, a cluster id or a logit differs.
    """
    onnxruntime = import_onnxruntime()
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of the optional input, which is meant to be one
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise EngineError(f"export: ONNX Runtime {onnxruntime.__version__} cannot read the file: {error}") from error
    difference = 0.0
    for images, many_settings in zip(check_images(size, batch), (True, False), strict=True):
        with torch.inference_mode():
            difference = max(difference, _check_images(session, network, images, many_settings))
    return difference


STATIC_TOLERANCE = 1e-4


def fold_and_check(
    path: Path, inputs: Mapping[str, Tensor], expected: Sequence[Tensor], deciding: Segmenter | None = None
) -> float:
    """Replace what an exported file of static shapes computes from shapes by constants, and compare it with PyTorch.

    Args:
        path: the file, which is rewritten.
        inputs: values of its inputs by name; the file may do without some.
        expected: what PyTorch makes of them.
        deciding: the network, where rounding decides inside of it.

    Returns:
        The largest difference of its floating-point outputs (of nine tenths where rounding decides), relative to their
        largest value where that is above 1.

    Raises:
        EngineError: the file cannot be run, or differs by more than `STATIC_TOLERANCE` or what rounding explains.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Constants are folded and nothing is fused into operators of ONNX Runtime's own.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = f"{path}.folded"
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        os.replace(f"{path}.folded", path)
        found = session.run(None, {value.name: inputs[value.name].numpy() for value in session.get_inputs()})
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise EngineError(f"export: ONNX Runtime {onnxruntime.__version__} cannot run the file: {error}") from error
    most, allowed = 0.0, STATIC_TOLERANCE
    for value, wanted in zip(map(torch.from_numpy, map(np.asarray, found)), expected, strict=True):
        if wanted.is_floating_point():
            finite = wanted.isfinite()
            largest = float(wanted[finite].abs().max().clamp(min=1.0))
            apart = _apart(value[finite], None, wanted[finite], None, deciding is not None)[1] / largest
            if deciding is not None:
                allowed = max(allowed, _undecided(deciding, inputs["images"], wanted) / largest)
        else:
            apart = float((value != wanted).float().mean())
        most = max(most, apart)
    if not most <= allowed:
        told = f"{path.name} differs from PyTorch by {most:.2g}, allowed {allowed:.2g}"
        raise EngineError(f"export: {told}; the file was removed")
    return most


def check_images(size: tuple[int, int], batch: int | None) -> tuple[Tensor, Tensor]:
    """Noise, and smooth gradients that cross the image: two batches of normalised images."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch or 1, 3, *size, generator=generator)
    rows, columns = torch.linspace(-1, 1, size[0])[:, None], torch.linspace(-1, 1, size[1])
    directions = torch.rand(batch or 2, 3, 2, 1, 1, generator=generator) * 6 - 3
    return noise, torch.sin(directions[:, :, 0] * rows + directions[:, :, 1] * columns)


def _check_images(session, network: Segmenter, images: Tensor, many_settings: bool) -> float:
    backbone = network.backbone
    unexempt = backbone.encode(images)
    rows, columns = grid_size_of((images.shape[2], images.shape[3]), backbone.patch_size)
    difference, doubtful = 0.0, 0
    settings = _settings(backbone, unexempt, rows * columns, many_settings)
    for turn, (merge_threshold, token_capacity) in enumerate(settings):
        feed = {
            "images": images.numpy(),
            "merge_threshold": np.array(merge_threshold, np.float32),
            "token_capacity": np.array(token_capacity, np.int64),
        }
        state, exempt = unexempt, torch.zeros(rows * columns, dtype=torch.bool)
        if backbone.exempts and turn % 2:
            # Every other time some tokens are left out of merging.
            exempt = torch.arange(rows * columns) % (turn + 2) == 0
            feed["exempt"], state = exempt.numpy(), backbone.exempt(unexempt, exempt)
        logits, ids, capacity = (torch.from_numpy(np.asarray(output)) for output in session.run(None, feed))
        where = f"at merge_threshold {merge_threshold:.4g} and token_capacity {token_capacity}"
        if backbone.merges:
            least, most = (
                _capacity(backbone, state, _moved(merge_threshold, tie), token_capacity, exempt)
                for tie in (-_TIE, _TIE)
            )
            if not least <= int(capacity) <= most:
                raise EngineError(
                    f"export: {int(capacity)} tokens are kept {where}, PyTorch keeps {most}; the file was removed"
                )
        found, is_doubtful = _compare(network, images, state, exempt, logits, ids, int(capacity), where)
        doubtful += is_doubtful
        difference = max(difference, 0.0 if is_doubtful else found)
    if doubtful > len(settings) / 2:
        raise EngineError(
            f"export: logits differ from PyTorch's by {found:.2g} {where}, and at {doubtful - 1} others; the file was "
            f"removed; {_OTHER_VERSIONS}"
        )
    return difference


def _compare(
    network: Segmenter, images: Tensor, state: Any, exempt: Tensor, logits: Tensor, ids: Tensor, capacity: int,
    where: str,
) -> tuple[float, bool]:  # fmt: skip
    """Hold what a file gives at one setting against PyTorch.

    Args:
        network, images: as for the check; `state` is what the backbone's first part makes of these images.
        exempt: (N,) bool.
        logits, ids, capacity, where: the file's outputs, and the setting, for messages.

    Returns:
        How far logits lie apart, and whether rounding decides what is merged there.

    Raises:
        EngineError: further apart than rounding explains.
    """
    backbone = network.backbone
    expected = backbone.finish(state, token_capacity=capacity)
    of_torch = network.decode(expected).logits
    wrong, found = _apart(logits, ids, of_torch, expected.cluster_ids, backbone.decides)
    # A head without a final norm has logits of any size, and rounding errors to match.
    allowed, tied = LOGIT_TOLERANCE * max(1.0, 0.1 * float(of_torch.abs().max())), _TIED_TOKENS
    if backbone.decides:
        allowed = max(allowed, _undecided(network, images, of_torch))
    is_doubtful = backbone.merges and not (wrong <= tied and found <= allowed)
    for rounded in _roundings(images) if is_doubtful else ():
        state = backbone.encode(rounded)
        state = backbone.exempt(state, exempt) if exempt.any() else state
        again = backbone.finish(state, token_capacity=capacity)
        flips, jump = _apart(network.decode(again).logits, again.cluster_ids, of_torch, expected.cluster_ids)
        tied, allowed = max(tied, _JUMPS * flips), max(allowed, _JUMPS * jump)
    if wrong > tied:
        raise EngineError(
            f"export: the tokens that are kept, or the clusters of merged ones, are not PyTorch's {where}: "
            f"{wrong:.0%} differ; the file was removed; {_OTHER_VERSIONS}"
        )
    if not found <= allowed:  # a NaN is no match either
        raise EngineError(
            f"export: logits differ from PyTorch's by {found:.2g} {where}, allowed {allowed:.2g}; the file was "
            f"removed; {_OTHER_VERSIONS}"
        )
    return found, is_doubtful


def _apart(
    logits: Tensor, ids: Tensor | None, of_torch: Tensor, expected_ids: Tensor | None, decides: bool = False
) -> tuple[float, float]:
    """Share of tokens that were decided differently, and how far logits lie apart: nine tenths of them, if any was."""
    none = torch.zeros(1, dtype=torch.int64)
    wrong = float((none if ids is None else ids).ne(none if expected_ids is None else expected_ids).float().mean())
    differences = (logits - of_torch).abs().flatten()
    return wrong, float(np.quantile(differences.numpy(), 0.9) if wrong or decides else differences.max())


def _roundings(images: Tensor) -> Iterator[Tensor]:
    """Images as other orders of summation could have them: pairs of tokens that are equally alike may then swap."""
    generator = torch.Generator().manual_seed(0)
    for size in (0.1 * _ROUNDING, 0.3 * _ROUNDING, _ROUNDING) * 8:
        yield images + size * torch.randn(images.shape, generator=generator)


def _undecided(network: Segmenter, images: Tensor, logits: Tensor) -> float:
    """Four times what one rounding error of the input does to PyTorch's own logits, at most 2 % of their spread.

    One token that is as close to one centre as to another changes attention for all tokens, if it falls to the other.
    """
    generator = torch.Generator().manual_seed(0)
    rounded = images + _ROUNDING * torch.randn(images.shape, generator=generator)
    differences = (network.decode(network.backbone.finish(network.backbone.encode(rounded))).logits - logits).abs()
    return min(4 * float(np.quantile(differences.numpy(), 0.9)), 0.02 * float(logits.std()))


def _settings(backbone: Backbone, state: Any, tokens_total: int, many: bool) -> list[tuple[float, int]]:
    """Pairs of threshold and capacity, among them thresholds that split this image's tokens."""
    if not backbone.merges:
        return [(1.0, 0), (0.5, 3)]
    splitting = [_threshold_for(backbone, state, round(share * tokens_total)) for share in (0.2, 0.6)]
    few = [(1.0, 0), (splitting[0], 0), (1.0, tokens_total // 3)]
    rest = [(0.0, 0), (0.5, 0), (splitting[1], 0), (0.5, 1), (1.0, tokens_total // 2), (splitting[1], tokens_total)]
    return few + rest if many else few


def _threshold_for(backbone: Backbone, state: Any, kept: int) -> float:
    """A threshold that keeps about that many tokens, by bisection of its logit."""
    low, high = -16.0, 16.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if int(backbone.count_kept(state, _sigmoid(middle)).max()) < kept else (low, middle)
    return _sigmoid(high)


def _capacity(backbone: Backbone, state: Any, merge_threshold: float, token_capacity: int, exempt: Tensor) -> int:
    kept = int(backbone.count_kept(state, merge_threshold).max())
    return choose_capacity(default_ladder(len(exempt)), kept, token_capacity, int(exempt.sum()))


def _moved(merge_threshold: float, margin: float) -> float:
    """A threshold whose logit is `margin` higher; 0 and 1 stay."""
    if not 0.0 < merge_threshold < 1.0:
        return merge_threshold
    return _sigmoid(math.log(merge_threshold / (1.0 - merge_threshold)) + margin)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
