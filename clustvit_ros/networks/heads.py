# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Decode heads: from a backbone's features to class logits.

* `LinearHead`: one linear layer per token (the "linear" of Segmenter, arXiv 2105.05633, and of DINOv2).
* `DetailHead`: tokens joined with a convolutional stem's finer maps, for things thinner than a patch.
* `MaskTransformer`: Segmenter's head (Strudel et al., arXiv 2105.05633), as mmsegmentation computes it.
* `UPerHead`: UPerNet's, on the outputs of several blocks.
* `FeaturePyramidHead`: a light semantic feature pyramid for backbones of several strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.networks.segmenter import Features
from clustvit_ros.networks.vit import Block, ResidualBlock


class LinearHead(nn.Module):
    """Class logits per patch token: features -> (B, Q, h, w)."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(embed_dim, num_classes)

    def forward(self, features: Features) -> Tensor:
        return features.to_grid(self.classify(features.tokens))


class DetailHead(nn.Module):
    """Class logits at the finest map's stride: features with a pyramid of maps (B, C_i, h_i, w_i) -> (B, Q, h_0, w_0).

    Class logits on a grid of 16 px patches cannot draw a pole that is three pixels wide. The stem has computed features
    of stride 2, 4 and 8 on its way to the tokens; as in a feature pyramid (Lin et al., arXiv 1612.03144) the tokens are
    enlarged step by step, and each step adds the map of its stride. Those maps are computed before any merging, so the
    finest structures cost the same at every capacity.

    Args:
        embed_dim: width of the tokens.
        detail_dims: C_i, finest map first; each has half the stride of the next, the last half the tokens'.
        num_classes: Q.
        width: channels of the finest level; each coarser one has half as many more.
        refine: residual blocks at each level but the finest.
    """

    def __init__(
        self, embed_dim: int, detail_dims: Sequence[int], num_classes: int, width: int = 64, refine: int = 0
    ) -> None:
        super().__init__()
        widths = [width + width // 2 * level for level in range(len(detail_dims))]
        self.token_proj = nn.Linear(embed_dim, widths[-1])
        self.laterals = nn.ModuleList(nn.Conv2d(dim, out, 1) for dim, out in zip(detail_dims, widths, strict=True))
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width_in, width_out, 3, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU(),
                *(ResidualBlock(width_out) for _ in range(refine if level else 0)),
            )
            for level, (width_in, width_out) in enumerate(zip(widths, [widths[0], *widths[:-1]], strict=True))
        )
        self.classify = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        x = features.to_grid(self.token_proj(features.tokens))
        for level in range(len(self.laterals) - 1, -1, -1):
            detail = features.pyramid[level]
            x = F.interpolate(x, size=detail.shape[2:], mode="bilinear", align_corners=False)
            x = self.smooth[level](x + self.laterals[level](detail))
        return self.classify(x)


HEAD_NORM_EPS = 1e-5


class MaskTransformer(nn.Module):
    """Class logits per patch token: features -> (B, Q, h, w).

    Class embeddings behind the patch tokens, joint self-attention, cosine similarity, LayerNorm over classes. Its
    LayerNorm epsilon differs from the backbone's.

    On a compact sequence it runs on kept tokens and representatives alone; a merged token gets the class scores of its
    representative. Where merged tokens are grouped, its blocks run on kept tokens and groups; a merged token gets what
    they added to its group.
    """

    def __init__(self, embed_dim: int, num_classes: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dec_proj = nn.Linear(embed_dim, embed_dim)
        self.class_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_classes, embed_dim), std=0.02))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, HEAD_NORM_EPS) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=HEAD_NORM_EPS)
        self.patch_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.class_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes, eps=HEAD_NORM_EPS)

    def forward(self, features: Features) -> Tensor:
        projected = self.dec_proj(features.tokens)
        groups = features.groups
        rows = projected if groups is None else groups.pool(projected)
        x = torch.cat([rows, self.class_embed.expand(rows.shape[0], -1, -1)], dim=1)
        key_mask = features.key_mask
        if groups is not None:
            key_mask = F.pad(groups.log_sizes(projected), (0, self.num_classes))
        elif key_mask is not None:
            key_mask = F.pad(key_mask, (0, self.num_classes), value=True)
        for block in self.blocks:
            x = block(x, key_mask)
        patches, classes = x[:, : -self.num_classes], x[:, -self.num_classes :]
        if groups is not None:
            patches = projected + groups.spread(patches - rows)
        patches, classes = self.norm(patches), self.norm(classes)
        # Cosines of many classes differ in digits that half precision lacks: at least float32 from here on.
        precise = torch.promote_types(x.dtype, torch.float32)
        patches = F.normalize(self.patch_proj(patches).to(precise), dim=-1)
        classes = F.normalize(self.class_proj(classes).to(precise), dim=-1)
        scores = self.mask_norm(patches @ classes.transpose(1, 2))
        return features.to_grid(scores)


def pooling_matrix(length: int, cells: int | Tensor, like: Tensor) -> Tensor:
    """Adaptive average pooling of a line: (cells, length), each row the mean of its cell, which may share samples.

    As a matrix it can be traced with a number of cells only known at run time, captured in a CUDA graph, and exported
    to ONNX, which has no adaptive pooling to cells of unequal size.

    Args:
        length: samples.
        cells: number of cells of the result; a () int64 tensor where traced.
        like: gives the matrix its type and device.
    """
    index = torch.arange(cells, device=like.device)  # type: ignore[arg-type]  # a tensor where traced
    place = torch.arange(length, device=like.device)
    start, end = index * length // cells, ((index + 1) * length + cells - 1) // cells
    inside = (place >= start[:, None]) & (place < end[:, None])
    return inside.to(like.dtype) / (end - start)[:, None].to(like.dtype)


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

    UPerNet's head (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221) on the outputs
    of several transformer blocks, as mmsegmentation computes it: pyramid pooling on the deepest level, a top-down path
    over the others, batch norm and ReLU after each convolution, bilinear resizing without aligned corners.

    The official ClustViT has no neck: all levels have the token grid. mmsegmentation's own ViT models scale them to 4,
    2, 1 and 1/2 times the grid first; the logits are then on a grid four times as fine.

    Args:
        embed_dim: width of the levels.
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


_NORM_GROUPS = 32


class FeaturePyramidHead(nn.Module):
    """Class logits on the grid of the finest level: features with a pyramid of (B, C_i, h_i, w_i) -> (B, Q, h_0, w_0).

    The semantic branch of Kirillov et al., "Panoptic Feature Pyramid Networks", arXiv 1901.02446: lateral 1x1
    convolutions and a top-down sum; each level is brought to the finest grid by steps of convolution and doubling, and
    the levels are added. Lighter than published: 128 channels, and no further convolution on the pyramid's levels.

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
