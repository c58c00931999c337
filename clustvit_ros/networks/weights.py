# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The one importer of weights: every known layout to this package's names, for training and for model folders alike.

Layouts: our own; OpenMMLab's and ClusTR's (see `official`); and timm's `vision_transformer`, in which augreg (Steiner
et al., arXiv 2106.10270), DeiT and DeiT III are published. `checkpoint` reads the files.

Our ViT has fewer parameters than some of them; what it lacks does the same when it is folded into what it has:

* a bias of the patch projection is a constant on every patch token, so it goes into the position embedding;
* layer scale multiplies a branch's output, so it goes into the branch's last layer;
* a position embedding without an entry for the class token gets a zero there.

A class or distillation token's own head is left out, as is a distillation token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.config import to_mapping
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks.architectures import ARCHITECTURES, build_network
from clustvit_ros.networks.checkpoint import Checkpoint
from clustvit_ros.networks.clustr import ClusTRConfig
from clustvit_ros.networks.heads import POOL_SCALES
from clustvit_ros.networks.official import (
    clustr_shape,
    count_blocks,
    count_classes,
    from_official,
    from_official_clustr,
    hints_of,
    is_clustr,
    network_of,
    sharing_of,
)
from clustvit_ros.networks.segmenter import NetworkConfig, Segmenter, check_weights
from clustvit_ros.networks.vit import BACKBONE_NORM_EPS, grid_size_of
from clustvit_ros.networks.vit_config import ViTConfig

POSITIONS = "backbone.pos_embed"
# What belongs to classification, or to the training of DINOv2 and masked autoencoders.
_LEFT_OUT = re.compile(
    r"(backbone\.)?((head|head_dist|fc_norm|pre_logits|head_drop)\.|(dist_token|mask_token)$|decoder_(pos_embed$|\w+\.))"
)
# What an encoder's weights leave to be trained.
_POLICY = "backbone.policy_net."
_USUAL_NORM_EPS = 1e-5  # PyTorch's own
_FRESH = ("head.", "backbone.clusterer.", "backbone.regenerator.", "backbone.later_")


class Imported(NamedTuple):
    """Weights by this package's names, whatever layout they came in.

    Attributes:
        weights: `backbone.*` and `head.*` to tensors; names that have no place here keep theirs.
        grid_size: (h, w) patches that the position embedding was trained for, where the layout or the file tells.
        left_out: names in the file that a segmentation network has no use for.
    """

    weights: dict[str, Tensor]
    grid_size: tuple[int, int] | None = None
    left_out: Sequence[str] = ()


def import_weights(checkpoint: Checkpoint) -> Imported:
    """Weights of any known layout by our names, what we have no parameter for folded into what does the same.

    Raises:
        ModelError: a part that every network of its layout has is missing.
    """
    weights = checkpoint.weights
    is_timm = any(name.removeprefix("backbone.") == "patch_embed.proj.weight" for name in weights)
    if is_clustr(weights):
        return Imported(from_official_clustr(weights))
    if any(name.startswith(("backbone.blocks.", "backbone.stages.")) for name in weights) and not is_timm:
        return Imported(weights, checkpoint.grid_size)
    if _is_vit_encoder(weights):
        return _import_encoder(weights, is_timm)
    if any(name.startswith("backbone.layers.") for name in weights):
        return Imported(from_official(weights))
    return Imported(weights)


def fit_positions(pos_embed: Tensor, trained: tuple[int, int] | None, grid_size: tuple[int, int]) -> Tensor:
    """A position embedding for a network's grid, resized as the networks do it: (1, 1+N, C) -> (1, 1+h*w, C).

    Args:
        pos_embed: as imported.
        trained: (h, w) patches it was trained for. None is unknown: an embedding of the right length is then taken for
            the grid's own, any other for a square.
        grid_size: (h, w) patches of the network.

    Returns:
        `pos_embed` itself where it is the grid's own, or no grid's.
    """
    count = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    if trained is None:
        trained = grid_size if count == grid_size[0] * grid_size[1] else _square(count)
    if trained is None or trained == grid_size or trained[0] * trained[1] != count:
        return pos_embed
    cls, grid = pos_embed[:, :1].float(), pos_embed[:, 1:].float()
    grid = F.interpolate(
        grid.transpose(1, 2).unflatten(2, trained), size=grid_size, mode="bicubic", align_corners=False
    )
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)


