"""Key names of the official ClustViT checkpoints (OpenMMLab layout), to and from ours."""

from __future__ import annotations

import re

from torch import Tensor

_BLOCK = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn.attn.in_proj_": "attn.qkv.",
    "attn.attn.out_proj": "attn.proj",
    "ffn.layers.0.0": "mlp.fc1",
    "ffn.layers.1": "mlp.fc2",
}
_BACKBONE = {
    "backbone.ln1.": "backbone.norm.",
    "backbone.clusterer.net.0.": "backbone.clusterer.fc1.",
    "backbone.clusterer.net.2.": "backbone.clusterer.fc2.",
    "backbone.expand_mlp.0.": "backbone.regenerator.fc1.",
    "backbone.expand_mlp.2.": "backbone.regenerator.fc2.",
}
_HEAD = {
    "cls_emb": "class_embed",
    "decoder_norm": "norm",
    "classes_proj": "class_proj",
}


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of an official checkpoint; names that are not recognised stay as they are."""
    return {_rename(name): tensor for name, tensor in state_dict.items()}


def _rename(name: str) -> str:
    block = re.fullmatch(r"(backbone|decode_head)\.layers\.(\d+)\.(.+)", name)
    if block:
        room, index, rest = block.groups()
        for theirs, ours in _BLOCK.items():
            if rest.startswith(theirs):
                rest = ours + rest[len(theirs) :]
                break
        return f"{'head' if room == 'decode_head' else room}.blocks.{index}.{rest}"
    if name.startswith("decode_head."):
        rest = name.removeprefix("decode_head.")
        for theirs, ours in _HEAD.items():
            if rest.startswith(theirs):
                return "head." + ours + rest[len(theirs) :]
        return "head." + rest
    for theirs, ours in _BACKBONE.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name
