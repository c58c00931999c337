# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""ClusTR: a pyramid vision transformer whose keys and values are clustered by content.

Xie et al., "ClusTR: Exploring Efficient Self-attention via Clustering for Vision Transformers", arXiv 2208.13138, as
the reference implementation (YtongXie/ClusTR) computes it in evaluation mode without its density noise. Two additions
for dense prediction, both off in the exact form: clusters sought within windows of the token grid, and once per stage
instead of in every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.errors import ConfigError, ImageError
from clustvit_ros.networks.density_peaks import density_peaks, split_windows
from clustvit_ros.networks.heads import FeaturePyramidHead
from clustvit_ros.networks.segmenter import Backbone, Features, NetworkConfig, Segmenter, check_drop_path

BLOCK_NORM_EPS = 1e-6
EMBED_NORM_EPS = 1e-5
# Clusters of the fine scale for each of the coarse one.
FINE_RATIO = 4


class Clusters(NamedTuple):
    """A clustering of the tokens of a stage.

    Attributes:
        windows: (W, n) int64 positions of the tokens of each window; one window is the whole grid.
        coarse_ids, fine_ids: (B * W, n) int64, cluster of each token of a window.
        num_coarse, num_fine: clusters per window.
    """

    windows: Tensor
    coarse_ids: Tensor
    fine_ids: Tensor
    num_coarse: int
    num_fine: int


