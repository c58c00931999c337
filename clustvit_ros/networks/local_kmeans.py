# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Local k-means between two blocks and reconstruction at the end, without any trained part.

Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning", arXiv 2210.01035:
the token clustering layer starts from centres that are averages over a coarser grid and refines them by a few rounds of
soft k-means in which each token looks at the centres near it; the remaining blocks run on the centres; the token
reconstruction layer gives each token the processed centres, weighted by how near they were.

What differs, and why: distances are divided by their mean in the image, so that one sharpness serves networks of every
width and scale (the paper sets a temperature per network); reconstruction weighs the same near centres, not the 20
nearest anywhere, so that it works with fewer than 20 and needs no sorting.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.networks.bipartite_merging import (
    Similarity,
    TrainingFreeViT,
    count_dissimilar,
    group_ids,
    most_similar,
    similarity_score,
)
from clustvit_ros.networks.heads import pooling_matrix
from clustvit_ros.networks.segmenter import Features

_ROUNDS = 5
_WINDOW = 2  # centres to each side that a token looks at: 5 x 5
_SHARPNESS = 5.0


class LocalKMeansViT(TrainingFreeViT):
    """ViT whose blocks from `injection_point` on run on cluster centres.

    With `decode_compact`, each token takes its nearest centre's class scores.
    """

    def encode(self, images: Tensor) -> Similarity:
        """Everything before the clustering: (B, 3, H, W) -> state, whose cost no setting changes."""
        x, grid_size, levels, details = self.unmerged(images)
        score = similarity_score(most_similar(x[:, 1:]), self.merge_similarity)
        return Similarity(x, x[:, 1:], score, grid_size, levels, details)

    def count_kept(self, state: Similarity, merge_threshold: float | Tensor) -> Tensor:
        """Tokens to which no other one is more similar than the threshold allows."""
        return count_dissimilar(state.score, merge_threshold)

    def finish(
        self, state: Similarity, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None
    ) -> Features:
        """Cluster, run the remaining blocks, reconstruct; exact mode is sized by the threshold and the fullest image.

        The centres form a grid of the image's aspect, so there are at most `token_capacity` of them, and often a few
        less. One token per centre, that in the middle of its place, counts as kept.
        """
        tokens = state.metric
        N = tokens.shape[1]
        if token_capacity is None:
            token_capacity = max(int(self.count_kept(state, merge_threshold).max()), 1)
        full = token_capacity >= N if isinstance(token_capacity, Tensor) else None
        if not isinstance(token_capacity, Tensor):
            token_capacity = max(token_capacity, 1)
            if token_capacity >= N:
                return self._unmerged(state)
        centre_grid = grid_of_centres(token_capacity, state.grid_size)
        centres, weights = local_kmeans(tokens, state.grid_size, centre_grid)
        x = torch.cat([state.x[:, :1], centres], dim=1)
        if full is not None:
            # All tokens kept: the tokens themselves are the sequence, and the clustering above was in vain.
            x = torch.cat([state.x, x], dim=1)[:, torch.where(full, 0, 1 + N) :]
            x = x[:, : torch.where(full, 1 + N, x.shape[1])]
        slots = weights.argmax(dim=2)
        levels = list(state.levels)
        for index in range(self.injection_point, len(self.blocks)):
            x = self.blocks[index](x)
            if self.hands_out(index):
                levels.append(_reconstructed(x, weights, full)[:, 1:])
        ids = group_ids(slots, middles(state.grid_size, centre_grid, slots))
        if full is not None:
            ids = torch.where(full, 0, ids)
            slots = torch.where(full, torch.arange(N, device=x.device), slots)
        if not self.decode_compact:
            x = _reconstructed(x, weights, full)
        rows = slots if self.decode_compact else None
        return self.features(x, state.grid_size, levels, cluster_ids=ids, slots=rows, pyramid=state.details)

    def _unmerged(self, state: Similarity) -> Features:
        x, levels = state.x, list(state.levels)
        for index in range(self.injection_point, len(self.blocks)):
            x = self.blocks[index](x)
            if self.hands_out(index):
                levels.append(x[:, 1:])
        ids = torch.zeros(x.shape[0], x.shape[1] - 1, dtype=torch.int64, device=x.device)
        return self.features(x, state.grid_size, levels, cluster_ids=ids, pyramid=state.details)


