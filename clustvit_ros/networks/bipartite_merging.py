# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""ToMe: merging similar tokens block by block, without any trained part, and giving each back its group's result.

Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461: between attention and MLP of each block, every
second token (set A) is matched with the most similar of the others (set B) by its keys, the most similar pairs are
merged into their size-weighted mean, and attention adds the log of a token's size to its column (proportional
attention). For dense prediction every patch gets the result of the token it ended in.

What differs, and why: merging begins at the injection point and reaches a given number of tokens in equal steps, so
that one ladder of capacities serves all networks; where half of the tokens per block is not enough, a block matches
again. The class token is never merged, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.clustering import gather_rows
from clustvit_ros.networks.segmenter import Features
from clustvit_ros.networks.vit import Attention, Block, VisionTransformer

_NUM_IDS = 254


class Similarity(NamedTuple):
    """The network's state where merging begins, before it is decided how much to merge.

    Attributes:
        x: (B, 1+N, C), after the attention of the first block that merges, before its MLP; for `LocalKMeansViT`, which
            merges between blocks, the input of that block.
        metric: (B, N, D), what tokens are compared by.
        score: (B, N), merge score of each token by its similarity to the one most like it, 0..1.
        grid_size: (h, w) patches.
        levels: outputs of blocks so far that the head asked for.
        details: the stem's finer maps, where the head asked for them.
    """

    x: Tensor
    metric: Tensor
    score: Tensor
    grid_size: tuple[int, int]
    levels: tuple[Tensor, ...] = ()
    details: tuple[Tensor, ...] = ()


class Groups(NamedTuple):
    """A sequence part-way through merging.

    Attributes:
        x: (B, 1+T, C), class token first.
        metric: (B, T, D).
        size: (B, T, 1), tokens in each group.
        slots: (B, N) int64, the row (0..T-1) that each token of the grid is in.
        leads: (B, T) int64, a token of the grid (0..N-1) that is in the row's group.
    """

    x: Tensor
    metric: Tensor
    size: Tensor
    slots: Tensor
    leads: Tensor