def network_for(
    checkpoint: Checkpoint, known: dict[str, Any], architecture: str | None = None
) -> tuple[str, dict[str, Any], int | None]:
    """The network that a checkpoint's weights go into.

    Args:
        checkpoint: as read.
        known: hyper-parameters by the names of the network's configuration.
        architecture: name in `ARCHITECTURES` for an encoder without a decode head; None is the published one of its
            size.

    Returns:
        Name in `ARCHITECTURES`, the overrides for `network_config`, and the number of classes, which is None for an
        encoder.

    Raises:
        ModelError: parameters that every network of the layout has are missing.
        ConfigError: `known` contradicts the shapes, the architecture is of another family, or the size that the
            position embedding was trained for is not square and was not given.
    """
    weights = checkpoint.weights
    if checkpoint.others:
        names = ", ".join(checkpoint.others[:10])
        raise ModelError(f"checkpoint: {names} are no tensors, expected a state_dict of tensors; save that alone")
    if not is_clustr(weights) and not _is_vit_encoder(weights):
        return *network_of(weights, checkpoint.model, known), count_classes(weights)
    family: type[NetworkConfig]
    size: tuple[str, ...]
    if is_clustr(weights):
        family, default, kind = ClusTRConfig, "clustr_b1", " for a ClusTR classifier"
        wanted, size = {**clustr_shape(weights), **known}, ("embed_dims", "depths")
    else:
        family, default, kind = ViTConfig, "vit_t", ""
        hints = {k: v for k, v in hints_of(checkpoint.model).items() if k in ("num_heads", "injection_point")}
        imported = import_weights(checkpoint)
        shape = _encoder_shape(imported, known.get("image_size") or hints_of(checkpoint.model).get("image_size"))
        wanted = {**shape, **sharing_of(imported.weights, checkpoint.model), **hints, **known}
        size = ("embed_dim", "depth")
        if "backbone" in shape:
            default, size = "clustvit_t", ("embed_dim", "depth", "backbone")
    members = {name: to_mapping(config) for name, config in ARCHITECTURES.items() if isinstance(config, family)}
    alike = [name for name, config in members.items() if all(config[key] == wanted[key] for key in size)]
    if architecture is None:
        architecture = next(iter(alike), default)
    if architecture not in members:
        raise ConfigError(f"--arch: got {architecture!r}{kind}, expected one of {', '.join(members)}")
    published = members[architecture]
    if alike and architecture not in alike:
        got, expected = (", ".join(f"{key} {values[key]}" for key in size) for values in (published, wanted))
        raise ConfigError(
            f"--arch: {architecture} has {got}, but the weights have {expected}; expected one of {', '.join(alike)}"
        )
    return architecture, {name: value for name, value in wanted.items() if published.get(name) != value}, None


def fill_network(
    config: NetworkConfig, num_classes: int, checkpoint: Checkpoint, where: str
) -> tuple[Segmenter, list[str], list[str]]:
    """Build a network and fill it with all of a checkpoint's weights; beside an encoder's, the rest is fresh.

    Args:
        config: hyper-parameters, as `network_for` tells them.
        num_classes: classes of the head.
        checkpoint: as read.
        where: what errors call the weights.

    Returns:
        The network, names in the file that it has no use for, and its own names that are to be trained.

    Raises:
        ModelError: missing, unknown or mis-shaped weights, or values that are no numbers.
    """
    torch.manual_seed(0)
    network = build_network(config, num_classes)
    own = network.state_dict()
    imported = import_weights(checkpoint)
    weights, left_out, fresh = dict(imported.weights), list(imported.left_out), []
    if is_clustr(checkpoint.weights) or _is_vit_encoder(checkpoint.weights):
        left_out += [name for name in weights if name.startswith("head.")]
        weights = {name: tensor for name, tensor in weights.items() if name not in left_out}
        fresh = [name for name in own if name.startswith(_FRESH) and name not in weights]
    if POSITIONS in weights:
        grid_size = grid_size_of(config.image_size, config.patch_size)
        weights[POSITIONS] = fit_positions(weights[POSITIONS], imported.grid_size, grid_size)
    # How many batches a norm has seen serves training only, and converters leave it out.
    unneeded = [name for name in own if name.endswith(".num_batches_tracked")]
    remedy = "is the file whole, and of this kind? (names are this package's)"
    check_weights(network, {**{name: own[name] for name in (*fresh, *unneeded)}, **weights}, where, remedy)
    network.load_state_dict(weights, strict=False)
    return network, sorted(left_out), fresh


def _is_vit_encoder(weights: dict[str, Tensor]) -> bool:
    """Whether these are weights of a ViT without a decode head of OpenMMLab's layout."""
    headless = not any(name.startswith("decode_head.") for name in weights)
    return headless and any(name.removeprefix("backbone.") == "cls_token" for name in weights)


