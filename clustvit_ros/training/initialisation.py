# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Starting weights from elsewhere: our own encoders and models, and whatever `networks.weights` imports.

What fits is loaded, position embeddings are resized to the network's grid, and everything else is listed.

Starting a wider network from a narrower one, so that it computes the same before its first step.

Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", arXiv 1511.05641: every channel is
copied, and what reads a channel shares its weight out among the copies. Drawn shares, where equal ones would do, give
the copies different gradients, or they would stay copies for ever. A transformer's LayerNorm sees the same mean and
variance over copied channels, and its heads keep their size, so there are as many times more of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks.checkpoint import read_checkpoint
from clustvit_ros.networks.model_folder import WEIGHTS_FILE, load_config, load_segmenter
from clustvit_ros.networks.segmenter import Segmenter, check_weights
from clustvit_ros.networks.vit import VisionTransformer
from clustvit_ros.networks.weights import POSITIONS, fit_positions, import_weights
from clustvit_ros.paths import MODEL_FILE, find_model, replacing
from clustvit_ros.training.recipe import Recipe

ENCODER_FILE = "encoder.safetensors"


class InitReport(NamedTuple):
    """What became of a file of weights.

    Attributes:
        source: the file.
        loaded: names of the network that were filled.
        resized: those of them whose position embedding was resized.
        missing: names of the network that keep their random values.
        unknown: names of the file that have no place.
        mismatched: names that exist on both sides with different shapes, and which.
        widened: how many times as wide as the file the network is; 1 is as wide.
        deepened: further blocks than the file has, which start as the identity.
        new_classes: those that the file's model has not, where it is known which it has.
    """

    source: str
    loaded: list[str]
    resized: list[str]
    missing: list[str]
    unknown: list[str]
    mismatched: list[str]
    widened: int = 1
    deepened: int = 0
    new_classes: Sequence[str] = ()

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        if self.widened > 1:
            parts.append(f"widened {self.widened} times")
        if self.deepened:
            parts.append(f"{self.deepened} further blocks start as the identity")
        for title, names in (
            ("classes that start random", self.new_classes),
            ("resized", self.resized),
            ("left random", self.missing),
            ("not used", self.unknown),
            ("of another shape", self.mismatched),
        ):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                parts.append(f"{title}: {', '.join(names[:8])}{more}")
        return "; ".join(parts)


def load_init(network: Segmenter, source: str | Path, classes: Sequence[str] = ()) -> InitReport:
    """Fill a network with what fits from a file or model folder.

    Weights of a ViT half as wide, or any other whole part, are widened: see `widen`. Blocks behind a shallower ViT's
    start as the identity: what they add is 0 (as Net2DeeperNet; Chen et al., arXiv 1511.05641).

    Args:
        network: its backbone has to be a ViT as this package builds it; changed in place.
        source: a model folder, the name of one that is shipped or that the user got, or a file of weights
            (.safetensors, or what `torch.load` reads with `weights_only=True`).
        classes: names of the network's classes, of a joint training those of its own data, which stand first in the
            classifier. Where the weights are a model's, each class starts as the one of its name there; where nobody
            says what their classes are, a classifier of just so many is taken row by row.

    Raises:
        ModelError: unreadable, or nothing in it fits.
    """
    path = _find(source)
    imported = import_weights(read_checkpoint(path))
    weights, own, resized = dict(imported.weights), network.state_dict(), []
    if POSITIONS in weights and isinstance(network.backbone, VisionTransformer):
        fitted = fit_positions(weights[POSITIONS], imported.grid_size, network.backbone.grid_size)
        resized = [] if fitted is weights[POSITIONS] else [POSITIONS]
        weights[POSITIONS] = fitted
    times = _times_wider(network, weights)
    if times > 1:
        weights = widen(weights, {name: value.shape for name, value in own.items()}, times)
    known = _classes_beside(path)
    if classes and known is not None:
        rows = [known.index(name) if name in known else None for name in classes]
    else:
        known, rows = None, list(range(len(classes)))
    for name, axis in _CLASS_ROWS.items():
        if name in own and name in weights:
            placed = _placed(weights[name], own[name], rows, axis, known is not None)
            if placed is not None:
                weights[name] = placed
            elif known is not None:
                del weights[name]  # as many classes as here, perhaps, but others
    matching = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    # The norm statistics of a stem mean nothing without its kernels, so counters alone are no fit.
    if not any(value.ndim >= 2 for value in matching.values()):
        expected = "a ClusTR of the same widths in its own layout or this package's"
        if isinstance(network.backbone, VisionTransformer):
            parts = f"width {network.backbone.embed_dim} or a whole part of it"
            expected = f"a ViT of {parts} in the layout of this package, timm or mmsegmentation"
        raise ModelError(f"{path}: none of its {len(weights)} tensors fits the network; expected {expected}")
    mismatched = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in weights.items()
        if name in own and own[name].shape != value.shape
    ]
    check_weights(network, {**own, **matching}, str(path))
    network.load_state_dict({name: value.to(own[name].dtype) for name, value in matching.items()}, strict=False)
    further = _silence_further_blocks(network, matching)
    return InitReport(
        source=str(path), loaded=sorted(matching), resized=[name for name in resized if name in matching],
        missing=[name for name in own if name not in matching and not name.startswith(tuple(further))],
        unknown=sorted([*imported.left_out, *(name for name in weights if name not in own)]), mismatched=mismatched,
        widened=times, deepened=len(further),
        new_classes=[name for name in classes if known is not None and name not in known],
    )  # fmt: skip


