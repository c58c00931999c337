"""Hyper-parameters of the ClusTR family."""

from __future__ import annotations

from dataclasses import dataclass

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.clustr import ClusTR
from clustvit_ros.networks.feature_pyramid import FeaturePyramidHead
from clustvit_ros.networks.network_config import NetworkConfig
from clustvit_ros.networks.segmenter import Segmenter


@dataclass(frozen=True)
class ClusTRConfig(NetworkConfig):
    """Everything that fixes the shape of a ClusTR with its feature-pyramid head; tuples are per stage.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: of the encoder.
        sr_ratios: a coarse cluster stands for so many tokens, squared; 1 is plain attention.
        window_tokens: clusters are sought within windows of at most so many tokens; 0 is the whole grid, as published,
            whose cost grows with the square of the tokens.
        cluster_once: cluster in a stage's first block only; false is as published.
        head_dim: channels of the feature pyramid.
        drop_path: stochastic depth, in training only.
    """

    patch_size: int = 32
    embed_dims: tuple[int, int, int, int] = (64, 128, 256, 512)
    depths: tuple[int, int, int, int] = (1, 2, 6, 1)
    num_heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    mlp_ratios: tuple[float, float, float, float] = (8.0, 8.0, 4.0, 4.0)
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    window_tokens: int = 1024
    cluster_once: bool = True
    head_dim: int = 128
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.patch_size != 32:
            raise ConfigError(f"network: patch_size is {self.patch_size}, ClusTR's four stages make it 32")
        for name in ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios"):
            if min(getattr(self, name)) < 1:
                raise ConfigError(f"network: {name} is {list(getattr(self, name))}, expected at least 1 each")
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ConfigError(f"network: embed_dims {dim} is not a multiple of its num_heads {heads}")
        if self.window_tokens and self.window_tokens < 4 * max(self.sr_ratios) ** 2:
            raise ConfigError(
                f"network: window_tokens is {self.window_tokens}, expected 0 (no windows) or at least four of the "
                f"largest cluster, {4 * max(self.sr_ratios) ** 2}"
            )
        if self.head_dim < 32 or self.head_dim % 32:
            raise ConfigError(f"network: head_dim is {self.head_dim}, expected a multiple of 32")

    def build(self, num_classes: int) -> Segmenter:
        backbone = ClusTR(
            self.embed_dims, self.depths, self.num_heads, self.mlp_ratios, self.sr_ratios,
            self.window_tokens, self.cluster_once, self.drop_path,
        )  # fmt: skip
        return Segmenter(backbone, FeaturePyramidHead(self.embed_dims, num_classes, self.head_dim))
