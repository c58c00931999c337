"""A decode head that joins the tokens with a convolutional stem's finer maps, for things thinner than a patch.

Class logits on a grid of 16 px patches cannot draw a pole that is three pixels wide. The stem has computed features of
stride 4 and 8 on its way to the tokens; as in a feature pyramid (Lin et al., arXiv 1612.03144) the tokens are enlarged
step by step, and each step adds the map of its stride. Those maps are computed before any merging, so the finest
structures cost the same at every capacity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.networks.backbone import Features


class DetailHead(nn.Module):
    """Class logits at stride 4: features with a pyramid of finer maps (B, C_i, h_i, w_i) -> (B, Q, h_0, w_0).

    Args:
        embed_dim: of the tokens.
        detail_dims: C_i, finest map first; each has half the stride of the next, the last half the tokens'.
        num_classes: Q.
        width: channels of the finest level; each coarser one has half as many more.
    """

    def __init__(self, embed_dim: int, detail_dims: Sequence[int], num_classes: int, width: int = 64) -> None:
        super().__init__()
        widths = [width + width // 2 * level for level in range(len(detail_dims))]
        self.token_proj = nn.Linear(embed_dim, widths[-1])
        self.laterals = nn.ModuleList(nn.Conv2d(dim, out, 1) for dim, out in zip(detail_dims, widths, strict=True))
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width_in, width_out, 3, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()
            )
            for width_in, width_out in zip(widths, [widths[0], *widths[:-1]], strict=True)
        )
        self.classify = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        x = features.to_grid(self.token_proj(features.tokens))
        for level in range(len(self.laterals) - 1, -1, -1):
            detail = features.pyramid[level]
            x = F.interpolate(x, size=detail.shape[2:], mode="bilinear", align_corners=False)
            x = self.smooth[level](x + self.laterals[level](detail))
        return self.classify(x)
