"""A backbone and a decode head that together turn normalised images into class logits on the patch grid."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from clustvit_ros.networks.backbone import Backbone, Features


class SegmenterOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        logits: (B, Q, h, w) float, class logits before any upsampling, on the patch grid; UPerNet with a neck has them
            four times as fine, the detail head at a quarter of the image's resolution.
        cluster_logits, cluster_ids, cluster_positions: as in `Features`.
    """

    logits: Tensor
    cluster_logits: Tensor | None
    cluster_ids: Tensor | None
    cluster_positions: Tensor | None = None


class Segmenter(nn.Module):
    """A backbone and a decode head. The network neither resizes nor normalises: an engine around it does.

    Args:
        backbone: images to features.
        head: maps `Features` to class logits (B, Q, h, w).
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self, images: Tensor, merge_threshold: float = 0.5, token_capacity: int | None = None
    ) -> SegmenterOutput:
        """Segment normalised images.

        Args:
            images: (B, 3, H, W) float, normalised; any size, padded to whole patches inside.
            merge_threshold: tokens whose merge score is above are merged: 0.5 is the paper's arg-max, 1.0 is plain ViT.
            token_capacity: keep exactly this many tokens per image; None lets the threshold alone decide (exact mode).

        Raises:
            ImageError: not a batch of three-channel images.
        """
        return self.decode(self.backbone(images, merge_threshold, token_capacity))

    def decode(self, features: Features) -> SegmenterOutput:
        """Run the head on backbone features."""
        return SegmenterOutput(
            self.head(features), features.cluster_logits, features.cluster_ids, features.cluster_positions
        )
