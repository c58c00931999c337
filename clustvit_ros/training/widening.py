"""Starting a wider network from a narrower one, so that it computes the same before its first step.

Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", arXiv 1511.05641: every channel is
copied, and what reads a channel shares its weight out among the copies. Drawn shares, where equal ones would do, give
the copies different gradients, or they would stay copies for ever. A transformer's LayerNorm sees the same mean and
variance over copied channels, and its heads keep their size, so there are as many times more of them.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

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
        weights: of the narrow network, by name.
        shapes: of the wide network's tensors.
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