# What of a head has a row for each class, and the axis of those.
_CLASS_ROWS = {
    "head.classify.weight": 0, "head.classify.bias": 0, "head.class_embed": 1, "head.mask_norm.weight": 0,
    "head.mask_norm.bias": 0,
}  # fmt: skip


def _placed(value: Tensor, target: Tensor, rows: Sequence[int | None], axis: int, named: bool) -> Tensor | None:
    """The target's tensor with rows of another network's; None where they do not fit or there are none.

    Args:
        value: what was read.
        target: what it is for, with its initial values.
        rows: for each of the target's first rows the one in `value`, or None.
        axis: of the rows.
        named: the rows are known to be those; else they are, where there are just as many.
    """
    if value.ndim != target.ndim or target.shape[axis] < len(rows):
        return None
    if value.select(axis, 0).shape != target.select(axis, 0).shape or (not named and value.shape[axis] != len(rows)):
        return None
    pairs = [(place, row) for place, row in enumerate(rows) if row is not None]
    placed = target.clone()
    for place, row in pairs:
        placed.select(axis, place).copy_(value.select(axis, row))
    return placed if pairs else None


def _classes_beside(path: Path) -> tuple[str, ...] | None:
    """Names of a model's classes; None where the weights are no model's."""
    return load_config(path.parent).classes.names if (path.parent / MODEL_FILE).is_file() else None


# What a block's two branches end in.
_LAST_OF_BRANCHES = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")


def _silence_further_blocks(network: Segmenter, loaded: Collection[str]) -> list[str]:
    """Blocks of which nothing was loaded, behind some of which all was, add 0; what their tensors' names begin with."""
    if not isinstance(network.backbone, VisionTransformer):
        return []
    starts = [f"backbone.blocks.{index}." for index in range(len(network.backbone.blocks))]
    filled = [any(name.startswith(start) for name in loaded) for start in starts]
    further = [start for start, full in zip(starts, filled, strict=True) if filled[0] and not full]
    for start in further:
        for name in _LAST_OF_BRANCHES:
            nn.init.zeros_(network.get_parameter(start + name))
    return further


def _times_wider(network: Segmenter, weights: dict[str, Tensor]) -> int:
    """How many times as wide as the weights' ViT the network's is; 1 where it is no whole number."""
    source = weights.get("backbone.cls_token")
    if source is None or not isinstance(network.backbone, VisionTransformer):
        return 1
    width, source_width = network.backbone.embed_dim, source.shape[-1]
    return width // source_width if width % source_width == 0 else 1


def save_encoder(path: Path, backbone: VisionTransformer) -> None:
    """Write a backbone for `load_init`, without what pre-training does not reach (clusterer, regenerator).

    Args:
        path: `.safetensors` file; it is replaced when the new one is complete.
        backbone: as `Segmenter.backbone`.
    """
    skipped = ("clusterer.", "regenerator.")
    weights = {
        f"backbone.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in backbone.state_dict().items()
        if not name.startswith(skipped)
    }
    grid = "x".join(map(str, backbone.grid_size))
    with replacing(path) as partial:
        save_file(weights, partial, metadata={"grid_size": grid})
        partial.chmod(0o644)


