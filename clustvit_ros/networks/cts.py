# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""CTS: a small network says which windows show one class, and the patches of such a window share a token.

Lu, de Geus, Dubbelman, "Content-aware Token Sharing for Efficient Semantic Segmentation with Vision Transformers",
arXiv 2306.02095: before the encoder, a policy network scores each 2x2 window; those with the highest scores are seen at
half resolution, as one patch at the mean of their positions, and each of their tokens takes the result. How many
windows share is fixed beforehand, as by a capacity here: the paper's 612 + 103 tokens of 1024 are a capacity of 715.

The policy network is EfficientNet-Lite0 up to its last block (Tan, Le, arXiv 1905.11946; without squeeze and
excitation, with ReLU6), whose stride of 32 pixels is a window of patches of 16; layers are named as in timm.

ClustViT's authors (DTU-PAS/clustvit) compare with a form of their own, which their checkpoints need: a shared token has
its window's first position and returns to that alone; the head sees zeros for the other three (`share_corner`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.networks.algm import WINDOW_TOKENS, count_unshared, match_down, merge_windows
from clustvit_ros.networks.bipartite_merging import at_most, group_ids
from clustvit_ros.networks.clustering import gather_rows
from clustvit_ros.networks.segmenter import Features
from clustvit_ros.networks.vit import VisionTransformer

POLICY_STRIDE = 32
# Blocks of each stage: how many, kernel, stride of the first, widening, channels.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
_STEM_CHANNELS = 32
_LEAST_MARGIN = 1e-3


class _InvertedResidual(nn.Sequential):
    """Widen, convolve each channel, narrow; beside a skip connection where the shape stays."""

    def __init__(self, dim: int, out_dim: int, kernel: int, stride: int, widening: int) -> None:
        wide = dim * widening
        depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        layers: list[tuple[str, nn.Module]] = []
        if widening > 1:
            layers += [("conv_pw", nn.Conv2d(dim, wide, 1, bias=False)), ("bn1", nn.BatchNorm2d(wide)), _relu6(1)]
            layers += [("conv_dw", depthwise), ("bn2", nn.BatchNorm2d(wide)), _relu6(2)]
            layers += [("conv_pwl", nn.Conv2d(wide, out_dim, 1, bias=False)), ("bn3", nn.BatchNorm2d(out_dim))]
        else:
            layers += [("conv_dw", depthwise), ("bn1", nn.BatchNorm2d(wide)), _relu6(1)]
            layers += [("conv_pw", nn.Conv2d(wide, out_dim, 1, bias=False)), ("bn2", nn.BatchNorm2d(out_dim))]
        super().__init__(OrderedDict(layers))
        self.skips = stride == 1 and dim == out_dim

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) if self.skips else super().forward(x)


def _relu6(number: int) -> tuple[str, nn.Module]:
    return f"act{number}", nn.ReLU6()


class _EfficientNetLite(nn.Sequential):
    """(B, 3, H, W) -> (B, 320, H/32, W/32), sides rounded up."""

    def __init__(self) -> None:
        dim, stages = _STEM_CHANNELS, []
        for count, kernel, stride, widening, out_dim in _STAGES:
            blocks = []
            for index in range(count):
                blocks.append(_InvertedResidual(dim, out_dim, kernel, 1 if index else stride, widening))
                dim = out_dim
            stages.append(nn.Sequential(*blocks))
        stem = nn.Conv2d(3, _STEM_CHANNELS, 3, 2, 1, bias=False)
        layers = [("conv_stem", stem), ("bn1", nn.BatchNorm2d(_STEM_CHANNELS)), _relu6(1)]
        super().__init__(OrderedDict([*layers, ("blocks", nn.Sequential(*stages))]))


