# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""ALGM: tokens of small windows that look alike are merged early, and any that look alike once more later.

Norouzi, Orlova, de Geus, Dubbelman, "ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic
Segmentation with Plain Vision Transformers", arXiv 2406.09936: between attention and MLP of the first block, 2x2
windows whose tokens have a mean cosine similarity of at least a threshold become their mean; in a later block every
second row is matched with the most similar of the others, and pairs are merged that are more similar than the image's
own mean by some part of its standard deviation. The decoder runs on what is left, and each token takes its group's
result (`decode: compact`).

Exact mode follows the authors' code (tue-mps/algm-segmenter), incl. that all images of a batch merge as often as the
one that merges least. With a capacity, how often windows and pairs are merged follows from it alone, so that all shapes
are static; a token left over at the edge of an odd grid is in no window.

Windows first and ClustViT's clusters afterwards go together as well: the blocks before the Clusterer, which ClustViT
runs on all tokens, then run on fewer.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.bipartite_merging import (
    Groups,
    TrainingFreeViT,
    at_most,
    group_ids,
    matchings,
    merge_most_similar,
    similarity_score,
)
from clustvit_ros.networks.clustering import (
    Clusterer,
    Merge,
    MergeScores,
    Regenerator,
    gather_rows,
    merge_exactly,
    merge_scores,
    merge_to_capacity,
    unmerge,
)
from clustvit_ros.networks.segmenter import Features
from clustvit_ros.networks.vit import Block

WINDOW_TOKENS = 4
# Of the tokens that a capacity has merged away, so many go with windows: cheaper, as they go first.
_LOCAL_SHARE = (2, 3)


class Windows(NamedTuple):
    """The network's state where windows are merged, before it is decided how many.

    Attributes:
        x: (B, 1+N, C), after the attention of the first block that merges, before its MLP.
        score: (B, W), merge score of each 2x2 window, row by row, 0..1.
        grid_size: (h, w) patches.
        levels: outputs of blocks so far that the head asked for.
        details: the stem's finer maps, where the head asked for them.
    """

    x: Tensor
    score: Tensor
    grid_size: tuple[int, int]
    levels: tuple[Tensor, ...] = ()
    details: tuple[Tensor, ...] = ()


class LocalGlobalMergingViT(TrainingFreeViT):
    """ViT that merges windows in one block and pairs in a later one.

    Args:
        injection_point: blocks before that which merges windows.
        global_point: blocks before that which merges pairs.
        options: as in `TrainingFreeViT`.
    """

    def __init__(self, injection_point: int, global_point: int, **options) -> None:
        super().__init__(injection_point, **options)
        if not injection_point < global_point < len(self.blocks):
            raise ConfigError(
                f"injection_points: got {[injection_point, global_point]} with {len(self.blocks)} blocks, expected "
                f"ascending block counts below {len(self.blocks)}"
            )
        self.global_point = global_point

    def encode(self, images: Tensor) -> Windows:
        """Everything before windows are merged: (B, 3, H, W) -> state, whose cost no setting changes."""
        x, grid_size, levels, details = self.unmerged(images)
        block = cast(Block, self.blocks[self.injection_point])
        x = x + block.attn(block.norm1(x))
        score = similarity_score(window_similarity(x[:, 1:], grid_size), self.merge_similarity)
        return Windows(x, score, grid_size, levels, details)

    def count_kept(self, state: Windows, merge_threshold: float | Tensor) -> Tensor:
        """Tokens that are left when windows above the threshold are merged; none at 0.

        How many pairs are merged later follows from the capacity, which is decided by then.
        """
        return count_unshared(state.score, state.x.shape[1] - 1, merge_threshold)

    def finish(
        self, state: Windows, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None
    ) -> Features:
        """Merge and run the remaining blocks. Each row is one group of tokens, and one token of it counts as kept."""
        N, W = state.x.shape[1] - 1, state.score.shape[1]
        capacity, windows = self._plan(state, merge_threshold, token_capacity)
        groups = merge_windows(state.x, state.score, windows, state.grid_size)
        levels = list(state.levels)
        for index in range(self.injection_point, len(self.blocks)):
            block = cast(Block, self.blocks[index])
            if index > self.injection_point:
                groups = groups._replace(x=groups.x + block.attn(block.norm1(groups.x)))
            if index == self.global_point:
                groups = self._match(groups, capacity, N, W)
            groups = groups._replace(x=groups.x + block.mlp(block.norm2(groups.x)))
            if self.hands_out(index):
                levels.append(gather_rows(groups.x[:, 1:], groups.slots))
        merges = isinstance(capacity, Tensor) or capacity is None or capacity < N
        compact, x = self.decode_compact and merges, groups.x
        if merges and not compact:
            x = torch.cat([x[:, :1], gather_rows(x[:, 1:], groups.slots)], dim=1)
        return self.features(
            x, state.grid_size, levels, cluster_ids=group_ids(groups.slots, groups.leads),
            slots=groups.slots if compact else None, pyramid=state.details,
        )  # fmt: skip

    def _plan(
        self, state: Windows, merge_threshold: float, capacity: int | Tensor | None
    ) -> tuple[int | Tensor | None, int | Tensor]:
        """The capacity, within what there is, and how many windows are merged."""
        N, W = state.x.shape[1] - 1, state.score.shape[1]
        if capacity is None and merge_threshold < 1.0:
            return None, int((state.score > merge_threshold).sum(dim=1).min())
        capacity = N if capacity is None else capacity  # at 1, pairs stay as well, however similar they are
        capacity = capacity if isinstance(capacity, Tensor) else min(max(capacity, 1), N)
        return capacity, _windows_of(capacity, N, W)

    def _match(self, groups: Groups, capacity: int | Tensor | None, num_tokens: int, num_windows: int) -> Groups:
        """Merge similar pairs: down to a capacity, or those that stand out."""
        groups = groups._replace(metric=groups.x[:, 1:])
        if capacity is None:
            # The class token is the first row of set A in the authors' code, which is why tokens begin in set B.
            return merge_most_similar(groups, lambda best: _standing_out(best, self.global_point + 1), first=1)
        least = 1 if isinstance(capacity, Tensor) else capacity
        rows = num_tokens - (WINDOW_TOKENS - 1) * int(_windows_of(least, num_tokens, num_windows))
        return match_down(groups, capacity, rows)


