"""Hyper-parameters of the CAST family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.cast import CAST
from clustvit_ros.networks.mask_transformer import MaskTransformer
from clustvit_ros.networks.network_config import NetworkConfig
from clustvit_ros.networks.segmenter import Segmenter


@dataclass(frozen=True)
class CASTConfig(NetworkConfig):
    """Everything that fixes the shape of a ViT with CAST attention and its decode head.

    Args:
        stem: "patch" (one linear projection) or "conv" (strided convolutions).
        embed_dim, depth, num_heads, mlp_ratio: of the encoder.
        num_clusters: surrogate tokens of each block.
        cluster_size: tokens per cluster; with single assignment it follows from the number of tokens instead.
        assignment: "top_k", or "single" for each token in exactly one cluster.
        affinity: "softmax" or "laplace".
        tau_q, tau_k: temperatures; 0 is the square root of a head's channels.
        head_depth, head_heads: blocks of the decode head, with ordinary attention, and their heads; 0 heads means as
            the encoder.
        drop_path: stochastic depth, in training only.
    """

    stem: Literal["patch", "conv"] = "patch"
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    num_clusters: int = 16
    cluster_size: int = 64
    assignment: Literal["top_k", "single"] = "top_k"
    affinity: Literal["softmax", "laplace"] = "softmax"
    tau_q: float = 0.0
    tau_k: float = 0.0
    head_depth: int = 2
    head_heads: int = 0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "num_clusters", "cluster_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"network: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("tau_q", "tau_k"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"network: {name} is {getattr(self, name)}, expected a positive number, or 0")
        if min(self.image_size) < self.patch_size:
            raise ConfigError(f"network: image_size {self.image_size} is below one patch of {self.patch_size} px")
        for name in ("num_heads", "head_heads"):
            heads = getattr(self, name) or self.num_heads
            if self.embed_dim % heads:
                raise ConfigError(f"network: embed_dim {self.embed_dim} is not a multiple of {name} {heads}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ConfigError(f"network: patch_size is {self.patch_size}, a conv stem needs a power of two")

    def build(self, num_classes: int) -> Segmenter:
        backbone = CAST(
            self.num_clusters, self.cluster_size, self.assignment, self.affinity, self.tau_q, self.tau_k,
            image_size=self.image_size, patch_size=self.patch_size, stem=self.stem, embed_dim=self.embed_dim,
            depth=self.depth, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio, drop_path=self.drop_path,
        )  # fmt: skip
        head = MaskTransformer(
            self.embed_dim, num_classes, self.head_depth, self.head_heads or self.num_heads, self.mlp_ratio
        )
        return Segmenter(backbone, head)
