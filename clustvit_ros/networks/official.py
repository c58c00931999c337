# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Official checkpoints, of ClustViT (OpenMMLab's layout) and of ClusTR: key names to ours, and what their shapes tell.

Heads of the former: Segmenter's mask transformer, UPerNet with or without mmsegmentation's neck, and a single 1x1
convolution, which is our linear head. Auxiliary heads serve training only and are left out. ClusTR's (YtongXie/ClusTR)
are classifiers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks.architectures import ARCHITECTURES
from clustvit_ros.networks.checkpoint import image_size_of
from clustvit_ros.networks.heads import NUM_LEVELS
from clustvit_ros.networks.vit_config import ViTConfig

_BLOCK = {
    "ln1": "norm1", "ln2": "norm2", "attn.attn.in_proj_": "attn.qkv.", "attn.attn.out_proj": "attn.proj",
    "ffn.layers.0.0": "mlp.fc1", "ffn.layers.1": "mlp.fc2",
}  # fmt: skip
_BACKBONE = {
    "backbone.ln1.": "backbone.norm.", "backbone.clusterer.net.0.": "backbone.clusterer.fc1.",
    "backbone.clusterer.net.2.": "backbone.clusterer.fc2.", "backbone.expand_mlp.0.": "backbone.regenerator.fc1.",
    "backbone.expand_mlp.2.": "backbone.regenerator.fc2.",
}  # fmt: skip
_HEAD = {
    "cls_emb": "class_embed", "decoder_norm": "norm", "classes_proj": "class_proj", "conv_seg.": "classify.",
}  # fmt: skip
# UPerNet's convolutions: theirs, ours; each is followed by `conv.` or `bn.`, ours by `conv.` or `norm.`.
_UPERNET = (
    (r"psp_modules\.(\d)\.1\.", r"pyramid.{}."), (r"lateral_convs\.(\d)\.", r"lateral.{}."),
    (r"fpn_convs\.(\d)\.", r"smooth.{}."), (r"bottleneck\.", r"bottleneck."), (r"fpn_bottleneck\.", r"fuse."),
)  # fmt: skip
_NECK = {"lateral_convs": "lateral", "convs": "smooth"}
_TRAINING_ONLY = ("auxiliary_head.", "data_preprocessor.", "criterion.", "loss.")
_CLUSTR_STAGE = re.compile(r"(patch_embed|block|norm)([1-4])\.(.+)")
# Windows that share a token, of all, in the official configurations of CTS: 103 of 256.
_PUBLISHED_SHARE = 103 / 256
# Coarse clusters stand for these many tokens, squared, in every published size; no parameter's shape tells.
PUBLISHED_SR_RATIOS = (8, 4, 2, 1)


