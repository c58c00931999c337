# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The one importer of weights: every known layout to this package's names, for training and for model folders alike.

Layouts: our own; OpenMMLab's (see `official`); ClusTR's (YtongXie/ClusTR); and timm's `vision_transformer`, in which
augreg (Steiner et al., arXiv 2106.10270), DeiT and DeiT III are published. Files are read with `weights_only=True`;
nothing in them is ever executed, and a checkpoint's own configuration, Python text in the file, is read as literals.

Our ViT has fewer parameters than some of them; what it lacks does the same when it is folded into what it has:

* a bias of the patch projection is a constant on every patch token, so it goes into the position embedding;
* layer scale multiplies a branch's output, so it goes into the branch's last layer;
* a position embedding without an entry for the class token gets a zero there.

A class or distillation token's own head is left out, as is a distillation token.
"""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks.official import from_official

_WRAPPERS = ("state_dict", "model", "model_state", "module")
_STAGE = re.compile(r"(patch_embed|block|norm)([1-4])\.(.+)")
_ROOMS = {"patch_embed": "patch_embed", "block": "blocks", "norm": "norm"}
# Coarse clusters stand for these many tokens, squared, in every published size; no parameter's shape tells.
PUBLISHED_SR_RATIOS = (8, 4, 2, 1)
# What belongs to classification.
_LEFT_OUT = re.compile(r"(head|head_dist|fc_norm|pre_logits|head_drop)\.|dist_token$|backbone\.head\.")


class Checkpoint(NamedTuple):
    """A file of weights.

    Attributes:
        weights: parameter names, as they are in the file, to tensors.
        model: the `model` section of the configuration that the file carries; empty when it carries none.
        grid_size: (h, w) patches of the position embedding, where the file says so.
    """

    weights: dict[str, Tensor]
    model: dict[str, Any]
    grid_size: tuple[int, int] | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of weights without executing anything in it.

    Args:
        path: `.safetensors` file, or what `torch.load` reads with `weights_only=True`; the weights may lie below
            `state_dict`, `model`, `model_state` or `module`, beside whatever else a training saved.

    Raises:
        ModelError: unreadable, or no weights in it.
    """
    grid_size = None
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("grid_size", "")
            if re.fullmatch(r"\d+x\d+", text):
                height, width = map(int, text.split("x"))
                grid_size = height, width
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{path}: cannot be read as weights of plain tensors ({reason}); pass a .safetensors file, or, if it is a "
            "training checkpoint with other objects in it, save its state_dict alone"
        ) from error
    meta = content.get("meta", {}) if isinstance(content, dict) else {}
    text = meta.get("cfg", "") if isinstance(meta, dict) else ""
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not weights:
        raise ModelError(f"{path}: holds no tensors by name; expected a state_dict of tensors")
    return Checkpoint(weights, _model_section(text) if isinstance(text, str) else {}, grid_size)


class Imported(NamedTuple):
    """Weights by this package's names, whatever layout they came in.

    Attributes:
        weights: `backbone.*` and `head.*` to tensors; names that have no place here keep theirs.
        grid_size: (h, w) patches of the position embedding, where it is known; None else.
        left_out: names in the file that a segmentation network has no use for.
    """

    weights: dict[str, Tensor]
    grid_size: tuple[int, int] | None = None
    left_out: Sequence[str] = ()


def import_weights(checkpoint: Checkpoint) -> Imported:
    """Weights of any known layout by our names, what we have no parameter for folded into what does the same.

    Known are our own layout, OpenMMLab's (the official ClustViT and ViT segmenters and their encoders), ClusTR's, and
    timm's, in which augreg, DeiT and DeiT III are published.

    Raises:
        ModelError: a part that every network of its layout has is missing.
        ConfigError: the position embedding fits no grid.
    """
    weights = {name.removeprefix("module."): value for name, value in checkpoint.weights.items()}
    if any(name.startswith(("backbone.blocks.", "backbone.stages.")) for name in weights) and not _is_timm(weights):
        return Imported(weights, checkpoint.grid_size)
    if is_clustr(weights):
        return Imported(from_official_clustr(weights))
    if is_vit_encoder(weights):
        encoder = read_encoder(weights, checkpoint.grid_size)
        return Imported(encoder.weights, encoder.grid_size, encoder.left_out)
    if any(name.startswith("backbone.layers.") for name in weights):
        return Imported(from_official(weights))
    return Imported(weights, checkpoint.grid_size)


