# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Merging tokens into clusters and regenerating them: the Clusterer, the two ways to merge, and the Regenerator.

From ClustViT (arXiv 2510.01948, section 3). `merge_exactly` computes what the reference implementation computes;
`merge_to_capacity` is this project's form with static shapes: it decides how many tokens are kept before it looks at
which, so that nothing about the image changes a shape and nothing is read back from the device.

Groups of neighbouring merged tokens that a decode head's attention blocks handle as one.

Regenerated tokens of one cluster say nearly the same, yet Segmenter's head attends among all of them. Here up to
`GROUP_SIZE` neighbours of one cluster go through its blocks as their mean, and each gets back what the blocks did to
the mean, on top of itself: what makes it differ from its neighbours is not lost. As in ToMe (arXiv 2210.09461), an
attention score grows by the log of what a row stands for, so that a group of equal tokens weighs what they would.

Like everything in capacity mode, how many groups there are follows from the capacity alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Clusterer(nn.Module):
    """Cluster logits per patch token: (B, N, C) -> (B, N, k+1); column 0 means "keep".

    Runs on the raw residual stream, without norm.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_clusters: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, num_clusters + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        # Its own precision: what is merged where is decided in float32, whatever the rest of the network runs in.
        return self.fc2(F.relu(self.fc1(tokens.to(self.fc1.weight.dtype))))


class Regenerator(nn.Module):
    """Rebuilds a merged token from itself at the injection point and its cluster's processed representative.

    The paper's MLP on the concatenation [token; representative]. Its first layer is linear, W [t; r] = W_t t + W_r r,
    so the representative half is computed once per cluster instead of once per token.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * embed_dim, embed_dim)
        self.fc2 = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, representatives: Tensor, cluster_ids: Tensor) -> Tensor:
        """Regenerate tokens.

        Args:
            tokens: (B, M, C), as they were at the injection point.
            representatives: (B, k, C), after the last block.
            cluster_ids: (B, M) int64 in 1..k. An id of 0 gives a meaningless row, for the caller to overwrite.

        Returns:
            (B, M, C)
        """
        weight_token, weight_representative = self.fc1.weight.chunk(2, dim=1)
        hidden = F.linear(tokens, weight_token, self.fc1.bias)
        per_cluster = F.linear(representatives, weight_representative)
        hidden = hidden + gather_rows(per_cluster, (cluster_ids - 1).clamp(min=0))
        return self.fc2(F.gelu(hidden))


class MergeScores(NamedTuple):
    """How strongly each token asks to be merged, and where to.

    Attributes:
        margin: (B, N) float, L_c - L_0: the logit of the merge score m = sigmoid(margin). Comparing margins instead
            of scores keeps tokens apart whose scores round to 1.
        cluster: (B, N) int64 in 1..k, the best cluster c.
    """

    margin: Tensor
    cluster: Tensor


def merge_scores(cluster_logits: Tensor) -> MergeScores:
    """Score tokens by their cluster logits: (B, N, k+1) -> margins and clusters."""
    best, cluster = cluster_logits[..., 1:].max(dim=-1)
    return MergeScores(best - cluster_logits[..., 0], cluster + 1)


def threshold_margin(merge_threshold: float | Tensor) -> float | Tensor:
    """The margin above which a token is merged: logit of the threshold, -inf at 0 and +inf at 1.

    A () tensor gives a tensor, where a threshold is traced or read from the device.
    """
    if isinstance(merge_threshold, Tensor):
        return torch.log(merge_threshold / (1.0 - merge_threshold))
    if merge_threshold <= 0.0:
        return -math.inf
    return math.inf if merge_threshold >= 1.0 else math.log(merge_threshold / (1.0 - merge_threshold))


def count_kept(scores: MergeScores, merge_threshold: float | Tensor) -> Tensor:
    """Tokens per image that the threshold leaves unmerged: (B,) int64, on the scores' device."""
    return (~(scores.margin > threshold_margin(merge_threshold))).sum(dim=1)


class Merge(NamedTuple):
    """A decided merge: the compact sequence and what is needed to undo it.

    Attributes:
        compact: (B, 1+T+k, C): class token, kept tokens in their original order, representatives of clusters 1..k.
        key_mask: (B, 1+T+k) bool, False = padding that no query may attend to; None when there is no padding.
        cluster_ids: (B, N) int64, 0 = kept.
        kept_index: (B, T) int64 positions of the kept tokens; where padded, any position.
        merged_index: (B, N-T) int64 positions of the merged tokens; None in exact mode, where their number varies.
    """

    compact: Tensor
    key_mask: Tensor | None
    cluster_ids: Tensor
    kept_index: Tensor
    merged_index: Tensor | None


