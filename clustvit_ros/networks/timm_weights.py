"""Encoders trained elsewhere: ViT weights in timm's layout (augreg, DeiT, DeiT III) and OpenMMLab's, for a fresh head.

Our encoder has fewer parameters than some of them; what it lacks does the same when it is folded into what it has:

* a bias of the patch projection is a constant on every patch token, so it goes into the position embedding;
* layer scale multiplies a branch's output, so it goes into the branch's last layer;
* a position embedding without an entry for the class token gets a zero there.

A class or distillation token's own head is left out, as is a distillation token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.errors import ConfigError, ModelError

# What belongs to classification.
_LEFT_OUT = re.compile(r"(head|head_dist|fc_norm|pre_logits|head_drop)\.|dist_token$|backbone\.head\.")


class Encoder(NamedTuple):
    """An encoder's weights by our names.

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


def is_encoder(weights: dict[str, Tensor]) -> bool:
    """Whether these are weights of a ViT encoder without a decode head."""
    headless = not any(name.startswith("decode_head.") for name in weights)
    return headless and any(name.removeprefix("module.").removeprefix("backbone.") == "cls_token" for name in weights)


def read_encoder(
    weights: dict[str, Tensor], rename: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    grid_size: tuple[int, int] | None = None,
) -> Encoder:  # fmt: skip
    """Rename and fold an encoder's weights.

    Args:
        weights: in timm's or OpenMMLab's layout, with or without the prefixes `module.` and `backbone.`.
        rename: from OpenMMLab's names to ours (`official.from_official`).
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
        weights = rename(fold_patch_bias(weights))
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


def fold_patch_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights (OpenMMLab's names) without a bias of the patch projection, which is added to all patches' positions."""
    bias = weights.get("backbone.patch_embed.projection.bias")
    if bias is None or "backbone.pos_embed" not in weights:
        return weights
    weights = {name: tensor for name, tensor in weights.items() if name != "backbone.patch_embed.projection.bias"}
    pos_embed = weights["backbone.pos_embed"]
    weights["backbone.pos_embed"] = torch.cat([pos_embed[:, :1], pos_embed[:, 1:] + bias], dim=1)
    return weights


def resize_positions(pos_embed: Tensor, grid_size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A position embedding for another grid, bicubic as the networks do it: (1, 1+h*w, C) -> (1, 1+h'*w', C)."""
    if grid_size == target:
        return pos_embed
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, grid_size)
    grid = F.interpolate(grid, size=target, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


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