class PolicyNetwork(nn.Module):
    """Which windows show one class: (B, 3, H, W) -> logits (B, 2, H/32, W/32), of "no" and "yes"."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _EfficientNetLite()
        self.head = nn.Conv2d(_STAGES[-1][-1], 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        # As precise as its last layer: what is merged where is decided in float32.
        return self.head(self.backbone(images).to(self.head.weight.dtype))


class Sharing(NamedTuple):
    """The network's state before the first block.

    Attributes:
        x: (B, 1+N, C), class token first.
        shared: (B, W, C), what each 2x2 window is as one token, row by row.
        logits: (B, W, 2), the policy network's.
        grid_size: (h, w) patches.
        details: the stem's finer maps, where the head asked for them.
    """

    x: Tensor
    shared: Tensor
    logits: Tensor
    grid_size: tuple[int, int]
    details: tuple[Tensor, ...] = ()


class TokenSharingViT(VisionTransformer):
    """ViT whose windows of one class share a token from the beginning.

    Args:
        decode_compact: leave the sequence compact for the head, as in the paper.
        share_corner: as ClustViT's authors have it.
        shared_windows: how many windows of an image of `image_size` share at a threshold of 0.5, as many of its part in
            another size; 0 is those that show one class more probably than not.
        vit: arguments of `VisionTransformer`; patches of 16 pixels.
    """

    merges = True
    merge_unit = 2

    def __init__(
        self, decode_compact: bool = False, share_corner: bool = False, shared_windows: int = 0, **vit: Any
    ) -> None:
        super().__init__(**vit)
        self.shared_windows = shared_windows
        self.decode_compact = decode_compact
        self.share_corner = share_corner
        self.policy_net = PolicyNetwork()

    def encode(self, images: Tensor) -> Sharing:
        """Scores, and both forms of every window: (B, 3, H, W) -> state, whose cost no setting changes."""
        x, grid_size, details = self.embed_with_details(images)
        rows, columns = grid_size[0] // 2, grid_size[1] // 2
        if rows == 0 or columns == 0:  # one row of patches has no window
            return Sharing(x, x[:, :0], x.new_zeros(len(x), 0, 2), grid_size, details)
        height, width = (2 * self.patch_size * count for count in (rows, columns))
        whole = images
        if images.shape[2] < height or images.shape[3] < width:
            whole = F.pad(images, (0, max(width - images.shape[3], 0), 0, max(height - images.shape[2], 0)))
        whole = whole[:, :, :height, :width]
        logits = self._centred(self.policy_net(whole).flatten(2).transpose(1, 2))
        # Half of the resolution by bilinear interpolation is the mean of four pixels.
        shared = self.patch_embed(F.avg_pool2d(whole, 2)).flatten(2).transpose(1, 2)
        positions = self.resized_pos_embed(grid_size)[:, 1:].unflatten(1, grid_size)[:, : 2 * rows, : 2 * columns]
        windows = positions.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))
        position = windows[:, :, 0, :, 0] if self.share_corner else windows.mean(dim=(2, 4))
        return Sharing(x, shared + position.flatten(1, 2), logits, grid_size, details)

    def _centred(self, logits: Tensor) -> Tensor:
        """Logits (B, W, 2) whose margin is above 0 for as many windows of each image as share by schedule."""
        if not self.shared_windows:
            return logits
        margin = logits[..., 1] - logits[..., 0]
        share = self.shared_windows / ((self.grid_size[0] // 2) * (self.grid_size[1] // 2))
        rank = margin.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        shares = rank + 0.5 < share * margin.shape[1]
        # Halfway between the last window that shares and the first that does not, which may be equal.
        last = margin.masked_fill(~shares, torch.inf).amin(dim=1, keepdim=True)
        first = margin.masked_fill(shares, -torch.inf).amax(dim=1, keepdim=True)
        centre = torch.where(last.isinf(), first, torch.where(first.isinf(), last, (last + first) / 2))
        margin = margin - centre
        margin = torch.where(shares, margin.clamp(min=_LEAST_MARGIN), margin.clamp(max=-_LEAST_MARGIN))
        return torch.stack([-margin / 2, margin / 2], dim=2)

    def count_kept(self, state: Sharing, merge_threshold: float | Tensor) -> Tensor:
        """Tokens that are left when windows share whose probability of showing one class is above the threshold."""
        return count_unshared(_margin(state).sigmoid(), state.x.shape[1] - 1, merge_threshold)

    def finish(
        self, state: Sharing, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None
    ) -> Features:
        """Let windows share, and run all blocks; exact mode lets as many as the threshold has in every image.

        One token of each window counts as kept. A capacity is kept to the window. Where each of them shares and that is
        not enough, below a quarter of the tokens, pairs of tokens that are alike become one as well.
        """
        N, W = state.x.shape[1] - 1, state.shared.shape[1]
        margin, others = _margin(state), WINDOW_TOKENS - 1
        if token_capacity is None:
            windows: int | Tensor = int((margin.sigmoid() > merge_threshold).sum(dim=1).min())
        else:
            capacity = token_capacity if isinstance(token_capacity, Tensor) else min(max(token_capacity, 1), N)
            windows = at_most((N - capacity + others - 1) // others, W)
        groups = merge_windows(state.x, margin, windows, state.grid_size, state.shared)
        if token_capacity is not None:
            most = W if isinstance(windows, Tensor) else windows
            groups = match_down(groups, capacity, N - others * most)
        merges = isinstance(windows, Tensor) or groups.x.shape[1] <= N
        compact = self.decode_compact and merges
        ids = group_ids(groups.slots, groups.leads)
        x, levels = groups.x, []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.hands_out(index):
                levels.append(self._spread(x[:, 1:], groups.slots, ids))
        if merges and not compact:
            x = torch.cat([x[:, :1], gather_rows(x[:, 1:], groups.slots)], dim=1)
        features = self.features(
            x, state.grid_size, levels, cluster_logits=state.logits, cluster_ids=ids,
            slots=groups.slots if compact else None, pyramid=state.details,
        )  # fmt: skip
        if not (self.share_corner and merges):
            return features
        tokens = features.tokens.masked_fill(ids[..., None] > 0, 0.0)
        last = (tokens,) if len(self.blocks) - 1 in self.level_blocks else ()
        return features._replace(tokens=tokens, levels=(*features.levels[: len(levels)], *last))

    def _spread(self, rows: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
        tokens = gather_rows(rows, slots)
        return tokens.masked_fill(ids[..., None] > 0, 0.0) if self.share_corner else tokens


def _margin(state: Sharing) -> Tensor:
    """Logit of each window's merge score: (B, W)."""
    return state.logits[..., 1] - state.logits[..., 0]
