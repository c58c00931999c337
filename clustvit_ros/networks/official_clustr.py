"""The official ClusTR checkpoints (YtongXie/ClusTR): key names to ours, and what their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clustvit_ros.config import from_mapping
from clustvit_ros.errors import ModelError
from clustvit_ros.networks.clustr import ClusTRClassifier
from clustvit_ros.networks.clustr_config import ClusTRConfig

_STAGE = re.compile(r"(patch_embed|block|norm)([1-4])\.(.+)")
_ROOMS = {"patch_embed": "patch_embed", "block": "blocks", "norm": "norm"}
# Coarse clusters stand for these many tokens, squared, in every published size; no parameter's shape tells.
PUBLISHED_SR_RATIOS = (8, 4, 2, 1)


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
        "embed_dims": dims,
        "depths": depths,
        "mlp_ratios": ratios,
        "sr_ratios": sr_ratios,
        "num_heads": [max(dim // 64, 1) for dim in dims],
    }


def clustr_classifier(state_dict: dict[str, Tensor], num_heads: Sequence[int] | None = None) -> ClusTRClassifier:
    """The classifier of an official checkpoint, weights filled in, in evaluation mode.

    Args:
        state_dict: official names, with `head.`.
        num_heads: per stage; None is one per 64 channels, as published.

    Raises:
        ModelError: no complete ClusTR classifier.
        ConfigError: heads that do not divide the channels.
    """
    shape = clustr_shape(state_dict)
    if num_heads is not None:
        shape["num_heads"] = list(num_heads)
    config = from_mapping(ClusTRConfig, shape, "checkpoint")
    if "head.weight" not in state_dict:
        raise ModelError("checkpoint has no head.weight; expected a ClusTR classifier")
    network = config.build_classifier(state_dict["head.weight"].shape[0])
    weights = from_official_clustr(state_dict)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"checkpoint: the weights fit no ClusTR: {error}") from error
    return network.eval()