def known_classes(source: str) -> Sequence[str]:
    """Classes that weights can tell at the start: those of the model that `source`, as for `load_init`, is; or none."""
    return (_classes_beside(_find(source)) if source else None) or ()


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    try:
        return find_model(source) / WEIGHTS_FILE
    except ModelError as error:
        found = f"is a folder without {MODEL_FILE}" if path.is_dir() else "does not exist"
        raise ModelError(
            f"init: {source} {found}; expected a file of weights, a model folder, or the name of a model that is "
            "shipped or that `clustvit-ros get` brought"
        ) from error


# Weights that hold several matrices side by side: queries, keys and values along the rows; token and representative
# along the columns.
_ROW_PARTS = {r"\.attn\.qkv\.": 3}
_COLUMN_PARTS = {r"\bbackbone\.(later_)?regenerators?\.(\d+\.)?fc1\.weight$": 2}
# A vector of channels per token or class: (1, N, C), no matrices.
_EMBEDDINGS = re.compile(r"(cls_token|pos_embed|class_embed)$")
# Whose rows are classes or clusters: twice as many of them are not the same ones twice.
_SCORES = re.compile(r"(\bhead\.classify|\bhead\.mask_norm|clusterers?(\.\d+)?\.fc2)\.(weight|bias)$")


def widen(weights: dict[str, Tensor], shapes: dict[str, torch.Size], times: int) -> dict[str, Tensor]:
    """Weights for a network that is `times` as wide, and computes the same.

    Exactly so (up to rounding) for the ViT, its Clusterer and Regenerator, and the segmenter, linear and detail heads.

    Args:
        weights: tensors of the narrow network, by name.
        shapes: shapes of the wide network's tensors, by name.
        times: how often each channel is copied. Which axes of a tensor hold such channels is seen from the shapes.

    Returns:
        `weights`, widened along those axes; what else differs between the networks (classes, positions) still does.
    """
    return {
        name: _widened(name, value, shapes[name], times) if name in shapes else value for name, value in weights.items()
    }


def _widened(name: str, value: Tensor, shape: torch.Size, times: int) -> Tensor:
    if len(shape) != value.ndim:
        return value
    embedding = _EMBEDDINGS.search(name) is not None
    first = 2 if embedding else 1 if _SCORES.search(name) else 0
    axes = [axis for axis in range(first, value.ndim) if shape[axis] == times * value.shape[axis]]
    for axis in axes:
        value = _copied(value, axis, times, _parts(_COLUMN_PARTS if axis == 1 else _ROW_PARTS, name))
    if 1 in axes:
        # In float32: shares that are rounded to a shipped model's float16 would not sum to 1.
        value = value.float() * _shares(value, times, _parts(_COLUMN_PARTS, name))
    return value


def _parts(patterns: dict[str, int], name: str) -> int:
    return next((parts for pattern, parts in patterns.items() if re.search(pattern, name)), 1)


def _copied(value: Tensor, axis: int, times: int, parts: int) -> Tensor:
    return torch.cat([chunk for part in value.chunk(parts, axis) for chunk in [part] * times], axis)


def _shares(value: Tensor, times: int, parts: int) -> Tensor:
    """Random shares of the copies along axis 1, that sum to 1: as `value`, kernel positions sharing theirs."""
    rows, columns = value.shape[:2]
    drawn = torch.rand(rows, parts, times, columns // (parts * times)) + 0.1
    shares = drawn / drawn.sum(dim=2, keepdim=True)
    return shares.reshape(rows, columns, *[1] * (value.ndim - 2))


def load_teacher(name: str, recipe: Recipe) -> Segmenter:
    """A further model that a recipe learns from.

    Raises:
        ModelError: there is no such model.
        ConfigError: its classes or the normalisation of its input are others.
    """
    config, names = load_config(name), tuple(entry.name for entry in recipe.classes)
    if config.classes.names != names:
        raise ConfigError(
            f"schedule: teachers: {name} has the classes {', '.join(config.classes.names)}; expected {', '.join(names)}"
        )
    if (config.input.mean, config.input.std) != (recipe.input.mean, recipe.input.std):
        raise ConfigError(
            f"schedule: teachers: {name} is normalised by {config.input.mean} and {config.input.std}, expected the "
            f"recipe's {recipe.input.mean} and {recipe.input.std}"
        )
    return load_segmenter(name).requires_grad_(False)
