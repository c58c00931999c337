# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Model folders: `model.yaml` and `model.safetensors` together are a model; nothing in them is ever unpickled."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from clustvit_ros.classes import ClassEntry, ClassSet
from clustvit_ros.config import from_mapping, read_yaml, to_mapping
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks.architectures import build_network, check_sizes, network_config
from clustvit_ros.networks.segmenter import NetworkConfig, Segmenter, check_shapes, check_weights
from clustvit_ros.paths import MODEL_FILE, find_model, hash_file, model_name, replacing

_LOG = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
# Far above any vision transformer; what is within is held against the weights before memory is spent on it.
_LARGEST_INPUT_PX, _MOST_INPUT_PIXELS = 8192, 4096 * 4096
TEMPERATURES = (0.05, 20.0)
"""Range of a model's temperature."""
_MOST_CLASSES = 65_535  # of a mono16 mask


@dataclass(frozen=True)
class InputConfig:
    """How a camera image becomes the network's input.

    Args:
        size: (height, width) in pixels the model was trained for.
        mean, std: per channel (RGB), on the 0..255 scale: normalised = (value - mean) / std.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ConfigError(f"input: size is {list(self.size)}, expected positive (height, width)")
        if max(self.size) > _LARGEST_INPUT_PX or self.size[0] * self.size[1] > _MOST_INPUT_PIXELS:
            raise ConfigError(
                f"input: size is {list(self.size)}, expected at most {_LARGEST_INPUT_PX} px each and "
                f"{_MOST_INPUT_PIXELS} pixels in all (4096x4096); images are resized to what stands there"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"input: std is {list(self.std)}, expected positive numbers")


@dataclass(frozen=True)
class MeasuredPoint:
    """An operating point and what it is worth, measured on labelled images.

    Args:
        size: (height, width) of the network's input, in whole patches.
        capacity: most tokens kept of those at that size.
        miou: percent.
        agreement: share of pixels that equal the full network's, 0..1.
        merging: way to merge that it was measured with; empty is the model's.
    """

    size: tuple[int, int]
    capacity: int
    miou: float
    agreement: float
    merging: str = ""


@dataclass(frozen=True)
class _ModelFile:
    """What `model.yaml` may hold; `training`, `scores` and `licence` are for people and are passed through.

    `merging` stands for the same in `network`, where it is kept.
    """

    architecture: str
    classes: tuple[ClassEntry, ...]
    input: InputConfig
    format: Literal[1] = 1
    merging: str = ""
    network: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    operating_points: tuple[MeasuredPoint, ...] = ()
    temperature: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A model without its weights.

    Args:
        name: the folder's name; of a run folder's `model`, the run's.
        architecture: a name in `ARCHITECTURES`.
        network: its hyper-parameters, overrides applied.
        classes: names and colours.
        input: size and normalisation.
        overrides: what `network` states beyond the architecture, as written.
        training, scores, licence: provenance, free form.
        operating_points: input sizes and capacities, and what they are worth; empty where nobody measured.
        temperature: what class logits are divided by, so that a confidence is the share of such pixels that are right
            (Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599); 1 leaves them as trained.
    """

    name: str
    architecture: str
    network: NetworkConfig
    classes: ClassSet
    input: InputConfig
    overrides: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    operating_points: tuple[MeasuredPoint, ...] = ()
    temperature: float = 1.0


def load_config(model: str | Path) -> ModelConfig:
    """Read and check `model.yaml` of a model folder or shipped model.

    Raises:
        ModelError: no such model.
        ConfigError: the file holds something unknown, mis-typed or out of range.
    """
    folder = find_model(model)
    where = str(folder / MODEL_FILE)
    content = from_mapping(_ModelFile, read_yaml(folder / MODEL_FILE), where)
    if len(content.classes) > _MOST_CLASSES:
        raise ConfigError(f"{where}: got {len(content.classes)} classes, expected at most {_MOST_CLASSES}")
    overrides = {**content.network, **({"merging": content.merging} if content.merging else {})}
    if content.network.get("merging", overrides.get("merging")) != overrides.get("merging"):
        raise ConfigError(
            f"{where}: merging is {content.merging!r} and in network {content.network['merging']!r}, expected it once"
        )
    check_sizes(overrides, f"{where}: network")
    network = network_config(content.architecture, overrides, f"{where}: network")
    points = _points_of(content.operating_points, network, where)
    check_points(points, content.input.size, network, where)
    low, high = TEMPERATURES
    if not low <= content.temperature <= high:
        raise ConfigError(f"{where}: temperature is {content.temperature:g}, expected {low:g} to {high:g}; 1 is none")
    return ModelConfig(
        name=model_name(folder), architecture=content.architecture, network=network,
        classes=ClassSet.of(content.classes), input=content.input, overrides=overrides, training=content.training,
        scores=content.scores, licence=content.licence, operating_points=points,
        temperature=content.temperature,
    )  # fmt: skip


