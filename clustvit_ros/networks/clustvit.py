# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""ClustViT backbone: a ViT that merges tokens into semantic clusters part-way and regenerates them at the end.

Montello, Güldenring, Nalpantidis, "ClustViT: Clustering-based Token Merging for Semantic Segmentation", arXiv
2510.01948. Exact mode follows the reference implementation (DTU-PAS/clustvit), incl. its batch-wide rule that nothing
is merged when all tokens of a batch share one id; capacity mode keeps a fixed number of tokens, so that all shapes are
static.

Beyond the paper, whose implementation knows one injection point:

* Several points merge progressively. Each has a Clusterer and a Regenerator; the later ones see the tokens that are
  still kept, earlier representatives stay in the sequence, and regeneration undoes the merges last to first.
* The sequence may stay compact for the head: a representative is then regenerated once, from the mean of its cluster's
  tokens at the injection point, instead of every merged token from itself.
* Regenerated tokens may be grouped for the head's attention (`token_groups`), in capacity mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.clustering import (
    Clusterer,
    Merge,
    MergeScores,
    Regenerator,
    count_kept,
    group_merged,
    merge_exactly,
    merge_scores,
    merge_to_capacity,
    slots_of,
    threshold_ids,
    unmerge,
)
from clustvit_ros.networks.segmenter import Features
from clustvit_ros.networks.vit import VisionTransformer


class Injection(NamedTuple):
    """The network's state at the first injection point, before it is decided how much to merge.

    Attributes:
        x: (B, 1+N, C), class token first.
        cluster_logits: (B, N, k+1).
        grid_size: (h, w) patches.
        levels: outputs of blocks so far that the head asked for, (B, N, C) each.
        details: the stem's finer maps, where the head asked for them.
    """

    x: Tensor
    cluster_logits: Tensor
    grid_size: tuple[int, int]
    levels: tuple[Tensor, ...] = ()
    details: tuple[Tensor, ...] = ()


class _Stage(NamedTuple):
    """A merge that was done: the sequence before it, (B, 1+T+R, C) with R representatives of earlier merges."""

    merge: Merge
    x: Tensor
    regenerator: Regenerator