def network_of(
    weights: dict[str, Tensor], model: dict[str, Any], known: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The architecture of a checkpoint.

    Shapes tell most of it; the rest comes from `known`, then from the checkpoint's own configuration, then from the
    official defaults (injection point 3, 64 channels per head, a square trained size).

    Args:
        weights: parameter names as in the file, to tensors.
        model: the `model` section of the checkpoint's own configuration, or empty.
        known: hyper-parameters by the names of `ViTConfig`; they are checked against the shapes.

    Returns:
        Name in `ARCHITECTURES`, and the overrides for `network_config`.

    Raises:
        ModelError: parameters that every ViT or Segmenter has are missing.
        ConfigError: `known` contradicts the shapes, or a trained size that is not square was not given.
    """
    try:
        embed_dim = weights["backbone.cls_token"].shape[2]
        shapes: dict[str, Any] = {
            "backbone": "clustvit" if "backbone.clusterer.net.0.weight" in weights else "vit",
            "embed_dim": embed_dim,
            "depth": count_blocks(weights, r"backbone\.layers\."),
            "patch_size": weights["backbone.patch_embed.projection.weight"].shape[2],
            "mlp_ratio": weights["backbone.layers.0.ffn.layers.0.0.weight"].shape[0] / embed_dim,
            "final_norm": "backbone.ln1.weight" in weights,
            **_head_shapes(weights),
        }
        num_tokens = weights["backbone.pos_embed"].shape[1] - 1
        if shapes["backbone"] == "clustvit":
            shapes["cluster_mlp_dim"] = weights["backbone.clusterer.net.0.weight"].shape[0]
            shapes["num_clusters"] = weights["backbone.clusterer.net.2.weight"].shape[0] - 1
    except KeyError as error:
        found = ", ".join(list(weights)[:3])
        raise ModelError(
            f"checkpoint has no {error.args[0]}, it holds {found[:200]}; expected a ViT or ClustViT with a Segmenter, "
            "UPerNet or linear head in OpenMMLab's layout, or a ViT encoder in timm's"
        ) from error
    for name, value in known.items():
        if name == "head_depth" and shapes["head"] != "segmenter":
            continue
        if name in shapes and shapes[name] != value:
            raise ConfigError(f"{name}: got {value!r}, but the checkpoint's shapes say {shapes[name]!r}")
    shapes |= sharing_of(weights, model)
    backbone = {"num_heads": max(embed_dim // 64, 1), **hints_of(model)}
    network = {**backbone, **shapes, **known, "head": shapes["head"]}
    for name in ("injection_points", "head_blocks"):
        if name in network:
            network[name] = list(network[name])
    if "image_size" not in network:
        side = round(num_tokens**0.5) * shapes["patch_size"]
        network["image_size"] = [side, side]
    height, width = (length // shapes["patch_size"] for length in network["image_size"])
    if height * width != num_tokens:
        raise ConfigError(
            f"image_size: {list(network['image_size'])} makes {height * width} patches, the checkpoint's position "
            f"embedding has {num_tokens}; pass the size it was trained with"
        )
    size = ("backbone", "embed_dim", "depth", "num_heads")
    architecture = next(
        (
            name
            for name, published in ARCHITECTURES.items()
            if isinstance(published, ViTConfig) and all(getattr(published, key) == network.get(key) for key in size)
        ),
        f"{network['backbone']}_t",
    )
    published = ARCHITECTURES[architecture]
    return architecture, {name: value for name, value in network.items() if getattr(published, name) != value}


def sharing_of(weights: dict[str, Tensor], model: dict[str, Any]) -> dict[str, Any]:
    """What makes a ViT one of CTS, as ClustViT's authors have it; empty for any other.

    Raises:
        ModelError: its policy network is missing, or its schedule shares more windows than there are.
    """
    backbone = part if isinstance(part := model.get("backbone"), dict) else {}
    if not _shares(weights):
        if backbone.get("type") == "CTSVisionTransformer" and backbone.get("policy_method") != "no_sharing":
            raise ModelError(
                "checkpoint: is a CTS network by its own configuration, but holds no policy network "
                "(backbone.policy_net.*), which decides what is merged; pass it with --policy-net policynet.pth"
            )
        return {}
    windows = (weights["backbone.pos_embed"].shape[1] - 1) // 4
    shared = round(_PUBLISHED_SHARE * windows)
    schedule = backbone.get("policy_schedule")
    if isinstance(schedule, (list, tuple)) and len(schedule) == 2 and isinstance(schedule[1], int):
        shared = schedule[1]
        if not 0 <= shared <= windows:
            raise ModelError(f"checkpoint: policy_schedule is {schedule}, expected at most {windows} shared windows")
    return {"merging": "cts", "share_corner": True, "shared_windows": max(min(shared, windows - 1), 0)}


def _shares(weights: Iterable[str]) -> bool:
    """Whether these are names of a CTS network."""
    return any(name.startswith("backbone.policy_net.") for name in weights)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of an official checkpoint; names that are not recognised stay as they are.

    What serves training only (auxiliary heads) is left out; of a CTS network the class token's position becomes zero,
    since its official code leaves it out. A bias of the patch projection, which older versions of
    mmsegmentation had, is added to the position embedding, where it does the same.
    """
    linear = head_of(state_dict) == "linear"
    weights = {}
    for name, tensor in _fold_positions(state_dict).items():
        if name.startswith(_TRAINING_ONLY):
            continue
        if linear and name == "decode_head.conv_seg.weight":
            tensor = tensor.flatten(1)  # a 1x1 convolution is a linear layer
        weights[_rename(name)] = tensor
    return weights


def to_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back.

    Raises:
        ModelError: parameters that the official layout has no name for (a convolutional stem, another family).
    """
    foreign = [name for name in state_dict if name.startswith("backbone.stages.") or name.endswith("surrogate_tokens")]
    if foreign:
        raise ModelError(f"the official layout has no name for {foreign[0]}; only ViT and ClustViT have one")
    stem = [name for name in state_dict if name.startswith("backbone.patch_embed.layers.")]
    if stem:
        raise ModelError(f"the official layout has no name for a convolutional stem ({stem[0]}, ...)")
    later = [name for name in state_dict if name.startswith("backbone.later_")]
    if later:
        raise ModelError(f"the official layout has no name for a second injection point ({later[0]}, ...)")
    weights = {}
    for name, tensor in state_dict.items():
        if name == "head.classify.weight" and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        weights[_rename_back(name)] = tensor
    return weights


def head_of(weights: dict[str, Tensor]) -> str:
    """Which of our heads an official checkpoint has: "segmenter", "upernet" or "linear"; empty for none of them."""
    if "decode_head.cls_emb" in weights:
        return "segmenter"
    if "decode_head.psp_modules.0.1.conv.weight" in weights:
        return "upernet"
    names = {name for name in weights if name.startswith("decode_head.")}
    return "linear" if names == {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"} else ""


def count_classes(weights: dict[str, Tensor]) -> int:
    """Classes of an official checkpoint's head.

    Raises:
        ModelError: it has none of our heads.
    """
    head = head_of(weights)
    if not head:
        found = sorted({name.split(".")[1] for name in weights if name.startswith("decode_head.")})
        raise ModelError(
            "checkpoint has no Segmenter, UPerNet or linear head; its decode_head holds "
            f"{', '.join(found) or 'nothing'}"
        )
    return (
        weights["decode_head.cls_emb"].shape[1] if head == "segmenter" else len(weights["decode_head.conv_seg.weight"])
    )


def _head_shapes(weights: dict[str, Tensor]) -> dict[str, Any]:
    head = head_of(weights)
    if head == "upernet":
        return {
            "head": head,
            "head_channels": weights["decode_head.conv_seg.weight"].shape[1],
            "neck": any(name.startswith("neck.") for name in weights),
        }
    if head == "linear":
        return {"head": head}
    return {"head": "segmenter", "head_depth": count_blocks(weights, r"decode_head\.layers\.")}


def _rename(name: str) -> str:
    block = re.fullmatch(r"(backbone|decode_head)\.layers\.(\d+)\.(.+)", name)
    if block:
        room, index, rest = block.groups()
        for theirs, ours in _BLOCK.items():
            if rest.startswith(theirs):
                rest = ours + rest[len(theirs) :]
                break
        return f"{'head' if room == 'decode_head' else room}.blocks.{index}.{rest}"
    if name.startswith("neck."):
        kind, index, _, last = [*name.split("."), "", "", ""][1:5]
        return f"head.neck.{_NECK.get(kind, kind)}.{index}.{last}"
    if name.startswith("decode_head."):
        rest = name.removeprefix("decode_head.")
        for pattern, ours in _UPERNET:
            found = re.fullmatch(pattern + r"(conv|bn)\.(.+)", rest)
            if found:
                *index, layer, parameter = found.groups()
                return f"head.{ours.format(*index)}{'norm' if layer == 'bn' else layer}.{parameter}"
        for theirs, ours in _HEAD.items():
            if rest.startswith(theirs):
                return "head." + ours + rest[len(theirs) :]
        return "head." + rest
    for theirs, ours in _BACKBONE.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def _rename_back(name: str) -> str:
    block = re.fullmatch(r"(backbone|head)\.blocks\.(\d+)\.(.+)", name)
    if block:
        room, index, rest = block.groups()
        room = "decode_head" if room == "head" else room
        return f"{room}.layers.{index}.{_swap_prefix(rest, _BLOCK)}"
    neck = re.fullmatch(r"head\.neck\.(lateral|smooth)\.(\d+)\.(.+)", name)
    if neck:
        kind = {ours: theirs for theirs, ours in _NECK.items()}[neck.group(1)]
        return f"neck.{kind}.{neck.group(2)}.conv.{neck.group(3)}"
    convolution = re.fullmatch(r"head\.(pyramid|lateral|smooth|bottleneck|fuse)\.(?:(\d)\.)?(conv|norm)\.(.+)", name)
    if convolution:
        module, index, layer, parameter = convolution.groups()
        theirs = {
            "pyramid": f"psp_modules.{index}.1",
            "lateral": f"lateral_convs.{index}",
            "smooth": f"fpn_convs.{index}",
            "bottleneck": "bottleneck",
            "fuse": "fpn_bottleneck",
        }[module]
        return f"decode_head.{theirs}.{'bn' if layer == 'norm' else layer}.{parameter}"
    if name.startswith("head."):
        return "decode_head." + _swap_prefix(name.removeprefix("head."), _HEAD)
    return _swap_prefix(name, _BACKBONE)


def _swap_prefix(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def count_blocks(weights: Iterable[str], prefix: str) -> int:
    """How many blocks names `<prefix><number>.` count.

    Raises:
        ModelError: numbers are left out, so that whoever builds them all could build for ever.
    """
    found = {match[1] for name in weights if (match := re.match(rf"{prefix}(\d+)\.", name))}
    count = len(found)
    if found != {str(number) for number in range(count)}:
        strange = sorted(found - {str(number) for number in range(count)}, key=len)[-1]
        raise ModelError(f"checkpoint: got a block numbered {strange[:40]}, one of {count}; expected 0 to {count - 1}")
    return count


def hints_of(model: dict[str, Any]) -> dict[str, Any]:
    """What a configuration's `model` section says that shapes cannot."""
    backbone, head = (part if isinstance(part := model.get(key), dict) else {} for key in ("backbone", "decode_head"))
    hints: dict[str, Any] = {}
    if isinstance(backbone.get("num_heads"), int):
        hints["num_heads"] = backbone["num_heads"]
    points = backbone.get("injection_points")
    if points and isinstance(points, (list, tuple)):
        hints["injection_point"] = points[0]
        if len(points) > 1:
            raise ConfigError(f"injection_points: got {points}, official checkpoints have exactly one")
    blocks = backbone.get("out_indices")
    if isinstance(blocks, (list, tuple)) and len(blocks) == NUM_LEVELS and head.get("type") == "UPerHead":
        hints["head_blocks"] = list(blocks)
    size = backbone.get("img_size")
    if size:
        hints["image_size"] = image_size_of(size)
    if isinstance(head.get("num_heads"), int):
        hints["head_heads"] = head["num_heads"]
    return hints


def _fold_positions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights (OpenMMLab's names) whose position embedding holds what its code adds otherwise, or leaves out."""
    weights = dict(weights)
    bias, pos_embed = weights.pop("backbone.patch_embed.projection.bias", None), weights.get("backbone.pos_embed")
    if pos_embed is not None and (bias is not None or _shares(weights)):
        cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
        cls = torch.zeros_like(cls) if _shares(weights) else cls
        weights["backbone.pos_embed"] = torch.cat([cls, grid if bias is None else grid.float() + bias.float()], dim=1)
    return weights


def is_clustr(weights: dict[str, Tensor]) -> bool:
    """Whether official names look like those of a ClusTR network, with or without a detector's `backbone.` prefix."""
    return any(name.removeprefix("backbone.") == "patch_embed1.proj.weight" for name in weights)


def from_official_clustr(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names of an official ClusTR to ours; its classifier, `head.`, keeps its name.

    Raises:
        ModelError: a name of no ClusTR network.
    """
    weights = {}
    for name, tensor in state_dict.items():
        bare = name.removeprefix("backbone.")
        found = _CLUSTR_STAGE.fullmatch(bare)
        if found:
            part, stage, rest = found.groups()
            rest = rest.replace("mlp.dwconv.dwconv.", "mlp.dwconv.")
            weights[f"backbone.stages.{int(stage) - 1}.{'blocks' if part == 'block' else part}.{rest}"] = tensor
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