def _is_timm(weights: dict[str, Tensor]) -> bool:
    return any(name.removeprefix("backbone.") == "patch_embed.proj.weight" for name in weights)


class Encoder(NamedTuple):
    """A ViT encoder's weights by our names.

    Attributes:
        weights: `backbone.*` to tensors; names that have no place in a ViT keep theirs.
        shapes: `embed_dim`, `depth`, `patch_size` and `mlp_ratio` of `ViTConfig`, as the shapes tell them.
        grid_size: (h, w) patches of the position embedding.
        left_out: names in the file that a segmentation network has no use for.
    """

    weights: dict[str, Tensor]
    shapes: dict[str, Any]
    grid_size: tuple[int, int]
    left_out: list[str]


def is_vit_encoder(weights: dict[str, Tensor]) -> bool:
    """Whether these are weights of a ViT encoder without a decode head."""
    headless = not any(name.startswith("decode_head.") for name in weights)
    return headless and any(name.removeprefix("module.").removeprefix("backbone.") == "cls_token" for name in weights)


def read_encoder(weights: dict[str, Tensor], grid_size: tuple[int, int] | None = None) -> Encoder:
    """Rename and fold an encoder's weights.

    Args:
        weights: weights in timm's or OpenMMLab's layout, with or without the prefixes `module.` and `backbone.`.
        grid_size: (h, w) patches of the position embedding; None is square.

    Raises:
        ModelError: a part that every ViT has is missing.
        ConfigError: the position embedding does not fit the grid.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    left_out = sorted(name for name in weights if _LEFT_OUT.match(name))
    weights = {name: tensor for name, tensor in weights.items() if name not in set(left_out)}
    weights = {f"backbone.{name.removeprefix('backbone.')}": tensor for name, tensor in weights.items()}
    if "backbone.patch_embed.proj.weight" in weights:
        weights = _fold_layer_scale(
            {name.replace("patch_embed.proj.", "patch_embed.projection."): value for name, value in weights.items()}
        )
    try:
        embed_dim = weights["backbone.cls_token"].shape[2]
        projection = weights["backbone.patch_embed.projection.weight"]
        num_positions = weights["backbone.pos_embed"].shape[1]
        has_distillation = any(name.endswith("dist_token") for name in left_out)
        grid_size, first = _find_grid(num_positions, has_distillation, grid_size)
        pos_embed = weights["backbone.pos_embed"]
        cls = pos_embed[:, :1] if first else torch.zeros_like(pos_embed[:, :1])
        weights["backbone.pos_embed"] = torch.cat([cls, pos_embed[:, first:]], dim=1)
        weights = from_official(weights)
        shapes = {
            "embed_dim": embed_dim,
            "depth": 1 + max(map(int, re.findall(r"backbone\.blocks\.(\d+)\.", "\n".join(weights))), default=-1),
            "patch_size": projection.shape[2],
            "mlp_ratio": weights["backbone.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        }
    except KeyError as error:
        raise ModelError(
            f"encoder weights have no {error.args[0]}; expected a ViT in timm's or OpenMMLab's layout"
        ) from error
    return Encoder(weights, shapes, grid_size, left_out)


def resize_positions(pos_embed: Tensor, grid_size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A position embedding for another grid, bicubic as the networks do it: (1, 1+h*w, C) -> (1, 1+h'*w', C)."""
    if grid_size == target:
        return pos_embed
    cls, grid = pos_embed[:, :1].float(), pos_embed[:, 1:].float()
    grid = F.interpolate(grid.transpose(1, 2).unflatten(2, grid_size), size=target, mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)