def merge_to_capacity(x: Tensor, scores: MergeScores, capacity: int | Tensor, num_clusters: int) -> Merge:
    """Keep exactly the `capacity` tokens with the lowest merge scores, merge the rest.

    Shapes depend on the capacity alone; there is no padding and no mask. A capacity of all tokens, which only a traced
    one may be, leaves out the representatives: what follows is then plain ViT.

    Args:
        x: (B, 1+N, C), class token first.
        scores: merge scores of the N patch tokens.
        capacity: T, 0 <= T <= N; a () int64 tensor where traced as a run-time input.
        num_clusters: k.
    """
    # Stable, so that equal scores are kept in the same order on every device.
    order = scores.margin.argsort(dim=1, stable=True)
    kept_index = order[:, :capacity].sort(dim=1).values
    merged_index = order[:, capacity:]
    cluster_ids = scores.cluster.scatter(1, kept_index, 0)
    tokens = x[:, 1:]
    compact = torch.cat(
        [x[:, :1], gather_rows(tokens, kept_index), representatives(tokens, cluster_ids, num_clusters)], dim=1
    )
    if isinstance(capacity, Tensor):
        compact = compact[:, : 1 + capacity + torch.where(capacity < tokens.shape[1], num_clusters, 0)]
    return Merge(compact, None, cluster_ids, kept_index, merged_index)


def threshold_ids(scores: MergeScores, merge_threshold: float | Tensor, is_token: Tensor | None = None) -> Tensor:
    """Cluster ids as the threshold has them: (B, N) int64, 0 = kept; padding (`is_token` False) is kept."""
    merged = scores.margin > threshold_margin(merge_threshold)
    return torch.where(merged if is_token is None else merged & is_token, scores.cluster, 0)


def merge_exactly(
    x: Tensor, scores: MergeScores, merge_threshold: float, num_clusters: int, is_token: Tensor | None = None
) -> Merge | None:
    """Merge as the reference implementation does: every token above the threshold, padded to the fullest image.

    Reads the number of kept tokens back from the device.

    Args:
        x: (B, 1+N, C), class token first.
        scores: merge scores of the N tokens.
        merge_threshold: tokens whose merge score is above are merged.
        num_clusters: k.
        is_token: (B, N) bool, False = padding of an earlier merge, behind an image's tokens; None when there is none.

    Returns:
        None when all tokens of the whole batch have one and the same id: then nothing is merged.
    """
    cluster_ids = threshold_ids(scores, merge_threshold, is_token)
    ids = cluster_ids.flatten() if is_token is None else cluster_ids[is_token]
    if bool((ids == ids[:1]).all()):
        return None
    leaves = cluster_ids > 0 if is_token is None else (cluster_ids > 0) | ~is_token
    counts = (~leaves).sum(dim=1)
    capacity = int(counts.max())
    kept_index = leaves.byte().argsort(dim=1, stable=True)[:, :capacity]
    valid = torch.arange(capacity, device=x.device) < counts[:, None]
    tokens = x[:, 1:]
    kept = torch.where(valid[..., None], gather_rows(tokens, kept_index), 0.0)
    compact = torch.cat([x[:, :1], kept, representatives(tokens, cluster_ids, num_clusters)], dim=1)
    key_mask = F.pad(F.pad(valid, (1, 0), value=True), (0, num_clusters), value=True)
    return Merge(compact, key_mask, cluster_ids, kept_index, None)


def representatives(tokens: Tensor, cluster_ids: Tensor, num_clusters: int) -> Tensor:
    """Mean token of each cluster, zero for an empty one: (B, N, C), (B, N) -> (B, k, C)."""
    ids = torch.arange(1, num_clusters + 1, device=tokens.device)
    member = (cluster_ids[:, None, :] == ids[None, :, None]).to(tokens.dtype)  # B k N
    # Counted in float32, and weighted before the sum: in half precision hundreds of tokens neither count nor add up.
    count = member.sum(dim=2, keepdim=True, dtype=torch.float32).clamp(min=1.0)
    return (member / count).to(tokens.dtype) @ tokens


def slots_of(merge: Merge) -> Tensor:
    """The row of the compact sequence, class token not counted, that each token went to: (B, N) int64."""
    T = merge.kept_index.shape[1]
    is_kept = merge.cluster_ids == 0
    return torch.where(is_kept, is_kept.long().cumsum(dim=1) - 1, T + merge.cluster_ids - 1)