class TrainingFreeViT(VisionTransformer):
    """ViT that merges tokens from `injection_point` on by what they look like, without parameters of its own.

    Args:
        injection_point: blocks that run unmerged, 0 <= injection_point < depth.
        decode_compact: leave the sequence compact for the head.
        merge_similarity: cosine similarity that has a merge score of 0.5.
        vit: arguments of `VisionTransformer`, whose parameters are all that this has.
    """

    merges = True

    def __init__(
        self, injection_point: int, decode_compact: bool = False, merge_similarity: float = 0.88, **vit
    ) -> None:
        super().__init__(**vit)
        check_injection_point(injection_point, len(self.blocks))
        self.injection_point = injection_point
        self.decode_compact = decode_compact
        self.merge_similarity = merge_similarity

    def unmerged(self, images: Tensor) -> tuple[Tensor, tuple[int, int], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The blocks before the first merge.

        Returns:
            Tokens (B, 1+N, C), grid size, levels that a head asked for, and the stem's finer maps.
        """
        x, grid_size, details = self.embed_with_details(images)
        levels = []
        for index, block in enumerate(self.blocks[: self.injection_point]):
            x = block(x)
            if self.hands_out(index):
                levels.append(x[:, 1:])
        return x, grid_size, tuple(levels), details


class BipartiteMergingViT(TrainingFreeViT):
    """ViT that merges tokens by bipartite soft matching in every block from `injection_point` on."""

    def encode(self, images: Tensor) -> Similarity:
        """Everything before the first merge: (B, 3, H, W) -> state, whose cost no setting changes."""
        x, grid_size, levels, details = self.unmerged(images)
        block = cast(Block, self.blocks[self.injection_point])
        branch, metric = _attention_and_metric(block.attn, block.norm1(x), None)
        score = similarity_score(most_similar(metric), self.merge_similarity)
        return Similarity(x + branch, metric, score, grid_size, levels, details)

    def count_kept(self, state: Similarity, merge_threshold: float | Tensor) -> Tensor:
        """Tokens to which no other one is more similar than the threshold allows, by their keys."""
        return count_dissimilar(state.score, merge_threshold)

    def finish(
        self, state: Similarity, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None
    ) -> Features:
        """Merge and run the remaining blocks; exact mode (no capacity) keeps what the threshold keeps of any image.

        Each row of the sequence is one group of tokens, and one token of it counts as kept.
        """
        B, N = state.metric.shape[:2]
        if token_capacity is None:
            token_capacity = max(int(self.count_kept(state, merge_threshold).max()), 1)
        traced = isinstance(token_capacity, Tensor)
        capacity = token_capacity if traced else min(max(token_capacity, 1), N)
        everything = torch.arange(N, device=state.x.device).expand(B, -1)
        groups = Groups(state.x, state.metric, torch.ones_like(state.metric[..., :1]), everything, everything)
        levels = list(state.levels)
        steps = len(self.blocks) - self.injection_point
        rounds = matchings(N, 1 if traced else int(capacity), steps)
        merges = traced or capacity < N
        for step in range(steps):
            index = self.injection_point + step
            block = cast(Block, self.blocks[index])
            if step > 0:
                log_size = _log_size(groups.size).to(groups.x.dtype) if merges else None
                branch, metric = _attention_and_metric(block.attn, block.norm1(groups.x), log_size)
                groups = groups._replace(x=groups.x + branch, metric=metric)
            target = N - (N - capacity) * (step + 1) // steps
            for _ in range(rounds[step]):
                groups = merge_most_similar(groups, target)
            groups = groups._replace(x=groups.x + block.mlp(block.norm2(groups.x)))
            if self.hands_out(index):
                levels.append(gather_rows(groups.x[:, 1:], groups.slots))
        compact = self.decode_compact and merges
        x = groups.x
        if merges and not compact:
            x = torch.cat([x[:, :1], gather_rows(x[:, 1:], groups.slots)], dim=1)
        return self.features(
            x, state.grid_size, levels, cluster_ids=group_ids(groups.slots, groups.leads),
            slots=groups.slots if compact else None, pyramid=state.details,
        )  # fmt: skip


def check_injection_point(injection_point: int, depth: int) -> None:
    """Refuse a point that no block follows.

    Raises:
        ConfigError: it is not in 0 to depth - 1.
    """
    if not 0 <= injection_point < depth:
        raise ConfigError(f"injection_point: got {injection_point} with {depth} blocks, expected 0 to {depth - 1}")


def most_similar(metric: Tensor) -> Tensor:
    """Cosine similarity of each token to the one most like it, negative ones as 0: (B, N, D) -> (B, N)."""
    metric = F.normalize(metric, dim=-1)
    similarity = metric @ metric.transpose(1, 2)
    index = torch.arange(metric.shape[1], device=metric.device)
    return similarity.masked_fill(index[:, None] == index, 0.0).amax(dim=2).clamp(0.0, 1.0)


def similarity_score(similarity: Tensor, merge_similarity: float) -> Tensor:
    """Merge scores of cosine similarities: 0 where there is none, 0.5 at `merge_similarity`, 1 for what is alike."""
    above = (similarity - merge_similarity) / (1.0 - merge_similarity)
    return 0.5 + 0.5 * torch.where(above >= 0.0, above, similarity / merge_similarity - 1.0).clamp(-1.0, 1.0)


def count_dissimilar(score: Tensor, merge_threshold: float | Tensor) -> Tensor:
    """Tokens per image whose score is not above the threshold, none at 0: (B, N) -> (B,) int64."""
    return ((score <= merge_threshold) & (score.new_zeros(()) < merge_threshold)).sum(dim=1)


def merge_most_similar(
    groups: Groups, target: int | Tensor | Callable[[Tensor], int], first: int = 0
) -> Groups:
    """One bipartite soft matching: merge down to `target` rows, but at most every second one away.

    Args:
        groups: the sequence.
        target: rows that are to be left; or how many pairs to merge, of their similarities (B, rows of set A).
        first: row of the first token of set A, 0 or 1.
    """
    x, metric, size, slots, leads = groups
    cls, x = x[:, :1], x[:, 1:]
    T = x.shape[1]
    if T < 2:
        return groups
    second = 1 - first
    a, b = F.normalize(metric[:, first::2], dim=-1), F.normalize(metric[:, second::2], dim=-1)
    best, partner = (a @ b.transpose(1, 2)).max(dim=2)
    count = target(best) if callable(target) else at_most(T - target, T // 2)
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, stays = order[:, :count], order[:, count:].sort(dim=1).values

    # Features, metric and size are averaged alike, so they are merged as one. In half precision the sums of hundreds of
    # tokens overflow, and so many do not even count.
    size = size.to(torch.promote_types(x.dtype, torch.float32))
    weighted = torch.cat([x * size, metric * size, size], dim=2)
    rows_a, rows_b = weighted[:, first::2], weighted[:, second::2]
    into = partner.gather(1, merged)[..., None].expand(-1, -1, weighted.shape[2])
    rows_b = rows_b.scatter_add(1, into, gather_rows(rows_a, merged))
    leads = torch.cat([leads[:, first::2].gather(1, stays), leads[:, second::2]], dim=1)
    # In the order of the grid, so that the next matching pairs neighbours, and merging nothing changes nothing.
    leads, place = leads.sort(dim=1)
    rows = gather_rows(torch.cat([gather_rows(rows_a, stays), rows_b], dim=1), place)
    size = rows[..., -1:]
    means = rows[..., :-1] / size

    num_staying = stays.shape[1]
    ranks = torch.arange(num_staying, device=x.device).expand_as(stays)
    row_of_a = (num_staying + partner).scatter(1, stays, ranks)
    half_slots = slots // 2
    slots = torch.where(
        slots % 2 == first, row_of_a.gather(1, half_slots.clamp(max=row_of_a.shape[1] - 1)), num_staying + half_slots
    )
    rows_now = torch.arange(place.shape[1], device=x.device).expand_as(place)
    row_of_place = torch.zeros_like(place).scatter(1, place, rows_now)
    slots = row_of_place.gather(1, slots)
    C = x.shape[2]
    x = torch.cat([cls, means[..., :C].to(cls.dtype)], dim=1)
    return Groups(x, means[..., C:].to(metric.dtype), size, slots, leads)


def at_most(count: int | Tensor, limit: int | Tensor) -> int | Tensor:
    """The smaller of two counts, either of which may be traced."""
    if isinstance(count, Tensor) or isinstance(limit, Tensor):
        return torch.minimum(torch.as_tensor(count), torch.as_tensor(limit))
    return min(count, limit)


def group_ids(slots: Tensor, leads: Tensor) -> Tensor:
    """Cluster ids of groups: 0 for one token of each, a number of that one's (1..254, repeating) for the rest.

    Args:
        slots: (B, N) int64, each token's group.
        leads: (B, T) int64, one token of each group.
    """
    return (1 + leads.gather(1, slots) % _NUM_IDS).scatter(1, leads, 0)


def _attention_and_metric(attention: Attention, x: Tensor, log_size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention's branch, and the mean over heads of the patch tokens' keys: (B, 1+T, C), (B, T, D)."""
    q, k, v = attention.heads(x)
    return attention.attend(q, k, v, log_size), k.mean(dim=1)[:, 1:]


def _log_size(size: Tensor) -> Tensor:
    """The bias of proportional attention, 0 for the class token: (B, T, 1) -> (B, 1, 1, 1+T)."""
    return F.pad(size.squeeze(2).log(), (1, 0))[:, None, None, :]


def matchings(num_tokens: int, capacity: int, steps: int) -> list[int]:
    """Matchings that each block needs, as each at most halves the sequence."""
    rounds, rows = [], num_tokens
    for step in range(steps):
        target = num_tokens - (num_tokens - capacity) * (step + 1) // steps
        rounds.append(0)
        while rows > target:
            rows = max(target, rows - rows // 2)
            rounds[-1] += 1
    return rounds