def _points_of(points: tuple[MeasuredPoint, ...], network: NetworkConfig, where: str) -> tuple[MeasuredPoint, ...]:
    """Operating points of the way to merge that the network has now; those of another one say nothing of it."""
    method = getattr(network, "merge_method", "")
    kept = tuple(point for point in points if point.merging in ("", method))
    if len(kept) < len(points):
        _tell_once(
            f"{where}: {len(points) - len(kept)} operating_points were measured with another merging than {method!r} "
            "and are left out; `clustvit-ros tune --write` measures them anew"
        )
    return kept


@functools.cache
def _tell_once(text: str) -> None:
    _LOG.warning(text)


def check_points(
    points: tuple[MeasuredPoint, ...], full_size: tuple[int, int], network: NetworkConfig, where: str
) -> None:
    """Refuse operating points that a network cannot run, that nobody can have measured, or that stand there twice.

    Raises:
        ConfigError: which one, and why.
    """
    known = set()
    for point in points:
        _check_point(point, full_size, network, where)
        if (point.size, point.capacity) in known:
            raise ConfigError(
                f"{where}: operating_points: {point.size[0]}x{point.size[1]} with {point.capacity} tokens is there "
                "twice; expected each once"
            )
        known.add((point.size, point.capacity))


def _check_point(point: MeasuredPoint, full_size: tuple[int, int], network: NetworkConfig, where: str) -> None:
    """Refuse an operating point that the network cannot run, or that nobody can have measured."""
    where = f"{where}: operating_points: {point.size[0]}x{point.size[1]} with {point.capacity} tokens"
    patch_size = network.patch_size
    if min(point.size) < 1 or any(point.size[axis] > full_size[axis] for axis in (0, 1)):
        raise ConfigError(f"{where}: expected a size of at most the input's, {full_size[0]}x{full_size[1]}")
    if point.size != full_size and any(side % patch_size for side in point.size):
        raise ConfigError(f"{where}: expected sides that are multiples of the patch size, {patch_size}")
    tokens_total = -(-point.size[0] // patch_size) * -(-point.size[1] // patch_size)
    if not (1 if network.merges else tokens_total) <= point.capacity <= tokens_total:
        expected = f"1 to {tokens_total}" if network.merges else f"{tokens_total}, all of them: the network merges none"
        raise ConfigError(f"{where}: expected {expected}")
    if not (0.0 <= point.miou <= 100.0 and 0.0 <= point.agreement <= 1.0):
        raise ConfigError(
            f"{where}: got miou {point.miou:g} and agreement {point.agreement:g}, expected percent from 0 to 100 and a "
            "share from 0 to 1"
        )


def check_folder(model: str | Path) -> tuple[ModelConfig, int]:
    """Hold a model's weights file against its configuration, by the file's header.

    Returns:
        The model's configuration, and the bytes of its weights file.

    Raises:
        ModelError: no such model, or weights that do not fit its configuration.
        ConfigError: `model.yaml` cannot be used.
    """
    config, path = load_config(model), weights_path(model)
    _check_file(_hollow_network(config), path, config.network.unused_weights)
    return config, path.stat().st_size


def load_segmenter(model: str | Path) -> Segmenter:
    """Load a model folder, or a shipped model by name, as a network in evaluation mode on the CPU, float32.

    Raises:
        ModelError: no such model, or weights that do not fit its configuration.
        ConfigError: `model.yaml` cannot be used.
    """
    config = load_config(model)
    network = _hollow_network(config)
    load_weights(network, weights_path(model), config.network.unused_weights)
    network.temperature = config.temperature
    return network.eval()


class _LeaveUnset(TorchFunctionMode):
    """Skips whatever sets a tensor's values: on the meta device PyTorch loads its compiler for them, a second."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name.endswith("_") and not name.endswith("__"):  # as PyTorch names what works in place
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _hollow_network(config: ModelConfig) -> Segmenter:
    """A model's network without memory for its weights: model.yaml may lie about them."""
    with torch.device("meta"), _LeaveUnset():
        return build_network(config.network, len(config.classes))


def weights_path(model: str | Path) -> Path:
    """The weights file of a model folder or shipped model.

    Raises:
        ModelError: no such model, or weights that are no file inside the model's folder.
    """
    return inside(find_model(model), WEIGHTS_FILE)


def inside(folder: Path, name: str) -> Path:
    """The path of a model's file, which must not lead out of the model's folder.

    A folder of links (`colcon build --symlink-install` makes one) counts as the folder that its `model.yaml` is in.

    Raises:
        ModelError: missing, no regular file, or a link to somewhere else.
    """
    path = folder / name
    real = path.resolve()
    if (folder / MODEL_FILE).resolve().parent not in real.parents:
        raise ModelError(f"{path}: leads to {real}, outside of the model's folder; put the file itself there")
    if not real.is_file():
        raise ModelError(f"{path}: cannot be read (no such file); fetch the model again")
    return path


def load_weights(network: Segmenter, path: Path, unused: tuple[str, ...] = ()) -> None:
    """Fill a network from a safetensors file; half-precision weights become the network's own precision.

    Args:
        network: changed in place; one on the meta device gets its memory here.
        path: safetensors file.
        unused: beginnings of names that may be in the file though the network has no use for them.

    Raises:
        ModelError: unreadable file, names or shapes that differ, each listed, or values that are no numbers.
    """
    _check_file(network, path, unused)
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names if not name.startswith(unused)}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); fetch the model again") from error
    check_weights(network, weights, str(path))
    hollow = {name: tensor.dtype for name, tensor in network.state_dict().items() if tensor.is_meta}
    weights |= {name: weights[name].to(dtype, copy=True) for name, dtype in hollow.items()}  # aligned, as sums need it
    network.load_state_dict(weights, assign=bool(hollow))