def unmerge(processed: Tensor, x: Tensor, merge: Merge, num_clusters: int, regenerator: Regenerator) -> Tensor:
    """Undo a merge after the last block.

    Args:
        processed: (B, 1+T+k, C), the compact sequence after the blocks.
        x: (B, 1+N, C), the full sequence at the injection point.

    Returns:
        (B, 1+N, C): class token and kept tokens as processed, merged tokens regenerated.
    """
    T = merge.kept_index.shape[1]
    cls, kept, reps = processed[:, :1], processed[:, 1 : 1 + T], processed[:, 1 + T :]
    tokens = x[:, 1:]
    if merge.merged_index is not None:
        merged_ids = merge.cluster_ids.gather(1, merge.merged_index)
        regenerated = regenerator(gather_rows(tokens, merge.merged_index), reps, merged_ids)
        full = torch.cat([kept, regenerated], dim=1)
        index = torch.cat([merge.kept_index, merge.merged_index], dim=1)
        tokens = put_rows(full, index)
    else:
        regenerated = regenerator(tokens, reps, merge.cluster_ids)
        is_kept = merge.cluster_ids == 0
        slot = (is_kept.cumsum(dim=1) - 1).clamp(min=0, max=max(T - 1, 0))
        tokens = torch.where(is_kept[..., None], gather_rows(kept, slot), regenerated) if T else regenerated
    return torch.cat([cls, tokens], dim=1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: (B, N, C), (B, M) -> (B, M, C)."""
    if x.shape[0] == 1:  # one index for a row, not one for each of its values
        return x.index_select(1, index[0])
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def put_rows(x: Tensor, index: Tensor) -> Tensor:
    """The way back, to all rows: (B, N, C), (B, N) a permutation of each image's rows -> (B, N, C)."""
    if x.shape[0] == 1:
        return torch.empty_like(x).index_copy(1, index[0], x)
    return torch.empty_like(x).scatter(1, index[..., None].expand_as(x), x)


GROUP_SIZE = 16


class TokenGroups(NamedTuple):
    """Who goes through a head together.

    Attributes:
        order: (B, N) int64, the grid's tokens: kept ones first, then the merged ones, members of a group side by side.
        slots: (B, N) int64, the row that each token of the grid is in: T kept tokens, then G groups.
        members: (G, `GROUP_SIZE`) int64, positions in `order` after the kept ones; a last group that is not full
            repeats its last member.
        counted: (G, `GROUP_SIZE`) bool, false for what is repeated.
        num_kept: T; a () int64 tensor where traced.
    """

    order: Tensor
    slots: Tensor
    members: Tensor
    counted: Tensor
    num_kept: int | Tensor

    def pool(self, x: Tensor) -> Tensor:
        """Kept tokens as they are, groups as their means: (B, N, C) -> (B, T+G, C)."""
        rows = gather_rows(x, self.order)
        kept, merged = rows[:, : self.num_kept], rows[:, self.num_kept :]
        shares = self.counted / self.counted.sum(dim=1, keepdim=True)
        means = (merged[:, self.members] * shares[:, :, None].to(x.dtype)).sum(dim=2)
        return torch.cat([kept, means], dim=1)

    def spread(self, values: Tensor) -> Tensor:
        """To every token what its row has: (B, T+G, C) -> (B, N, C)."""
        return gather_rows(values, self.slots)

    def log_sizes(self, x: Tensor) -> Tensor:
        """What attention scores of each row grow by: (B, T+G), of the type of x (B, N, C)."""
        sizes = self.counted.sum(dim=1).to(torch.float32).log().to(x.dtype).expand(x.shape[0], -1)
        return torch.cat([torch.zeros_like(x[:, : self.num_kept, 0]), sizes], dim=1)


def group_merged(cluster_ids: Tensor, num_kept: int | Tensor, grid_size: tuple[int, int]) -> TokenGroups:
    """Group the merged tokens of each image: by cluster, along a path through neighbours.

    The path runs down and up through pairs of grid rows, so that its pieces are blocks of two rows.

    Args:
        cluster_ids: (B, N) int64, 0 = kept.
        num_kept: T, tokens of each image whose id is 0; a () int64 tensor where traced.
        grid_size: (h, w), h * w == N.
    """
    num_tokens = cluster_ids.shape[1]
    width = grid_size[1]
    token = torch.arange(num_tokens, device=cluster_ids.device)
    row, column = token // width, token % width
    path = (row // 2 * width + column) * 2 + row % 2
    order = (cluster_ids * (2 * num_tokens + 2 * width) + path).argsort(dim=1, stable=True)
    rows = torch.where(token < num_kept, token, num_kept + (token - num_kept) // GROUP_SIZE)
    slots = torch.zeros_like(order).scatter(1, order, rows.expand_as(order))
    num_merged = num_tokens - num_kept
    num_groups = (num_merged + GROUP_SIZE - 1) // GROUP_SIZE
    members = token[:num_groups, None] * GROUP_SIZE + torch.arange(GROUP_SIZE, device=token.device)
    counted = members < num_merged
    return TokenGroups(order, slots, torch.where(counted, members, num_merged - 1), counted, num_kept)
