"""UPerNet's decode head on the outputs of several transformer blocks.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221, as mmsegmentation computes it:
pyramid pooling on the deepest level, a top-down path over the others, batch norm and ReLU after each convolution,
bilinear resizing without aligned corners.

The official ClustViT has no neck: all levels have the token grid. mmsegmentation's own ViT models scale them to 4, 2, 1
and 1/2 times the grid first; the logits are then on a grid four times as fine.

Pooling is written as two small matrix products, see `pooling`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.networks.backbone import Features
from clustvit_ros.networks.pooling import pooling_matrix

POOL_SCALES = (1, 2, 3, 6)
NECK_SCALES = (4.0, 2.0, 1.0, 0.5)
NUM_LEVELS = 4


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU: (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class MultiLevelNeck(nn.Module):
    """A pyramid from maps of one size: four maps (B, C, h, w) -> four, scaled by `NECK_SCALES`."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(embed_dim, embed_dim, 1) for _ in NECK_SCALES)
        self.smooth = nn.ModuleList(nn.Conv2d(embed_dim, embed_dim, 3, padding=1) for _ in NECK_SCALES)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        outputs = []
        for x, scale, lateral, smooth in zip(maps, NECK_SCALES, self.lateral, self.smooth, strict=True):
            x = lateral(x)
            if scale != 1.0:
                x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            outputs.append(smooth(x))
        return outputs


class UPerHead(nn.Module):
    """Class logits on the first level's grid: features with four levels -> (B, Q, h', w').

    Args:
        embed_dim: of the levels.
        num_classes: Q.
        channels: width of the head.
        neck: whether levels are scaled to a pyramid first.
        dropout: share of channels dropped before the classifier, in training only.
    """

    def __init__(
        self, embed_dim: int, num_classes: int, channels: int, neck: bool = False, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.neck = MultiLevelNeck(embed_dim) if neck else None
        self.pyramid = nn.ModuleList(ConvNorm(embed_dim, channels, 1) for _ in POOL_SCALES)
        self.bottleneck = ConvNorm(embed_dim + len(POOL_SCALES) * channels, channels, 3)
        self.lateral = nn.ModuleList(ConvNorm(embed_dim, channels, 1) for _ in range(NUM_LEVELS - 1))
        self.smooth = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in range(NUM_LEVELS - 1))
        self.fuse = ConvNorm(NUM_LEVELS * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        maps = [level.transpose(1, 2).unflatten(2, features.grid_size) for level in features.levels]
        if self.neck is not None:
            maps = self.neck(maps)
        laterals = [lateral(x) for lateral, x in zip(self.lateral, maps[:-1], strict=True)]
        laterals.append(self._pool(maps[-1]))
        for index in range(NUM_LEVELS - 1, 0, -1):
            laterals[index - 1] = laterals[index - 1] + _resized(laterals[index], laterals[index - 1])
        outputs = [smooth(x) for smooth, x in zip(self.smooth, laterals[:-1], strict=True)]
        outputs.append(laterals[-1])
        fused = self.fuse(torch.cat([_resized(x, outputs[0]) for x in outputs], dim=1))
        return self.classify(self.dropout(fused))

    def _pool(self, x: Tensor) -> Tensor:
        height, width = int(x.shape[2]), int(x.shape[3])
        outputs = [x]
        for scale, conv in zip(POOL_SCALES, self.pyramid, strict=True):
            rows, columns = (pooling_matrix(length, scale, x) for length in (height, width))
            outputs.append(_resized(conv(rows @ x @ columns.T), x))
        return self.bottleneck(torch.cat(outputs, dim=1))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of another map."""
    size = int(like.shape[2]), int(like.shape[3])
    if (int(x.shape[2]), int(x.shape[3])) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