def is_clustr(weights: dict[str, Tensor]) -> bool:
    """Whether official names look like those of a ClusTR network, with or without a detector's `backbone.` prefix."""
    return any(name.removeprefix("backbone.") == "patch_embed1.proj.weight" for name in weights)


def from_official_clustr(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official parameter names to those of `ClusTRClassifier`, or, without its `head.`, of a segmenter's backbone.

    Raises:
        ModelError: a name of no ClusTR network.
    """
    weights = {}
    for name, tensor in state_dict.items():
        bare = name.removeprefix("backbone.")
        found = _STAGE.fullmatch(bare)
        if found:
            room, stage, rest = found.groups()
            rest = rest.replace("mlp.dwconv.dwconv.", "mlp.dwconv.")
            weights[f"backbone.stages.{int(stage) - 1}.{_ROOMS[room]}.{rest}"] = tensor
        elif bare in ("head.weight", "head.bias"):
            weights[bare] = tensor
        else:
            raise ModelError(f"checkpoint: {name} is no parameter of a ClusTR network; expected the official layout")
    return weights


def clustr_shape(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Hyper-parameters of `ClusTR` that an official checkpoint's shapes tell.

    Heads and reductions show in no shape: 64 channels per head and the published 8, 4, 2, 1 are assumed, where stages
    with a `weight_layer` cluster and others do not.

    Raises:
        ModelError: parameters that every ClusTR has are missing.
    """
    weights = {name.removeprefix("backbone."): tensor for name, tensor in state_dict.items()}
    dims, depths, ratios, sr_ratios = [], [], [], []
    try:
        for stage in range(1, 5):
            dim = weights[f"patch_embed{stage}.proj.weight"].shape[0]
            blocks = {int(m[1]) for name in weights if (m := re.match(rf"block{stage}\.(\d+)\.", name))}
            clusters = f"block{stage}.0.attn.weight_layer.weight" in weights
            dims.append(dim)
            depths.append(len(blocks))
            ratios.append(weights[f"block{stage}.0.mlp.fc1.weight"].shape[0] / dim)
            sr_ratios.append(PUBLISHED_SR_RATIOS[stage - 1] if clusters else 1)
    except KeyError as error:
        raise ModelError(f"checkpoint has no {error.args[0]}; expected a ClusTR of four stages") from error
    return {
        "embed_dims": dims, "depths": depths, "mlp_ratios": ratios, "sr_ratios": sr_ratios,
        "num_heads": [max(dim // 64, 1) for dim in dims],
    }  # fmt: skip


def _find_grid(
    num_positions: int, has_distillation: bool, grid_size: tuple[int, int] | None
) -> tuple[tuple[int, int], int]:
    """The grid of a position embedding, and how many entries come before it."""
    for first in (2,) if has_distillation else (1, 0):
        count = num_positions - first
        if grid_size is not None and grid_size[0] * grid_size[1] == count:
            return grid_size, first
        side = round(count**0.5)
        if grid_size is None and side * side == count:
            return (side, side), first
    expected = "a square grid" if grid_size is None else f"{grid_size[0]} x {grid_size[1]} patches"
    raise ConfigError(
        f"position embedding: got {num_positions} entries, expected {expected} and a class token; pass the size in "
        "pixels that it was trained with"
    )


def _fold_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    folded = dict(weights)
    for name, gamma in weights.items():
        found = re.fullmatch(r"(backbone\.blocks\.\d+\.)(ls1\.gamma|ls2\.gamma|gamma_1|gamma_2)", name)
        if found:
            del folded[name]
            layer = found[1] + ("attn.proj" if "1" in found[2] else "mlp.fc2")
            folded[f"{layer}.weight"] = gamma[:, None] * weights[f"{layer}.weight"]
            folded[f"{layer}.bias"] = gamma * weights[f"{layer}.bias"]
    return folded


def _model_section(text: str) -> dict[str, Any]:
    """The `model = dict(...)` of a configuration text, literals and dict() calls only; empty when there is none."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "model":
            value = _literal(node.value)
            return value if isinstance(value, dict) else {}
    return {}


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
