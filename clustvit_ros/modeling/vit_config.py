"""Hyper-parameters of the ViT family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from clustvit_ros.errors import ConfigError
from clustvit_ros.modeling.clustvit import ClustViT
from clustvit_ros.modeling.mask_transformer import MaskTransformer
from clustvit_ros.modeling.network_config import NetworkConfig
from clustvit_ros.modeling.segmenter import Segmenter
from clustvit_ros.modeling.vit import VisionTransformer


@dataclass(frozen=True)
class ViTConfig(NetworkConfig):
    """Everything that fixes the shape of a ViT or ClustViT with its decode head.

    Args:
        backbone: "clustvit" merges tokens, "vit" is the plain baseline.
        stem: "patch" (one linear projection, as published) or "conv" (strided convolutions).
        embed_dim, depth, num_heads, mlp_ratio: of the encoder.
        num_clusters: k, clusters besides "keep".
        injection_point: number of blocks before merging.
        cluster_mlp_dim: hidden width of the Clusterer; 0 takes the published ratio, 4 1/32 times embed_dim.
        head_depth, head_heads: blocks of the decode head and their heads; 0 heads means as the encoder.
        drop_path: stochastic depth, in training only.
    """

    backbone: Literal["vit", "clustvit"] = "clustvit"
    stem: Literal["patch", "conv"] = "patch"
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    num_clusters: int = 3
    injection_point: int = 3
    cluster_mlp_dim: int = 0
    head_depth: int = 2
    head_heads: int = 0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "num_clusters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"network: {name} is {getattr(self, name)}, expected at least 1")
        if min(self.image_size) < self.patch_size:
            raise ConfigError(f"network: image_size {self.image_size} is below one patch of {self.patch_size} px")
        for name in ("num_heads", "head_heads"):
            heads = getattr(self, name) or self.num_heads
            if self.embed_dim % heads:
                raise ConfigError(f"network: embed_dim {self.embed_dim} is not a multiple of {name} {heads}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ConfigError(f"network: patch_size is {self.patch_size}, a conv stem needs a power of two")

    @property
    def merges(self) -> bool:
        return self.backbone == "clustvit"

    def build(self, num_classes: int) -> Segmenter:
        vit: dict[str, Any] = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "stem": self.stem,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "drop_path": self.drop_path,
        }
        if self.backbone == "clustvit":
            cluster_mlp_dim = self.cluster_mlp_dim or self.embed_dim * 129 // 32
            backbone: VisionTransformer = ClustViT(self.num_clusters, self.injection_point, cluster_mlp_dim, **vit)
        else:
            backbone = VisionTransformer(**vit)
        head = MaskTransformer(
            self.embed_dim, num_classes, self.head_depth, self.head_heads or self.num_heads, self.mlp_ratio
        )
        return Segmenter(backbone, head)
