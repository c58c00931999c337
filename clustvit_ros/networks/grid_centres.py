# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Tokens that stand for the places of a coarse grid: local k-means, and STViT-R's semantic tokens.

Local k-means needs no trained part. Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction
without Fine-tuning", arXiv 2210.01035: the token clustering layer starts from centres that are averages over a coarser
grid and refines them by a few rounds of soft k-means in which each token looks at the centres near it; the remaining
blocks run on the centres; the token reconstruction layer gives each token the processed centres, weighted by how near
they were. What differs, and why: distances are divided by their mean in the image, so that one sharpness serves
networks of every width and scale (the paper sets a temperature per network); reconstruction weighs the same near
centres, not the 20 nearest anywhere, so that it works with fewer than 20 and needs no sorting.

STViT-R is to be trained for. Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View",
arXiv 2303.08685: two blocks make semantic tokens, whose first queries are pooled over a coarser grid and which attend
to themselves and to all tokens; blocks run on them alone; and a last block recovers all tokens, as they were, by having
them attend to the semantic ones. With several injection points that repeats (the paper's dumbbell units), and the block
before each runs on all tokens. Blocks are the plain ViT's own, in their places, as in the authors' code
(changsn/STViT-R), so that a threshold of 1 is plain ViT and any trained one can start. What differs: their Swin attends
in overlapping windows and takes the maxima of a cell; here the image is one window and a cell has its mean, which can
be traced with a capacity known at run time only. Learnt tokens, one for each semantic token and added to it, would fix
the capacity, and are left out, as their code can.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.bipartite_merging import (
    Similarity,
    TrainingFreeViT,
    count_dissimilar,
    group_ids,
    most_similar,
    similarity_score,
)
from clustvit_ros.networks.clustering import gather_rows
from clustvit_ros.networks.heads import pooling_matrix
from clustvit_ros.networks.segmenter import Features
from clustvit_ros.networks.vit import Block

CentreGrid = tuple[int | Tensor, int | Tensor]

_ROUNDS = 5
_WINDOW = 2  # centres to each side that a token looks at: 5 x 5
_SHARPNESS = 5.0
_GENERATING = 2  # blocks that make semantic tokens
_LEAST_UNIT = _GENERATING + 1  # and one that recovers


class GridCentresViT(TrainingFreeViT):
    """ViT that merges all tokens into centres, at most as many as a capacity has room for, in a grid of its aspect.

    With `decode_compact`, each token takes one centre's class scores.
    """

    def encode(self, images: Tensor) -> Similarity:
        """Everything before the first merge: (B, 3, H, W) -> state, whose cost no setting changes."""
        x, grid_size, levels, details = self.unmerged(images)
        score = similarity_score(most_similar(x[:, 1:]), self.merge_similarity)
        return Similarity(x, x[:, 1:], score, grid_size, levels, details)

    def count_kept(self, state: Similarity, merge_threshold: float | Tensor) -> Tensor:
        """Tokens to which no other one is more similar than the threshold allows."""
        return count_dissimilar(state.score, merge_threshold)

    def finish(
        self, state: Similarity, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None
    ) -> Features:
        """Merge, run the remaining blocks, undo; exact mode is sized by the threshold and the fullest image.

        The centres form a grid of the image's aspect, so there are at most `token_capacity` of them, and often a few
        less. One token per centre, that in the middle of its place, counts as kept.
        """
        N = state.metric.shape[1]
        if token_capacity is None:
            token_capacity = max(int(self.count_kept(state, merge_threshold).max()), 1)
        full = token_capacity >= N if isinstance(token_capacity, Tensor) else None
        if not isinstance(token_capacity, Tensor):
            token_capacity = max(token_capacity, 1)
            if token_capacity >= N:
                return self._unmerged(state)
        centre_grid = grid_of_centres(token_capacity, state.grid_size)
        x, levels, slots = self._merged(state, centre_grid, full)
        ids = group_ids(slots, middles(state.grid_size, centre_grid, slots))
        if full is not None:
            ids = torch.where(full, 0, ids)
            slots = torch.where(full, torch.arange(N, device=x.device), slots)
        rows = slots if self.decode_compact else None
        return self.features(
            x, state.grid_size, [*state.levels, *levels], cluster_ids=ids, slots=rows, pyramid=state.details
        )

    @abc.abstractmethod
    def _merged(
        self, state: Similarity, centre_grid: CentreGrid, full: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The blocks from the injection point on.

        Args:
            state: what `encode` gave.
            centre_grid: rows and columns of centres.
            full: () bool, whether nothing is merged, where that is traced; else None.

        Returns:
            The last block's output, all tokens again unless decoding is compact; levels that a head asked for; and each
            token's centre, (B, N) int64.
        """

    def _unmerged(self, state: Similarity) -> Features:
        x, levels = state.x, list(state.levels)
        for index in range(self.injection_point, len(self.blocks)):
            x = self.blocks[index](x)
            if self.hands_out(index):
                levels.append(x[:, 1:])
        ids = torch.zeros(x.shape[0], x.shape[1] - 1, dtype=torch.int64, device=x.device)
        return self.features(x, state.grid_size, levels, cluster_ids=ids, pyramid=state.details)


class LocalKMeansViT(GridCentresViT):
    """ViT whose blocks from `injection_point` on run on cluster centres."""

    def _merged(
        self, state: Similarity, centre_grid: CentreGrid, full: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        centres, weights = local_kmeans(state.metric, state.grid_size, centre_grid)
        x = _either(full, state.x, torch.cat([state.x[:, :1], centres], dim=1))
        levels = []
        for index in range(self.injection_point, len(self.blocks)):
            x = self.blocks[index](x)
            if self.hands_out(index):
                levels.append(_reconstructed(x, weights, full)[:, 1:])
        slots = weights.argmax(dim=2)
        return x if self.decode_compact else _reconstructed(x, weights, full), levels, slots


class SemanticTokenViT(GridCentresViT):
    """ViT that makes semantic tokens at each injection point, runs on them, and recovers all tokens.

    With `decode_compact` the last tokens are not recovered. A level that a head asks for meanwhile gives each token the
    semantic one of its place.

    Args:
        injection_points: blocks before each unit; three blocks belong to one, and one more before the next.
        options: as in `TrainingFreeViT`.
    """

    def __init__(self, injection_points: Sequence[int], **options) -> None:
        super().__init__(injection_points[0], **options)
        ends = [*(point - 1 for point in injection_points[1:]), len(self.blocks)]
        self.units = list(zip(injection_points, ends, strict=True))
        if any(end - start < _LEAST_UNIT for start, end in self.units):
            raise ConfigError(
                f"injection_points: got {list(injection_points)} with {len(self.blocks)} blocks and merging 'stvit', "
                f"expected at least {_LEAST_UNIT} blocks behind the last, and {_LEAST_UNIT + 1} from one to the next"
            )

    def _merged(
        self, state: Similarity, centre_grid: CentreGrid, full: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        x, levels = state.x, []
        slots = _places(state.grid_size, centre_grid, state.metric)
        last_block = len(self.blocks) - 1
        for start, end in self.units:
            tokens = x[:, 1:]
            N = tokens.shape[1]
            x = _either(full, x, torch.cat([x[:, :1], _pooled(tokens, state.grid_size, centre_grid)], dim=1))
            others = tokens if full is None else tokens[:, : torch.where(full, 0, N)]
            # The block behind a unit is the next one's, on all tokens.
            for index in range(start, min(end + 1, len(self.blocks))):
                block = cast(Block, self.blocks[index])
                if index < start + _GENERATING:
                    x = _across(block, x, others, to_itself=True)
                elif index == end - 1 and not (self.decode_compact and index == last_block):
                    if full is not None:
                        tokens = torch.where(full, torch.cat([x[:, 1:], tokens], dim=1)[:, :N], tokens)
                    x = _across(block, torch.cat([x[:, :1], tokens], dim=1), x)
                else:
                    x = block(x)
                if self.hands_out(index):
                    levels.append(x[:, 1:] if index >= end - 1 else _spread(x[:, 1:], slots, full))
        return x, levels, slots


def _across(block: Block, x: Tensor, others: Tensor, to_itself: bool = False) -> Tensor:
    """A block whose rows attend to others, and, if so asked, to themselves: (B, L, C), (B, M, C) -> (B, L, C)."""
    L = x.shape[1]
    q, k, v = block.attn.heads(block.norm1(torch.cat([x, others], dim=1)))
    first = 0 if to_itself else L
    x = x + block.attn.attend(q[:, :, :L], k[:, :, first:], v[:, :, first:], None)
    return x + block.mlp(block.norm2(x))


def _either(full: Tensor | None, x: Tensor, merged: Tensor) -> Tensor:
    """The sequence itself where nothing is merged, which is told by a traced () bool; else the merged one."""
    if full is None:
        return merged
    both = torch.cat([x, merged], dim=1)[:, torch.where(full, 0, x.shape[1]) :]
    return both[:, : torch.where(full, x.shape[1], both.shape[1])]


def _spread(rows: Tensor, slots: Tensor, full: Tensor | None) -> Tensor:
    """To every token its row: (B, T, C), (B, N) -> (B, N, C); the rows themselves where `full`."""
    if full is not None:
        slots = torch.where(full, torch.arange(slots.shape[1], device=slots.device), slots)
    return gather_rows(rows, slots)


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


def grid_of_centres(capacity: int | Tensor, grid_size: tuple[int, int]) -> CentreGrid:
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


def middles(grid_size: tuple[int, int], centre_grid: CentreGrid, like: Tensor) -> Tensor:
    """The token in the middle of each centre's first place, no two the same: (B, T) int64 positions."""
    rows, columns = (
        (2 * torch.arange(cells, device=like.device) + 1) * length // (2 * cells)  # type: ignore[arg-type]
        for length, cells in zip(grid_size, centre_grid, strict=True)
    )
    return (rows[:, None] * grid_size[1] + columns).flatten().expand(like.shape[0], -1)


def _pooled(tokens: Tensor, grid_size: tuple[int, int], centre_grid: CentreGrid) -> Tensor:
    """Means over the places of a coarser grid: (B, N, C) -> (B, T, C), row-major."""
    rows, columns = (
        pooling_matrix(length, cells, tokens) for length, cells in zip(grid_size, centre_grid, strict=True)
    )
    grid = tokens.unflatten(1, grid_size)
    pooled = torch.einsum("bhwc,rh->brwc", grid, rows)
    return torch.einsum("brwc,sw->brsc", pooled, columns).flatten(1, 2)


def _places(grid_size: tuple[int, int], centre_grid: CentreGrid, like: Tensor) -> Tensor:
    """The centre of each token's place: (B, N) int64, row-major over their grid."""
    rows, columns = (
        torch.arange(length, device=like.device) * cells // length
        for length, cells in zip(grid_size, centre_grid, strict=True)
    )
    return (rows[:, None] * centre_grid[1] + columns).flatten().expand(like.shape[0], -1)


def local_kmeans(tokens: Tensor, grid_size: tuple[int, int], centre_grid: CentreGrid) -> tuple[Tensor, Tensor]:
    """Soft k-means in which each token sees the centres around its place.

    Args:
        tokens: (B, N, C), row-major over the grid.
        grid_size: (h, w), h * w == N.
        centre_grid: rows and columns of centres.

    Returns:
        Centres (B, T, C), row-major over their grid, and weights (B, N, T) of each token's centres, which sum to 1.
    """
    # Squares of half-precision features overflow, and their differences are lost.
    given, tokens = tokens.dtype, tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    centres = _pooled(tokens, grid_size, centre_grid)
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
    return centres.to(given), weights.to(given)


def _centre_distance(length: int, cells: int | Tensor, like: Tensor) -> Tensor:
    """How many centres each place along one side of the grid is from each: (length, cells) int64."""
    index = torch.arange(cells, device=like.device)  # type: ignore[arg-type]  # a tensor where traced
    place = torch.arange(length, device=like.device)
    return ((place * cells // length)[:, None] - index).abs()