def _windows_of(capacity: int | Tensor, num_tokens: int, num_windows: int) -> int | Tensor:
    """How many of the windows a capacity merges."""
    share, whole = _LOCAL_SHARE
    return at_most((num_tokens - capacity) * share // (whole * (WINDOW_TOKENS - 1)), num_windows)


class WindowsThenClustersViT(LocalGlobalMergingViT):
    """ViT that merges windows in one block and clusters, as `ClustViT` does, before a later one.

    Args:
        injection_point: blocks before that which merges windows.
        cluster_point: blocks before clusters are merged.
        num_clusters, cluster_mlp_dim: as in `ClustViT`, whose weights these are.
        options: as in `TrainingFreeViT`.
    """

    def __init__(
        self, injection_point: int, cluster_point: int, num_clusters: int, cluster_mlp_dim: int, **options
    ) -> None:
        super().__init__(injection_point, cluster_point, **options)
        self.num_clusters = num_clusters
        self.clusterer = Clusterer(self.embed_dim, cluster_mlp_dim, num_clusters)
        self.regenerator = Regenerator(self.embed_dim)

    def finish(
        self, state: Windows, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None
    ) -> Features:
        """Merge windows, then clusters of what is left, down to the capacity; regenerate, and undo the windows."""
        capacity, windows = self._plan(state, merge_threshold, token_capacity)
        groups = merge_windows(state.x, state.score, windows, state.grid_size)
        levels = list(state.levels)
        block = cast(Block, self.blocks[self.injection_point])
        x = groups.x + block.mlp(block.norm2(groups.x))
        merge, before, logits = None, x, None
        for index in range(self.injection_point, len(self.blocks)):
            if index == self.global_point:
                before, logits = x, self.clusterer(x[:, 1:])
                merge = self._merge(x, merge_scores(logits), merge_threshold, capacity, state.x.shape[1] - 1)
                x = x if merge is None else merge.compact
            if index > self.injection_point:
                x = self.blocks[index](x, None if merge is None else merge.key_mask)
            if self.hands_out(index):
                levels.append(gather_rows(self._undone(x, before, merge)[:, 1:], groups.slots))
        x = self._undone(x, before, merge)
        x = torch.cat([x[:, :1], gather_rows(x[:, 1:], groups.slots)], dim=1)
        # Tokens that a window's first one stands for have an id behind the clusters'.
        ids = torch.full_like(groups.slots, self.num_clusters + 1).scatter(1, groups.leads, 0)
        if merge is not None:
            of_row = merge.cluster_ids.gather(1, groups.slots)
            ids = torch.where(of_row > 0, of_row, ids)
        return self.features(
            x, state.grid_size, levels, cluster_logits=logits, cluster_ids=ids, cluster_positions=groups.leads,
            pyramid=state.details,
        )  # fmt: skip

    def _merge(
        self, x: Tensor, scores: MergeScores, merge_threshold: float, capacity: int | Tensor | None, num_tokens: int
    ) -> Merge | None:
        if capacity is None:
            return merge_exactly(x, scores, merge_threshold, self.num_clusters)
        if not isinstance(capacity, Tensor) and capacity >= num_tokens:
            return None
        return merge_to_capacity(x, scores, capacity, self.num_clusters)

    def _undone(self, x: Tensor, before: Tensor, merge: Merge | None) -> Tensor:
        return x if merge is None else unmerge(x, before, merge, self.num_clusters, self.regenerator)


def published_points(depth: int) -> tuple[int, int]:
    """Blocks before windows and before pairs are merged: in the first and fifth of 12 blocks, or seventh of 24."""
    return 0, min(depth // 3, 6)


def window_similarity(tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Mean cosine similarity of the pairs in each 2x2 window: (B, N, C) -> (B, W), row by row; -1..1."""
    height, width = grid_size
    # In float32: what is merged where is decided in it, whatever the rest of the network runs in.
    grid = F.normalize(tokens.float(), dim=2).unflatten(1, grid_size)[:, : height // 2 * 2, : width // 2 * 2]
    total = grid.unflatten(2, (width // 2, 2)).unflatten(1, (height // 2, 2)).sum(dim=(2, 4))
    pairs = total.square().sum(dim=3) - WINDOW_TOKENS  # each vector with itself is 1
    return (pairs / (WINDOW_TOKENS * (WINDOW_TOKENS - 1))).flatten(1)


def match_down(groups: Groups, capacity: int | Tensor, rows: int) -> Groups:
    """Merge similar pairs, as often as it takes, until no more than `capacity` rows are left.

    Args:
        groups: the sequence.
        capacity: rows that may be left.
        rows: how many there are; where the capacity is traced, at a capacity of 1, which takes most matchings.
    """
    groups = groups._replace(metric=groups.x[:, 1:])
    for _ in range(matchings(rows, 1 if isinstance(capacity, Tensor) else capacity, 1)[0]):
        groups = merge_most_similar(groups, at_most(capacity, groups.x.shape[1] - 1), first=1)
    return groups


def count_unshared(score: Tensor, num_tokens: int, merge_threshold: float | Tensor) -> Tensor:
    """Tokens left when each window above the threshold becomes one; none at 0: (B, W) -> (B,) int64."""
    left = num_tokens - (WINDOW_TOKENS - 1) * (score > merge_threshold).sum(dim=1)
    return left * (score.new_zeros(()) < merge_threshold)


def merge_windows(
    x: Tensor, score: Tensor, count: int | Tensor, grid_size: tuple[int, int], merged: Tensor | None = None
) -> Groups:
    """Merge the `count` windows with the highest scores: they come first, then the other tokens as they were.

    Args:
        x: (B, 1+N, C), class token first.
        score: (B, W).
        count: windows to merge, the same for each image.
        grid_size: (h, w), h * w == N.
        merged: (B, W, C), what each window becomes; None is the mean of its tokens.
    """
    B, N = x.shape[0], x.shape[1] - 1
    tokens, width = x[:, 1:], grid_size[1]
    best = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    across = max(width // 2, 1)  # ONNX computes with it even where there is no window
    corner = best // across * (2 * width) + best % across * 2
    member = torch.arange(WINDOW_TOKENS, device=x.device)
    members = corner[:, None] + (member // 2 * width + member % 2)[:, None]  # B 4 count
    position = torch.arange(N, device=x.device).expand(B, -1)
    # Merged ones behind all others, which stay in their order.
    behind = position.scatter_add(1, members.flatten(1), torch.full_like(members, N).flatten(1))
    stays = behind.argsort(dim=1, stable=True)[:, : N - WINDOW_TOKENS * count]
    if merged is None:
        windows = torch.stack([gather_rows(tokens, members[:, index]) for index in range(WINDOW_TOKENS)]).mean(dim=0)
    else:
        windows = gather_rows(merged, best)
    rows = torch.cat([windows, gather_rows(tokens, stays)], dim=1)
    rank, row = torch.arange(W := best.shape[1], device=x.device), torch.arange(rows.shape[1], device=x.device)
    slots = torch.zeros_like(position).scatter(1, members.flatten(1), rank.expand_as(members).flatten(1))
    slots = slots.scatter(1, stays, row[W:].expand_as(stays))
    size = torch.where((row < W)[None, :, None], torch.full_like(rows[..., :1], WINDOW_TOKENS), 1.0)
    return Groups(torch.cat([x[:, :1], rows], dim=1), rows, size, slots, torch.cat([corner, stays], dim=1))


def _standing_out(best: Tensor, layer: int) -> int:
    """Pairs that are more similar than the mean by a part of the standard deviation, of the image with the fewest.

    Args:
        best: (B, A), similarity of each row of set A to the most similar row of set B.
        layer: number of the block, from 1; the later, the nearer the bar is to the mean.
    """
    if best.shape[1] < 2:
        return 0  # one pair stands out from none
    bar = (best.mean(dim=1) + best.std(dim=1) / layer).mean()
    return int((best >= bar).sum(dim=1).min())
