"""ClustViT backbone: a ViT that merges tokens into semantic clusters part-way and regenerates them at the end.

Montello, Güldenring, Nalpantidis, "ClustViT: Clustering-based Token Merging for Semantic Segmentation", arXiv
2510.01948. Exact mode follows the reference implementation (DTU-PAS/clustvit), incl. its batch-wide rule that nothing
is merged when all tokens of a batch share one id; capacity mode keeps a fixed number of tokens, so that all shapes are
static.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clustvit_ros.errors import ConfigError
from clustvit_ros.modeling.backbone import Features
from clustvit_ros.modeling.clustering import (
    Clusterer,
    Regenerator,
    count_kept,
    merge_exactly,
    merge_scores,
    merge_to_capacity,
    threshold_margin,
    unmerge,
)
from clustvit_ros.modeling.vit import VisionTransformer


class Injection(NamedTuple):
    """The network's state at the injection point, before it is decided how much to merge.

    Attributes:
        x: (B, 1+N, C), class token first.
        cluster_logits: (B, N, k+1).
        grid_size: (h, w) patches.
    """

    x: Tensor
    cluster_logits: Tensor
    grid_size: tuple[int, int]


class ClustViT(VisionTransformer):
    """ViT with a Clusterer before block `injection_point` and a Regenerator after the last block.

    Args:
        num_clusters: k, clusters besides "keep".
        injection_point: blocks that run on all tokens, 0 <= injection_point < depth.
        cluster_mlp_dim: hidden width of the Clusterer.
        vit: arguments of `VisionTransformer`.
    """

    merges = True
    exempts = True

    def __init__(self, num_clusters: int, injection_point: int, cluster_mlp_dim: int, **vit) -> None:
        super().__init__(**vit)
        if not 0 <= injection_point < len(self.blocks):
            raise ConfigError(
                f"injection_point: got {injection_point} with {len(self.blocks)} blocks, "
                f"expected 0 to {len(self.blocks) - 1}"
            )
        self.num_clusters = num_clusters
        self.injection_point = injection_point
        self.clusterer = Clusterer(self.embed_dim, cluster_mlp_dim, num_clusters)
        self.regenerator = Regenerator(self.embed_dim)

    def encode(self, images: Tensor) -> Injection:
        """Everything before the injection point: (B, 3, H, W) -> state, whose cost no setting changes."""
        x, grid_size = self.embed(images)
        for block in self.blocks[: self.injection_point]:
            x = block(x)
        return Injection(x, self.clusterer(x[:, 1:]), grid_size)

    def count_kept(self, state: Injection, merge_threshold: float | Tensor) -> Tensor:
        return count_kept(merge_scores(state.cluster_logits), merge_threshold)

    def exempt(self, state: Injection, tokens: Tensor) -> Injection:
        # An infinite logit of "keep" is a merge margin of minus infinity.
        keep = state.cluster_logits[..., :1].masked_fill(tokens[..., None], torch.inf)
        return state._replace(cluster_logits=torch.cat([keep, state.cluster_logits[..., 1:]], dim=-1))

    def finish(
        self, state: Injection, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None
    ) -> Features:
        """Merge, run the remaining blocks, regenerate.

        Args:
            state: of `encode`.
            merge_threshold: in exact mode, tokens whose merge score is above are merged.
            token_capacity: exactly this many tokens are kept, those with the lowest merge scores; all are when there
                are no more than that. None is exact mode, the reference implementation's result.
        """
        x, num_tokens = state.x, state.cluster_logits.shape[1]
        scores = merge_scores(state.cluster_logits)
        if token_capacity is None:
            merge = merge_exactly(x, scores, merge_threshold, self.num_clusters)
            ids = (
                scores.cluster.where(scores.margin > threshold_margin(merge_threshold), 0)
                if merge is None
                else merge.cluster_ids
            )
        elif isinstance(token_capacity, Tensor) or token_capacity < num_tokens:
            merge = merge_to_capacity(x, scores, token_capacity, self.num_clusters)
            ids = merge.cluster_ids
        else:
            merge, ids = None, scores.cluster.new_zeros(scores.cluster.shape)

        compact, key_mask = (x, None) if merge is None else (merge.compact, merge.key_mask)
        for block in self.blocks[self.injection_point :]:
            compact = block(compact, key_mask)
        if merge is not None:
            compact = unmerge(compact, x, merge, self.num_clusters, self.regenerator)
        return Features(self.norm(compact)[:, 1:], state.grid_size, state.cluster_logits, ids)