def _import_encoder(weights: dict[str, Tensor], is_timm: bool) -> Imported:
    """Rename and fold weights of timm's layout or OpenMMLab's, with or without `backbone.` in front."""
    left_out = sorted(name for name in weights if _LEFT_OUT.match(name))
    weights = {
        f"backbone.{name.removeprefix('backbone.').replace('patch_embed.proj.', 'patch_embed.projection.')}": tensor
        for name, tensor in weights.items()
        if name not in left_out
    }
    trained = None
    if POSITIONS in weights:
        pos_embed = weights[POSITIONS]
        # Before the patches come the class token, and behind it a distillation token; DeiT III has neither there.
        first = 2 if any(name.endswith("dist_token") for name in left_out) else 1
        if first == 1 and not _square(pos_embed.shape[1] - 1) and _square(pos_embed.shape[1]):
            first = 0
        cls = pos_embed[:, :1] if first else torch.zeros_like(pos_embed[:, :1])
        weights[POSITIONS] = torch.cat([cls, pos_embed[:, first:]], dim=1)
        trained = _square(pos_embed.shape[1] - first) if is_timm else None
    return Imported(from_official(_fold_layer_scale(weights)), trained, left_out)


def _encoder_shape(imported: Imported, image_size: Sequence[int] | None) -> dict[str, Any]:
    """Hyper-parameters of `ViTConfig` that an encoder's shapes tell, `image_size` where it is None."""
    weights = imported.weights
    try:
        embed_dim = weights["backbone.cls_token"].shape[2]
        patch_size = weights["backbone.patch_embed.projection.weight"].shape[2]
        count = weights[POSITIONS].shape[1] - 1
        hidden_dim = weights["backbone.blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ModelError(
            f"encoder weights have no {error.args[0]}; expected a ViT in timm's or OpenMMLab's layout"
        ) from error
    grid = imported.grid_size or _square(count)
    if grid is None and image_size is not None:
        grid = grid_size_of((image_size[0], image_size[1]), patch_size)
    if grid is None or grid[0] * grid[1] != count:
        expected = "a square grid" if image_size is None else f"{' x '.join(map(str, grid or ()))} patches"
        raise ConfigError(
            f"position embedding: got {count + 1} entries, expected {expected} and a class token; pass the size in "
            "pixels that it was trained with (--image-size HEIGHTxWIDTH)"
        )
    return {
        "image_size": [length * patch_size for length in grid],
        "num_heads": max(embed_dim // 64, 1),
        "embed_dim": embed_dim,
        "depth": count_blocks(weights, r"backbone\.blocks\."),
        "patch_size": patch_size,
        "mlp_ratio": hidden_dim / embed_dim,
        "final_norm": "backbone.norm.weight" in weights or "backbone.norm.bias" in weights,
        **_clusterer_shape(weights),
    }


def _clusterer_shape(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What a ClustViT's encoder has beside a ViT's; empty for any other."""
    first, last = (weights.get(f"backbone.clusterer.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is None or last is None:
        return {}
    return {"backbone": "clustvit", "cluster_mlp_dim": first.shape[0], "num_clusters": last.shape[0] - 1}


def _square(count: int) -> tuple[int, int] | None:
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def _fold_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    folded = dict(weights)
    for name, gamma in weights.items():
        found = re.fullmatch(r"(backbone\.blocks\.\d+\.)(ls1\.gamma|ls2\.gamma|gamma_1|gamma_2)", name)
        if found:
            del folded[name]
            layer = found[1] + ("attn.proj" if "1" in found[2] else "mlp.fc2")
            for kind in ("weight", "bias"):  # of small scales' products, half precision would leave nothing
                factor = gamma.float()[:, None] if kind == "weight" else gamma.float()
                folded[f"{layer}.{kind}"] = factor * weights[f"{layer}.{kind}"].float()
    return folded


def with_policy_net(checkpoint: Checkpoint, policy: dict[str, Tensor]) -> tuple[Checkpoint, bool]:
    """A checkpoint with a policy network for CTS, and whether it had one, which is left out.

    Args:
        checkpoint: as read.
        policy: weights of a policy network alone, or of all of a CTS.
    """
    named = {name.partition("policy_net.")[2]: tensor for name, tensor in policy.items() if "policy_net." in name}
    kept = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith(_POLICY)}
    weights = {f"{_POLICY}{name}": tensor for name, tensor in (named or policy).items()}
    return checkpoint._replace(weights={**kept, **weights}), len(kept) < len(checkpoint.weights)


def as_rgb(checkpoint: Checkpoint) -> Checkpoint:
    """A network that was trained on BGR images, as its configuration says, takes RGB once its weights change places."""
    stated = checkpoint.model.get("data_preprocessor")
    if not isinstance(stated, dict) or not any(stated.get(key) is False for key in ("bgr_to_rgb", "to_rgb")):
        return checkpoint
    turned = {key: value[::-1] for key, value in stated.items() if isinstance(value, (list, tuple))}
    weights = {
        name: tensor.flip(1) if "patch_embed" in name and tensor.ndim == 4 and tensor.shape[1] == 3 else tensor
        for name, tensor in checkpoint.weights.items()
    }
    return checkpoint._replace(weights=weights, model={**checkpoint.model, "data_preprocessor": {**stated, **turned}})


def check_stated(model: dict[str, Any], network: ViTConfig, path: str) -> None:
    """Refuse weights that are not all that their own configuration states, or need what no network here computes.

    Args:
        model: the `model` section of the configuration in the file.
        network: what the weights' shapes make of them.
        path: what messages call the file.

    Raises:
        ModelError: with everything that differs.
    """
    backbone, head = (part if isinstance(part := model.get(key), dict) else {} for key in ("backbone", "decode_head"))
    segmenter, clusters = network.head == "segmenter", network.merge_method == "clusters"
    activation, norm = (part if isinstance(part := backbone.get(key), dict) else {} for key in ("act_cfg", "norm_cfg"))
    eps = norm.get("eps")
    differing = []
    for name, stated, found, concerns in (
        ("backbone.num_layers", backbone.get("num_layers"), network.depth, True),
        ("backbone.embed_dims", backbone.get("embed_dims"), network.embed_dim, True),
        ("backbone.num_clusters", backbone.get("num_clusters"), network.num_clusters, clusters),
        ("backbone.act_cfg.type", activation.get("type"), "GELU", True),
        # Below the largest usual one it hardly shows beside the variance of trained tokens.
        ("backbone.norm_cfg.eps", eps, BACKBONE_NORM_EPS, isinstance(eps, float) and eps > _USUAL_NORM_EPS),
        ("decode_head.num_layers", head.get("num_layers"), network.head_depth, segmenter),
        ("decode_head.pool_scales", head.get("pool_scales"), POOL_SCALES, network.head == "upernet"),
    ):
        stated = tuple(stated) if isinstance(stated, list) else stated
        if concerns and stated is not None and stated != found:
            differing.append(f"{name} {stated!r}, found {found!r}")
    if differing:
        raise ModelError(
            f"{path}: differs from its own configuration: {', '.join(differing)}; is the file whole? Nothing else than "
            "what was found can be computed"
        )


def assumptions(settings: ViTConfig, told: Collection[str]) -> list[str]:
    """What no shape tells and nobody said, with the option that says it: other values fit the weights as well.

    Args:
        settings: the network as it was taken to be.
        told: hyper-parameters that somebody stated.
    """
    assumed = [] if "num_heads" in told else [f"{settings.num_heads} heads (--num-heads)"]
    if settings.merge_method == "clusters" and "injection_point" not in told:
        assumed.append(f"merging after block {settings.injection_point} (--injection-point)")
    if settings.head == "segmenter" and not {"head_heads", "num_heads"} & set(told):
        assumed.append(f"{settings.head_heads or settings.num_heads} heads in the decode head (--head-heads)")
    if settings.head == "upernet" and "head_blocks" not in told:
        assumed.append(f"levels after blocks {list(settings.level_blocks)} from 0 (--config with out_indices)")
    if settings.shared_windows and "shared_windows" not in told:
        assumed.append(f"{settings.shared_windows} windows that share a token (shared_windows in its model.yaml)")
    return assumed


def is_as_said(architecture: str, overrides: dict[str, Any], said: str, path: str) -> bool:
    """Whether a network has the size that it is said to have.

    Args:
        architecture, overrides: what a file holds, as `network_for` gives it.
        said: kind and size, e.g. "cts_b".
        path: what messages call the file.

    Raises:
        ModelError: it is of another kind.
    """
    found = architecture.replace("vit_", "cts_") if overrides.get("merging") == "cts" else architecture
    if found.partition("_")[0] != said.partition("_")[0]:
        raise ModelError(f"{path}: holds a {found}, expected {said}, as the list says; a CTS needs its policy network")
    return found == said and not {"embed_dim", "depth"} & overrides.keys()
