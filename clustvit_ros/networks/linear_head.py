"""The plainest decode head: one linear layer per token (the "linear" of Segmenter, arXiv 2105.05633, and of DINOv2)."""

from __future__ import annotations

from torch import Tensor, nn

from clustvit_ros.networks.backbone import Features


class LinearHead(nn.Module):
    """Class logits per patch token: features -> (B, Q, h, w)."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(embed_dim, num_classes)

    def forward(self, features: Features) -> Tensor:
        return features.to_grid(self.classify(features.tokens))