def _check_file(network: Segmenter, path: Path, unused: tuple[str, ...] = ()) -> None:
    """Hold a safetensors file's header against a network, before any tensor is read."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items() if not name.startswith(unused)}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); fetch the model again") from error
    check_shapes(network, shapes, str(path))


def hash_weights(model: str | Path) -> str:
    """SHA-256 of a model's weights file, as `sha256sum` prints it.

    Raises:
        ModelError: no such model, or no weights in it.
    """
    path = weights_path(model)
    try:
        return hash_file(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); fetch the model again") from error


def hash_model(config: ModelConfig, weights_sha256: str) -> str:
    """SHA-256 of all that decides a model's masks and cost: what was measured or compiled for another does not hold.

    Args:
        config: the model's, whose network, input and temperature count.
        weights_sha256: hash of its weights file.

    Returns:
        Empty where `weights_sha256` is.
    """
    facts = weights_sha256, asdict(config.network), asdict(config.input), config.temperature
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest() if weights_sha256 else ""


def save_model(folder: Path, config: ModelConfig, network: Segmenter, dtype: torch.dtype = torch.float32) -> None:
    """Write `model.yaml` and `model.safetensors`.

    Args:
        folder: made if it does not exist; files in it are replaced.
        dtype: type of floating-point weights on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in network.state_dict().items()
    }
    with replacing(folder / WEIGHTS_FILE) as partial:
        save_file(weights, partial)
        partial.chmod(0o644)  # safetensors writes for the owner alone, and an installed model is read by others
    save_config(folder, config)


def save_config(folder: Path, config: ModelConfig) -> None:
    """Write `model.yaml`; readers see the old file or the new one, never half of it."""
    content: dict[str, Any] = {
        "format": 1,
        "architecture": config.architecture,
        "network": config.overrides,
        "classes": config.classes.entries(),
        "input": {"size": list(config.input.size), "mean": list(config.input.mean), "std": list(config.input.std)},
        "training": config.training,
        "scores": config.scores,
        "licence": config.licence,
    }
    if config.temperature != 1.0:
        content["temperature"] = config.temperature
    if config.operating_points:
        points = map(to_mapping, config.operating_points)
        content["operating_points"] = [{k: v for k, v in point.items() if v != ""} for point in points]
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    with replacing(folder / MODEL_FILE, shared=True) as partial:
        partial.write_text(text, encoding="utf-8")