class ClustViT(VisionTransformer):
    """ViT with a Clusterer before each injection point's block and a Regenerator per point after the last block.

    Args:
        num_clusters: k, clusters besides "keep".
        injection_points: blocks that run before each merge, ascending, 0 <= point < depth.
        cluster_mlp_dim: hidden width of the Clusterers.
        decode: "full", "compact" (the sequence stays compact for the head) or "grouped" (the head is told who may go
            through its blocks together).
        vit: arguments of `VisionTransformer`.
    """

    merges = True
    exempts = True

    def __init__(
        self, num_clusters: int, injection_points: Sequence[int], cluster_mlp_dim: int, decode: str = "full", **vit,
    ) -> None:  # fmt: skip
        super().__init__(**vit)
        depth = len(self.blocks)
        for point in injection_points:
            if not 0 <= point < depth:
                raise ConfigError(f"injection_point: got {point} with {depth} blocks, expected 0 to {depth - 1}")
        if not injection_points or list(injection_points) != sorted(set(injection_points)):
            raise ConfigError(f"injection_points: got {list(injection_points)}, expected ascending block counts")
        self.num_clusters = num_clusters
        self.injection_points = tuple(injection_points)
        self.decode = decode
        self.clusterer = Clusterer(self.embed_dim, cluster_mlp_dim, num_clusters)
        self.regenerator = Regenerator(self.embed_dim)
        more = range(len(injection_points) - 1)
        self.later_clusterers = nn.ModuleList(Clusterer(self.embed_dim, cluster_mlp_dim, num_clusters) for _ in more)
        self.later_regenerators = nn.ModuleList(Regenerator(self.embed_dim) for _ in more)

    def encode(self, images: Tensor) -> Injection:
        """Everything before the first merge: (B, 3, H, W) -> state, whose cost no setting changes."""
        x, grid_size, details = self.embed_with_details(images)
        levels = []
        for index, block in enumerate(self.blocks[: self.injection_points[0]]):
            x = block(x)
            if self.hands_out(index):
                levels.append(x[:, 1:])
        return Injection(x, self.clusterer(x[:, 1:]), grid_size, tuple(levels), details)

    def count_kept(self, state: Injection, merge_threshold: float | Tensor) -> Tensor:
        """As the first Clusterer has it: the later ones see what the capacity, decided by then, leaves."""
        return count_kept(merge_scores(state.cluster_logits), merge_threshold)

    def exempt(self, state: Injection, tokens: Tensor) -> Injection:
        return state._replace(cluster_logits=_keeping(state.cluster_logits, tokens))

    def finish(
        self, state: Injection, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None
    ) -> Features:
        """Merge, run the remaining blocks, regenerate.

        Args:
            state: what `encode` gave.
            merge_threshold: in exact mode, tokens whose merge score is above are merged, at every point.
            token_capacity: exactly this many tokens are kept after the last point, those with the lowest merge scores;
                earlier points merge an equal number each. All are kept when there are no more than that. None is
                exact mode, the reference implementation's result.
        """
        x, num_tokens = state.x, state.cluster_logits.shape[1]
        B = x.shape[0]
        several = len(self.injection_points) > 1
        key_mask = None
        stages: list[_Stage] = []
        levels = list(state.levels)
        positions = torch.arange(num_tokens, device=x.device).expand(B, -1)
        ids, slots = torch.zeros_like(positions), positions
        logits, logit_positions = [state.cluster_logits], [positions]
        ends = [*self.injection_points[1:], len(self.blocks)]
        for index, (start, end) in enumerate(zip(self.injection_points, ends, strict=True)):
            T = positions.shape[1]
            is_token = None if key_mask is None else key_mask[:, 1 : 1 + T]
            if index > 0:
                # Exempt at the first point is exempt at all.
                exempt = state.cluster_logits[..., 0].gather(1, positions) == torch.inf
                logits.append(_keeping(self.later_clusterers[index - 1](x[:, 1 : 1 + T]), exempt))
                logit_positions.append(positions)
            scores = merge_scores(logits[-1])
            merge = self._merge(x[:, : 1 + T], scores, merge_threshold, token_capacity, index, num_tokens, is_token)
            found = None
            if merge is not None:
                found = merge.cluster_ids
                later = self.later_regenerators
                regenerator = self.regenerator if index == 0 else cast(Regenerator, later[index - 1])
                rows = merge.compact.shape[1] - 1
                if self.decode == "compact":
                    row_of = slots_of(merge).gather(1, slots.clamp(max=T - 1))
                    slots = torch.where(slots < T, row_of, slots - T + rows)
                earlier = x[:, 1 + T :]
                key_mask = _extended(merge.key_mask, earlier)
                stages.append(_Stage(merge, x, regenerator))
                x = torch.cat([merge.compact, earlier], dim=1) if index > 0 else merge.compact
            elif token_capacity is None:
                # All tokens of the batch have one id; the ids are told though nothing is merged.
                found = threshold_ids(scores, merge_threshold, is_token)
            if found is not None and index == 0:
                ids = found
            elif found is not None:
                named = torch.where(found > 0, found + index * self.num_clusters, 0)
                if is_token is not None:
                    named = torch.where(is_token, named, ids.gather(1, positions))
                ids = ids.scatter(1, positions, named)
            if merge is not None and several:
                positions = positions.gather(1, merge.kept_index)
            for block_index in range(start, end):
                x = self.blocks[block_index](x, key_mask)
                if self.hands_out(block_index):
                    levels.append(_regenerated(x, stages, self.num_clusters)[:, 1:])
        compact = self.decode == "compact" and bool(stages)
        groups = None
        if self.decode == "grouped" and stages and token_capacity is not None:
            groups = group_merged(ids, token_capacity, state.grid_size)
        return self.features(
            _represented(x, stages) if compact else _regenerated(x, stages, self.num_clusters), state.grid_size, levels,
            cluster_logits=torch.cat(logits, dim=1) if several else state.cluster_logits, cluster_ids=ids,
            cluster_positions=torch.cat(logit_positions, dim=1) if several else None, slots=slots if compact else None,
            key_mask=key_mask[:, 1:] if compact and key_mask is not None else None, pyramid=state.details,
            groups=groups,
        )  # fmt: skip

    def _merge(
        self, x: Tensor, scores: MergeScores, merge_threshold: float, token_capacity: int | Tensor | None, index: int,
        num_tokens: int, is_token: Tensor | None,
    ) -> Merge | None:  # fmt: skip
        """The merge at a point; None where nothing is to be merged."""
        if token_capacity is None:
            return merge_exactly(x, scores, merge_threshold, self.num_clusters, is_token)
        traced = isinstance(token_capacity, Tensor)
        if not traced and token_capacity >= num_tokens:
            return None
        points = len(self.injection_points)
        capacity = token_capacity
        if index + 1 < points:
            capacity = num_tokens - (num_tokens - token_capacity) * (index + 1) // points
        if not traced and capacity >= x.shape[1] - 1:
            return None
        return merge_to_capacity(x, scores, capacity, self.num_clusters)


def _keeping(cluster_logits: Tensor, tokens: Tensor) -> Tensor:
    """Cluster logits (B, N, k+1) that keep the (N,) or (B, N) tokens, whatever their clusters say."""
    # An infinite logit of "keep" is a merge margin of minus infinity.
    keep = cluster_logits[..., :1].masked_fill(tokens[..., None], torch.inf)
    return torch.cat([keep, cluster_logits[..., 1:]], dim=-1)


def _extended(key_mask: Tensor | None, earlier: Tensor) -> Tensor | None:
    """A key mask for the compact sequence with earlier representatives behind it, which are never padding."""
    if key_mask is None:
        return None
    return nn.functional.pad(key_mask, (0, earlier.shape[1]), value=True)


def _regenerated(x: Tensor, stages: Sequence[_Stage], num_clusters: int) -> Tensor:
    """Undo all merges, last to first: (B, 1+T+R, C) -> (B, 1+N, C)."""
    for stage in reversed(stages):
        rows, before = stage.merge.compact.shape[1], stage.merge.cluster_ids.shape[1]
        full = unmerge(x[:, :rows], stage.x[:, : 1 + before], stage.merge, num_clusters, stage.regenerator)
        x = torch.cat([full, x[:, rows:]], dim=1) if stage is not stages[0] else full
    return x


def _represented(x: Tensor, stages: Sequence[_Stage]) -> Tensor:
    """Regenerate the representatives themselves: (B, 1+T+R, C), compact before and after."""
    end = stages[-1].merge.kept_index.shape[1] + 1
    parts = [x[:, :end]]
    for stage in reversed(stages):
        means = stage.merge.compact[:, 1 + stage.merge.kept_index.shape[1] :]
        processed = x[:, end : end + means.shape[1]]
        ids = torch.arange(1, 1 + means.shape[1], device=x.device).expand(x.shape[0], -1)
        parts.append(stage.regenerator(means, processed, ids))
        end = end + means.shape[1]
    return torch.cat(parts, dim=1)
