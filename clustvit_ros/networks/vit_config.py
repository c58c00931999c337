# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Hyper-parameters of the ViT family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.algm import LocalGlobalMergingViT, WindowsThenClustersViT, published_points
from clustvit_ros.networks.bipartite_merging import BipartiteMergingViT
from clustvit_ros.networks.clustvit import ClustViT
from clustvit_ros.networks.cts import POLICY_STRIDE, TokenSharingViT
from clustvit_ros.networks.grid_centres import LocalKMeansViT, SemanticTokenViT
from clustvit_ros.networks.heads import NUM_LEVELS, DetailHead, LinearHead, MaskTransformer, UPerHead
from clustvit_ros.networks.segmenter import NetworkConfig, Segmenter, check_transformer
from clustvit_ros.networks.vit import VisionTransformer, detail_dims

MERGINGS = ("none", "clusters", "algm", "algm+clusters", "cts", "tome", "kmeans", "stvit")
"""Ways to merge tokens: not at all, ClustViT's clusters, ALGM's windows and matching, its windows and then clusters,
CTS's policy network, ToMe's matching in every block, local k-means, STViT-R's semantic tokens."""

DECODINGS = ("full", "compact", "grouped")
"""What the head sees of merged tokens."""


@dataclass(frozen=True)
class ViTConfig(NetworkConfig):
    """Everything that fixes the shape of a ViT or ClustViT with its decode head.

    Args:
        backbone: "clustvit" merges tokens, "vit" is the plain baseline.
        stem: "patch" (one linear projection, as published) or "conv" (strided convolutions).
        stem_blocks: residual blocks at each of a convolutional stem's strides from 4 to half a patch, for finer
            structures than tokens can hold.
        embed_dim, depth, num_heads, mlp_ratio: sizes of the encoder.
        merging: one of `MERGINGS`; all but "clusters" and "cts" need no trained part and work for either backbone;
            empty is the backbone's own way.
        merge_similarity: of those that compare tokens: the cosine similarity that has a merge score of 0.5.
        num_clusters: k, clusters besides "keep".
        injection_point: number of blocks before merging.
        share_corner: CTS as ClustViT's authors have it: a shared token stands at its window's first place alone.
        shared_windows: CTS by schedule: windows of an image of `image_size` that share at a threshold of 0.5; 0 leaves
            that to their probability.
        injection_points: for several merges, blocks before each; empty is `injection_point` alone. ALGM has two, and
            takes the published ones, in the first block and after a third of them, where none are given; "tome" and
            "kmeans" take the first.
        cluster_mlp_dim: hidden width of the Clusterer; 0 takes the published ratio, 4 1/32 times embed_dim.
        head: "segmenter" (mask transformer), "upernet", "linear", or "detail", which joins the tokens with the finer
            maps of a convolutional stem.
        head_depth, head_heads: blocks of Segmenter's head and their heads; 0 heads means as the encoder.
        head_channels: width of UPerNet's head, 0 means as the encoder; of the detail head's finest level, 0 means 64.
        head_stride: detail head only: stride of its logits, 4, or 2 for things of three pixels such as poles.
        head_refine: detail head only: residual blocks at each of its strides but the finest.
        head_blocks: the four blocks (from 0) whose outputs UPerNet's head takes; empty means after a third, half, two
            thirds and all of them: 3, 5, 7, 11 of 12.
        neck: UPerNet only: scale its levels to a pyramid first, as mmsegmentation's ViT models do.
        decode: "full" regenerates tokens for the head; "compact" runs the head on kept tokens and representatives and
            gives their class scores to the merged ones; "grouped" regenerates tokens and lets small groups of them go
            through Segmenter's head as one, in capacity mode.
        drop_path: stochastic depth, in training only.
        final_norm: whether the encoder ends with a norm; mmsegmentation's own ViT models have none where not told to.
    """

    backbone: Literal["vit", "clustvit"] = "clustvit"
    stem: Literal["patch", "conv"] = "patch"
    stem_blocks: int = 0
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    merging: Literal["", "none", "clusters", "algm", "algm+clusters", "cts", "tome", "kmeans", "stvit"] = ""
    merge_similarity: float = 0.88
    share_corner: bool = False
    shared_windows: int = 0
    num_clusters: int = 3
    injection_point: int = 3
    injection_points: tuple[int, ...] = ()
    cluster_mlp_dim: int = 0
    head: Literal["segmenter", "upernet", "linear", "detail"] = "segmenter"
    head_depth: int = 2
    head_heads: int = 0
    head_channels: int = 0
    head_stride: Literal[4, 2] = 4
    head_refine: int = 0
    head_blocks: tuple[int, ...] = ()
    neck: bool = False
    decode: Literal["full", "compact", "grouped"] = "full"
    drop_path: float = 0.0
    final_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "num_clusters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"network: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("cluster_mlp_dim", "head_heads", "head_channels", "injection_point", "head_depth"):
            if getattr(self, name) < 0:
                raise ConfigError(f"network: {name} is {getattr(self, name)}, expected 0 or above")
        check_transformer(self)
        if self.stem_blocks < 0 or (self.stem_blocks and (self.stem != "conv" or self.patch_size < 8)):
            raise ConfigError(
                f"network: stem_blocks is {self.stem_blocks} with stem {self.stem!r} and patch_size {self.patch_size}; "
                "it needs stem conv and patches of at least 8 px"
            )
        self._check_merge()
        self._check_head()

    def _check_merge(self) -> None:
        if self.backbone == "vit" and "clusters" in self.merging:
            raise ConfigError(
                f"network: merging is {self.merging!r}, which a plain vit has no weights for; use algm, tome or "
                "kmeans, or train them (config/train/add_merging.yaml)"
            )
        if self.merging == "cts" and self.patch_size * 2 != POLICY_STRIDE:
            raise ConfigError(
                f"network: patch_size is {self.patch_size} with merging 'cts', whose policy network sees windows of "
                f"{POLICY_STRIDE} px, two patches; expected {POLICY_STRIDE // 2}, or another merging"
            )
        windows = (self.image_size[0] // POLICY_STRIDE) * (self.image_size[1] // POLICY_STRIDE)
        if self.shared_windows and (self.merging != "cts" or not 0 < self.shared_windows < windows):
            raise ConfigError(
                f"network: shared_windows is {self.shared_windows} with merging {self.merge_method!r}, expected 'cts' "
                f"and fewer than the {windows} windows of image_size {list(self.image_size)}"
            )
        if self.share_corner and (self.merging != "cts" or self.decode != "full"):
            raise ConfigError(
                f"network: share_corner with merging {self.merge_method!r} and decode {self.decode!r}, expected 'cts' "
                "and 'full'"
            )
        if not 0.0 < self.merge_similarity < 1.0:
            raise ConfigError(f"network: merge_similarity is {self.merge_similarity:g}, expected above 0 and below 1")
        if "algm" in self.merging and len(self.injection_points) not in (0, 2):
            raise ConfigError(
                f"network: injection_points is {list(self.injection_points)} with merging {self.merging!r}, expected "
                "two: blocks before windows are merged, and before the rest is; or none, for the published ones"
            )
        if self.merging == "algm+clusters" and self.decode == "compact":
            raise ConfigError("network: decode is 'compact' with merging 'algm+clusters'; use full")
        if self.merging == "algm+clusters" and not self.injection_points and not self.injection_point:
            raise ConfigError(
                "network: merging is 'algm+clusters' with injection_point 0, expected 1 or more, as windows are merged "
                "in the first block and clusters after it; use clusters or algm"
            )
        points = self.injection_points
        if points and (list(points) != sorted(set(points)) or points[0] < 0):
            raise ConfigError(f"network: injection_points is {list(points)}, expected ascending block counts")

    def _check_head(self) -> None:
        if self.decode == "compact" and self.head == "upernet":
            raise ConfigError("network: decode is 'compact', which UPerNet's convolutions cannot do; use full")
        if self.decode == "grouped" and self.head != "segmenter":
            raise ConfigError(
                "network: decode is 'grouped', which is for head 'segmenter', whose attention it saves, got head "
                f"{self.head!r}; use full"
            )
        if self.decode == "grouped" and self.merge_method not in ("clusters", "none"):
            raise ConfigError(
                f"network: decode is 'grouped', which groups a cluster's tokens, with merging {self.merging!r}; use "
                "compact"
            )
        if self.neck and self.head != "upernet":
            raise ConfigError(f"network: neck is for head 'upernet', got head {self.head!r}")
        if self.head == "detail" and (self.stem != "conv" or self.patch_size < 8):
            raise ConfigError(
                f"network: head is 'detail' with stem {self.stem!r} and patch_size {self.patch_size}; it needs "
                "stem conv and patches of at least 8 px"
            )
        if self.head != "detail" and (self.head_stride != 4 or self.head_refine):
            raise ConfigError(
                f"network: head_stride {self.head_stride} and head_refine {self.head_refine} are for head 'detail', "
                f"got head {self.head!r}"
            )
        if self.head_refine < 0:
            raise ConfigError(f"network: head_refine is {self.head_refine}, expected 0 or above")
        if self.head != "upernet":
            return
        blocks = self.level_blocks
        if (
            len(set(blocks)) != NUM_LEVELS
            or list(blocks) != sorted(blocks)
            or blocks[0] < 0
            or blocks[-1] >= self.depth
        ):
            raise ConfigError(
                f"network: head_blocks is {list(blocks)}, expected {NUM_LEVELS} ascending block indices below "
                f"{self.depth}"
            )

    @property
    def merge_method(self) -> str:
        """How tokens are merged, one of `MERGINGS`."""
        return self.merging or ("clusters" if self.backbone == "clustvit" else "none")

    @property
    def merges(self) -> bool:
        return self.merge_method != "none"

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Those of trained merging, where another way replaces it."""
        own = ("backbone.clusterer.", "backbone.regenerator.", "backbone.later_")
        replaced = self.backbone == "clustvit" and "clusters" not in self.merge_method
        return (own if replaced else ()) + (() if self.merging in ("", "cts") else ("backbone.policy_net.",))

    @property
    def points(self) -> tuple[int, ...]:
        """Blocks before each merge."""
        if self.merging == "algm":
            return self.injection_points or published_points(self.depth)
        if self.merging == "algm+clusters":
            return self.injection_points or (0, self.injection_point)
        return self.injection_points or (self.injection_point,)

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """Blocks whose outputs the head takes besides the last one's; none for a head of one level."""
        if self.head != "upernet":
            return ()
        thirds = (self.depth // 3, self.depth // 2, 2 * self.depth // 3, self.depth)
        return self.head_blocks or tuple(end - 1 for end in thirds)

    def build(self, num_classes: int) -> Segmenter:
        return Segmenter(self._build_backbone(), self._build_head(num_classes))

    def _build_backbone(self) -> VisionTransformer:
        cluster_mlp_dim = self.cluster_mlp_dim or self.embed_dim * 129 // 32
        vit: dict[str, Any] = {
            "image_size": self.image_size, "patch_size": self.patch_size, "stem": self.stem,
            "stem_blocks": self.stem_blocks, "embed_dim": self.embed_dim, "depth": self.depth,
            "num_heads": self.num_heads, "mlp_ratio": self.mlp_ratio, "drop_path": self.drop_path,
            "level_blocks": self.level_blocks, "detail_stride": self.head_stride if self.head == "detail" else 0,
            "final_norm": self.final_norm,
        }  # fmt: skip
        if self.merge_method == "clusters":
            return ClustViT(self.num_clusters, self.points, cluster_mlp_dim, self.decode, **vit)
        if self.merge_method == "none":
            return VisionTransformer(**vit)
        vit["decode_compact"] = self.decode == "compact"
        if self.merge_method == "cts":
            return TokenSharingViT(share_corner=self.share_corner, shared_windows=self.shared_windows, **vit)
        vit["merge_similarity"] = self.merge_similarity
        if self.merge_method == "algm":
            return LocalGlobalMergingViT(self.points[0], self.points[1], **vit)
        if self.merge_method == "algm+clusters":
            first, second = self.points
            return WindowsThenClustersViT(first, second, self.num_clusters, cluster_mlp_dim, **vit)
        if self.merge_method == "stvit":
            return SemanticTokenViT(self.points, **vit)
        return (BipartiteMergingViT if self.merge_method == "tome" else LocalKMeansViT)(self.points[0], **vit)

    def _build_head(self, num_classes: int) -> nn.Module:
        if self.head == "linear":
            return LinearHead(self.embed_dim, num_classes)
        if self.head == "detail":
            details = detail_dims(self.embed_dim, self.patch_size, self.head_stride)
            return DetailHead(self.embed_dim, details, num_classes, self.head_channels or 64, self.head_refine)
        if self.head == "upernet":
            return UPerHead(self.embed_dim, num_classes, self.head_channels or self.embed_dim, self.neck)
        return MaskTransformer(
            self.embed_dim, num_classes, self.head_depth, self.head_heads or self.num_heads, self.mlp_ratio
        )
