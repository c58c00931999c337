"""Named architectures, their hyper-parameters, and the builder that turns them into networks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from clustvit_ros.config import from_mapping
from clustvit_ros.errors import ConfigError
from clustvit_ros.modeling.clustvit import ClustViT
from clustvit_ros.modeling.mask_transformer import MaskTransformer
from clustvit_ros.modeling.segmenter import Segmenter
from clustvit_ros.modeling.vit import VisionTransformer


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that fixes the shape of a network.

    Args:
        backbone: "clustvit" merges tokens, "vit" is the plain baseline.
        image_size: (height, width) in pixels the position embedding is made for.
        patch_size: side of a patch in pixels.
        stem: "patch" (one linear projection, as published) or "conv" (strided convolutions).
        embed_dim, depth, num_heads, mlp_ratio: of the encoder.
        num_clusters: k, clusters besides "keep".
        injection_point: number of blocks before merging.
        cluster_mlp_dim: hidden width of the Clusterer; 0 takes the published ratio, 4 1/32 times embed_dim.
        head_depth, head_heads: blocks of the decode head and their heads; 0 heads means as the encoder.
        drop_path: stochastic depth, in training only.
    """

    backbone: Literal["vit", "clustvit"]
    image_size: tuple[int, int] = (512, 512)
    patch_size: int = 16
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


_SIZES = {
    "t": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    f"{backbone}_{size}": {"backbone": backbone, **shape}
    for backbone in ("vit", "clustvit")
    for size, shape in _SIZES.items()
}
"""Published sizes by name; a model's `network` section states what differs."""


def network_config(architecture: str, overrides: dict[str, Any], where: str = "network") -> NetworkConfig:
    """Hyper-parameters of a named architecture with some replaced.

    Raises:
        ConfigError: unknown architecture, unknown key, or a value of the wrong type or range.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{where}: unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    return from_mapping(NetworkConfig, {**ARCHITECTURES[architecture], **overrides}, where)


def build_network(config: NetworkConfig, num_classes: int) -> Segmenter:
    """A freshly initialised network."""
    vit: dict[str, Any] = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "stem": config.stem,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "drop_path": config.drop_path,
    }
    if config.backbone == "clustvit":
        cluster_mlp_dim = config.cluster_mlp_dim or config.embed_dim * 129 // 32
        backbone: VisionTransformer = ClustViT(config.num_clusters, config.injection_point, cluster_mlp_dim, **vit)
    else:
        backbone = VisionTransformer(**vit)
    head = MaskTransformer(
        config.embed_dim, num_classes, config.head_depth, config.head_heads or config.num_heads, config.mlp_ratio
    )
    network = Segmenter(backbone, head)
    _initialise(network)
    return network


def without_merging(config: NetworkConfig) -> NetworkConfig:
    """The plain ViT twin of a ClustViT: same network, no clusterer, no regenerator."""
    return dataclasses.replace(config, backbone="vit")


def _initialise(network: Segmenter) -> None:
    """ViT's usual initialisation: truncated normal 0.02 for linear layers and embeddings, fan-out for convolutions."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for embedding in (network.backbone.cls_token, network.backbone.pos_embed, network.head.class_embed):
        nn.init.trunc_normal_(embedding, std=0.02)
    with torch.no_grad():
        # Cosine similarities normalised over classes start at unit scale; biases at 0 leave no class preferred.
        network.head.mask_norm.weight.fill_(1.0)