def _reconstructed(x: Tensor, weights: Tensor, full: Tensor | None) -> Tensor:
    """Each token as the weighted mean of the processed centres: (B, 1+T, C), (B, N, T) -> (B, 1+N, C).

    Args:
        x: the processed sequence; where `full`, the processed tokens themselves.
        weights: shares of each token's centres.
        full: () bool, whether nothing was clustered, where that is traced; else None.
    """
    N, T = weights.shape[1:]
    tokens = weights @ x[:, 1 : 1 + T]
    if full is not None:
        tokens = torch.where(full, torch.cat([x[:, 1:], tokens], dim=1)[:, :N], tokens)
    return torch.cat([x[:, :1], tokens], dim=1)


def grid_of_centres(capacity: int | Tensor, grid_size: tuple[int, int]) -> tuple[int | Tensor, int | Tensor]:
    """Rows and columns of centres in the grid's aspect, at most `capacity` together; one for a traced full capacity."""
    height, width = grid_size
    # A little more than the root, so that a square is not missed by rounding.
    if isinstance(capacity, Tensor):
        limited = torch.where(capacity >= height * width, 1, capacity)
        wanted = (limited.double() * height / width).sqrt().add(1e-6).long().clamp(min=1, max=height)
        traced_rows = torch.minimum(wanted, limited)
        return traced_rows, (limited // traced_rows).clamp(max=width)
    rows = min(max(int(math.sqrt(capacity * height / width) + 1e-6), 1), height, capacity)
    return rows, int(min(capacity // rows, width))


def middles(grid_size: tuple[int, int], centre_grid: tuple[int | Tensor, int | Tensor], like: Tensor) -> Tensor:
    """The token in the middle of each centre's first place, no two the same: (B, T) int64 positions."""
    rows, columns = (
        (2 * torch.arange(cells, device=like.device) + 1) * length // (2 * cells)  # type: ignore[arg-type]
        for length, cells in zip(grid_size, centre_grid, strict=True)
    )
    return (rows[:, None] * grid_size[1] + columns).flatten().expand(like.shape[0], -1)


def local_kmeans(
    tokens: Tensor, grid_size: tuple[int, int], centre_grid: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor]:
    """Soft k-means in which each token sees the centres around its place.

    Args:
        tokens: (B, N, C), row-major over the grid.
        grid_size: (h, w), h * w == N.
        centre_grid: rows and columns of centres.

    Returns:
        Centres (B, T, C), row-major over their grid, and weights (B, N, T) of each token's centres, which sum to 1.
    """
    rows, columns = (
        pooling_matrix(length, cells, tokens) for length, cells in zip(grid_size, centre_grid, strict=True)
    )
    grid = tokens.unflatten(1, grid_size)
    pooled = torch.einsum("bhwc,rh->brwc", grid, rows)
    centres = torch.einsum("brwc,sw->brsc", pooled, columns).flatten(1, 2)
    near_rows, near_columns = (
        _centre_distance(length, cells, tokens) <= _WINDOW for length, cells in zip(grid_size, centre_grid, strict=True)
    )
    near = (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)  # N T
    # The distance of tokens to the means of their own places sets the scale.
    spread = tokens.var(dim=(1, 2), keepdim=True, unbiased=False) * tokens.shape[2]
    norms = tokens.square().sum(dim=2, keepdim=True)
    weights = None
    for _ in range(_ROUNDS):
        squared = norms + centres.square().sum(dim=2)[:, None] - 2.0 * (tokens @ centres.transpose(1, 2))
        weights = F.softmax((-_SHARPNESS * squared / spread).masked_fill(~near, -math.inf), dim=2)
        centres = (weights.transpose(1, 2) @ tokens) / weights.sum(dim=1).clamp(min=1e-6)[..., None]
    assert weights is not None
    return centres, weights


def _centre_distance(length: int, cells: int | Tensor, like: Tensor) -> Tensor:
    """How many centres each place along one side of the grid is from each: (length, cells) int64."""
    index = torch.arange(cells, device=like.device)  # type: ignore[arg-type]  # a tensor where traced
    place = torch.arange(length, device=like.device)
    return ((place * cells // length)[:, None] - index).abs()
