"""A light semantic feature-pyramid head: from the maps of several stages to class logits at the finest stride.

The semantic branch of Kirillov et al., "Panoptic Feature Pyramid Networks", arXiv 1901.02446: lateral 1x1 convolutions
and a top-down sum; each level is brought to the finest grid by steps of convolution and doubling, and the levels are
added. Lighter than published: 128 channels, and no further convolution on the pyramid's levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.networks.backbone import Features

_NORM_GROUPS = 32


class FeaturePyramidHead(nn.Module):
    """Class logits on the grid of the finest level: features with a pyramid of (B, C_i, h_i, w_i) -> (B, Q, h_0, w_0).

    Args:
        level_dims: C_i, finest level first; each level has half the stride of the next.
        num_classes: Q.
        width: channels of the pyramid.
    """

    def __init__(self, level_dims: Sequence[int], num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.laterals = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in level_dims)
        self.scales = nn.ModuleList(_Scale(max(index, 1), width) for index in range(len(level_dims)))
        # Linear, and so drawn small: logits start near zero, where a convolution's usual draw makes them large.
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, features: Features) -> Tensor:
        pyramid = [lateral(level) for lateral, level in zip(self.laterals, features.pyramid, strict=True)]
        for index in range(len(pyramid) - 2, -1, -1):
            pyramid[index] = pyramid[index] + _resized(pyramid[index + 1], pyramid[index])
        total = self.scales[0](pyramid[0], [pyramid[0]])
        for index in range(1, len(pyramid)):
            total = total + self.scales[index](pyramid[index], pyramid[index - 1 :: -1])
        return self.classifier(total.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # B C h w -> B h w Q -> B Q h w


class _Scale(nn.Module):
    """Steps of convolution and enlargement to the next finer grid, up to the finest."""

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_ConvNorm(width) for _ in range(steps))

    def forward(self, x: Tensor, finer: Sequence[Tensor]) -> Tensor:
        for layer, like in zip(self.layers, finer, strict=True):
            x = _resized(layer(x), like)
        return x


class _ConvNorm(nn.Module):
    """3x3 convolution, group norm, ReLU: grid and width stay."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(min(_NORM_GROUPS, width // 4), width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear to another map's grid: grids of odd sides are not exactly doubled."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