def cluster_tokens(x: Tensor, grid_size: tuple[int, int], sr_ratio: int, window_tokens: int = 0) -> Clusters:
    """Cluster tokens at ClusTR's two scales: N // sr_ratio^2 clusters, and four times as many.

    Args:
        x: (B, N, C), the attention's input.
        grid_size: (h, w), h * w == N.
        sr_ratio: reduction, above 1.
        window_tokens: largest window within which clusters are sought; 0 is the whole grid (exact).
    """
    # Plain numbers, not traced ones: an export's shapes are then known when it is made.
    windows = split_windows((int(grid_size[0]), int(grid_size[1])), window_tokens or int(x.shape[1]), x.device)
    num_tokens = int(windows.shape[1])
    num_coarse = max(num_tokens // sr_ratio**2, 1)
    num_fine = min(FINE_RATIO * num_coarse, num_tokens)
    coarse, fine = density_peaks(_in_windows(x, windows), (num_coarse, num_fine))
    return Clusters(windows, coarse, fine, num_coarse, num_fine)


def merge_tokens(x: Tensor, weights: Tensor, cluster_ids: Tensor, num_clusters: int) -> Tensor:
    """Weighted mean token of each cluster: (B, N, C), (B, N, 1), (B, N) in 0..n-1 -> (B, n, C)."""
    weighted = torch.cat([x * weights, weights], dim=2)
    index = cluster_ids[..., None].expand_as(weighted)
    # Zeros that are computed: the ONNX exporter would make plain ones a constant of its example's batch size.
    zeros = (0 * index[:, :num_clusters]).to(x.dtype)
    summed = zeros.scatter_add(1, index, weighted)
    return summed[..., :-1] / (summed[..., -1:] + 1e-6)


def _in_windows(x: Tensor, windows: Tensor) -> Tensor:
    """(B, N, C) -> (B * W, n, C)."""
    return x if len(windows) == 1 else x[:, windows].flatten(0, 1)


class ClusTRAttention(nn.Module):
    """Attention of all tokens to cluster tokens of two scales, their results summed; plain attention at `sr_ratio` 1.

    Args:
        embed_dim: C.
        num_heads: heads.
        sr_ratio: a coarse cluster stands for sr_ratio^2 tokens on average.
    """

    def __init__(self, embed_dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(embed_dim, embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        if sr_ratio > 1:
            self.weight_layer = nn.Linear(embed_dim, 1)
            self.kv1 = nn.Linear(embed_dim, 2 * embed_dim)
            self.kv2 = nn.Linear(embed_dim, 2 * embed_dim)
        else:
            self.kv = nn.Linear(embed_dim, 2 * embed_dim)

    def forward(self, x: Tensor, clusters: Clusters | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C).
            clusters: what `cluster_tokens` gave, needed where `sr_ratio` is above 1; clusters of more than one window
                share attention all the same.
        """
        q = self._split_heads(self.q(x))
        if clusters is None:
            return self.proj(self._attend(q, self.kv(x)))
        coarse, fine = self.merge(x, clusters)
        return self.proj(self._attend(q, self.kv1(coarse)) + self._attend(q, self.kv2(fine)))

    def merge(self, x: Tensor, clusters: Clusters) -> tuple[Tensor, Tensor]:
        """Cluster tokens of both scales: (B, N, C) -> (B, W * num_coarse, C), (B, W * num_fine, C)."""
        weights = self.weight_layer(x).exp()
        x, weights = _in_windows(x, clusters.windows), _in_windows(weights, clusters.windows)
        coarse = merge_tokens(x, weights, clusters.coarse_ids, clusters.num_coarse)
        fine = merge_tokens(x, weights, clusters.fine_ids, clusters.num_fine)
        count = int(clusters.windows.shape[0])
        return coarse.unflatten(0, (-1, count)).flatten(1, 2), fine.unflatten(0, (-1, count)).flatten(1, 2)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # B L C -> B H L D

    def _attend(self, q: Tensor, kv: Tensor) -> Tensor:
        k, v = (self._split_heads(part) for part in kv.chunk(2, dim=2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ResidualDepthwise(nn.Conv2d):
    """A depthwise 3x3 convolution beside a skip connection: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvMlp(nn.Module):
    """Linear, GELU of the hidden tokens plus their depthwise 3x3 convolution on the grid, linear."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.dwconv = ResidualDepthwise(hidden_dim)
        self.act: nn.Module = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        hidden = self.fc1(x).transpose(1, 2).unflatten(2, grid_size)  # B N C -> B C h w
        return self.fc2(self.act(self.dwconv(hidden)).flatten(2).transpose(1, 2))


class ClusTRBlock(nn.Module):
    """Pre-norm block: x += attention(norm(x)); x += MLP(norm(x))."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=BLOCK_NORM_EPS)
        self.attn = ClusTRAttention(embed_dim, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(embed_dim, eps=BLOCK_NORM_EPS)
        self.mlp = ConvMlp(embed_dim, int(embed_dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(
        self, x: Tensor, grid_size: tuple[int, int], window_tokens: int = 0, clusters: Clusters | None = None
    ) -> tuple[Tensor, Clusters | None]:
        """Run the block: tokens and the clusters it used, which it makes from its own input where none are given."""
        normed = self.norm1(x)
        if clusters is None and self.attn.sr_ratio > 1:
            clusters = cluster_tokens(normed, grid_size, self.attn.sr_ratio, window_tokens)
        x = x + self._dropped(self.attn(normed, clusters))
        return x + self._dropped(self.mlp(self.norm2(x), grid_size)), clusters

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1.0 - self.drop_path)


class OverlapPatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and a norm, (B, C, H, W) -> (B, N, C') and the grid (h, w)."""

    def __init__(self, in_dim: int, embed_dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, embed_dim, kernel_size, stride=stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(embed_dim, eps=EMBED_NORM_EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (int(x.shape[2]), int(x.shape[3]))


class ClusTRStage(nn.Module):
    """Patch embedding, blocks and final norm.

    Args:
        drop_paths: stochastic depth of each block; their number is the depth.
    """

    def __init__(
        self, in_dim: int, embed_dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int, drop_paths: Sequence[float],
        is_first: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = OverlapPatchEmbed(in_dim, embed_dim, 7 if is_first else 3, 4 if is_first else 2)
        self.blocks = nn.ModuleList(
            ClusTRBlock(embed_dim, num_heads, mlp_ratio, sr_ratio, drop_path) for drop_path in drop_paths
        )
        self.norm = nn.LayerNorm(embed_dim, eps=BLOCK_NORM_EPS)

    def forward(self, x: Tensor, window_tokens: int, cluster_once: bool) -> tuple[Tensor, tuple[int, int]]:
        """Feature map in, tokens and their grid out: (B, C, H, W) -> (B, N, C')."""
        x, grid_size = self.patch_embed(x)
        clusters = None
        for block in self.blocks:
            x, found = block(x, grid_size, window_tokens, clusters)
            clusters = found if cluster_once else None
        return self.norm(x), grid_size


class ClusTR(Backbone):
    """ClusTR's four stages at strides 4, 8, 16 and 32.

    Args:
        embed_dims, depths, num_heads, mlp_ratios, sr_ratios: per stage.
        window_tokens: largest window of tokens within which clusters are sought; 0 is the whole grid (exact).
        cluster_once: cluster in a stage's first block only, and use these clusters in all of them.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
    """

    patch_size = 32
    decides = True

    def __init__(
        self, embed_dims: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], mlp_ratios: Sequence[float],
        sr_ratios: Sequence[int], window_tokens: int = 0, cluster_once: bool = False, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed_dims = tuple(embed_dims)
        self.window_tokens, self.cluster_once = window_tokens, cluster_once
        total = sum(depths)
        rates = [drop_path * index / max(total - 1, 1) for index in range(total)]
        stages = []
        in_dim, start = 3, 0
        for dim, depth, heads, mlp_ratio, sr_ratio in zip(
            embed_dims, depths, num_heads, mlp_ratios, sr_ratios, strict=True
        ):
            block_rates = rates[start : start + depth]
            stages.append(ClusTRStage(in_dim, dim, heads, mlp_ratio, sr_ratio, block_rates, is_first=start == 0))
            in_dim, start = dim, start + depth
        self.stages = nn.ModuleList(stages)

    def stage_tokens(self, images: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
        """Tokens after each stage's norm and their grids: (B, 3, H, W) -> four of (B, N, C), (h, w).

        Raises:
            ImageError: not a batch of three-channel images.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] == 0 or images.shape[3] == 0:
            raise ImageError(f"images: got shape {tuple(images.shape)}, expected (batch, 3, height, width)")
        x, outputs = images, []
        for stage in self.stages:
            tokens, grid_size = stage(x, self.window_tokens, self.cluster_once)
            outputs.append((tokens, grid_size))
            x = tokens.transpose(1, 2).unflatten(2, grid_size)
        return outputs

    def encode(self, images: Tensor) -> Any:
        """All of the network: (B, 3, H, W) -> features."""
        stages = self.stage_tokens(images)
        tokens, grid_size = stages[-1]
        pyramid = tuple(tokens.transpose(1, 2).unflatten(2, grid) for tokens, grid in stages)
        return Features(tokens, grid_size, pyramid=pyramid)

    def finish(self, state: Any, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None) -> Features:
        return state


@dataclass(frozen=True)
class ClusTRConfig(NetworkConfig):
    """Everything that fixes the shape of a ClusTR with its feature-pyramid head; tuples are per stage.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: sizes of the encoder.
        sr_ratios: a coarse cluster stands for so many tokens, squared; 1 is plain attention.
        window_tokens: clusters are sought within windows of at most so many tokens; 0 is the whole grid, as published,
            whose cost grows with the square of the tokens.
        cluster_once: cluster in a stage's first block only; false is as published.
        head_dim: channels of the feature pyramid.
        drop_path: stochastic depth, in training only.
    """

    patch_size: int = 32
    embed_dims: tuple[int, int, int, int] = (64, 128, 256, 512)
    depths: tuple[int, int, int, int] = (1, 2, 6, 1)
    num_heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    mlp_ratios: tuple[float, float, float, float] = (8.0, 8.0, 4.0, 4.0)
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    window_tokens: int = 1024
    cluster_once: bool = True
    head_dim: int = 128
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        check_drop_path(self)
        if self.patch_size != 32:
            raise ConfigError(f"network: patch_size is {self.patch_size}, ClusTR's four stages make it 32")
        for name in ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios"):
            if min(getattr(self, name)) < 1:
                raise ConfigError(f"network: {name} is {list(getattr(self, name))}, expected at least 1 each")
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ConfigError(f"network: embed_dims {dim} is not a multiple of its num_heads {heads}")
        if self.window_tokens and self.window_tokens < 4 * max(self.sr_ratios) ** 2:
            raise ConfigError(
                f"network: window_tokens is {self.window_tokens}, expected 0 (no windows) or at least four of the "
                f"largest cluster, {4 * max(self.sr_ratios) ** 2}"
            )
        if self.head_dim < 32 or self.head_dim % 32:
            raise ConfigError(f"network: head_dim is {self.head_dim}, expected a multiple of 32")

    def build(self, num_classes: int) -> Segmenter:
        backbone = ClusTR(
            self.embed_dims, self.depths, self.num_heads, self.mlp_ratios, self.sr_ratios,
            self.window_tokens, self.cluster_once, self.drop_path,
        )  # fmt: skip
        return Segmenter(backbone, FeaturePyramidHead(self.embed_dims, num_classes, self.head_dim))
