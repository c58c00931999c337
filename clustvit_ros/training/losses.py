"""Losses of ClustViT's joint training: segmentation, and the Clusterer's own (arXiv 2510.01948)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.classes import IGNORE_INDEX

CLUSTER_LOSS_WEIGHT = 0.1


def cluster_loss(cluster_logits: Tensor, targets: Tensor, weight: float = CLUSTER_LOSS_WEIGHT) -> Tensor:
    """Cross-entropy of the Clusterer against pseudo-clusters, "keep" included, mean over all tokens.

    The only gradient the Clusterer gets, since the arg-max of the merge passes none.

    Args:
        cluster_logits: (B, N, k+1).
        targets: (B, h, w) int64 of `pseudo_clusters`, h * w == N, or (B, N).
    """
    return weight * F.cross_entropy(cluster_logits.transpose(1, 2), targets.flatten(1))


def segmentation_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy at label resolution, void ignored.

    Args:
        logits: (B, Q, h, w), upsampled bilinearly to the labels.
        labels: (B, H, W) int64, 255 = void. A batch without any labelled pixel gives 0.
        class_weights: (Q,), or None.
    """
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="sum")
    valid = labels != IGNORE_INDEX
    if class_weights is None:
        weight = valid.sum().to(total.dtype)
    else:
        counts = torch.bincount(labels[valid], minlength=len(class_weights)).to(total.dtype)
        weight = (counts * class_weights).sum()
    return total / weight.clamp(min=1e-6)


def frequency_weights(pixel_counts: Tensor, bound: float = 10.0) -> Tensor:
    """Class weights that grow as frequency falls: 1 / ln(1.02 + share), mean 1 (ENet, arXiv 1606.02147).

    Args:
        pixel_counts: (Q,) labelled pixels per class in the training data.
        bound: largest ratio between two weights.
    """
    share = pixel_counts.double() / pixel_counts.sum().clamp(min=1)
    weights = 1.0 / torch.log(1.02 + share)
    weights = weights.clamp(max=float(weights.min()) * bound)
    return (weights / weights.mean()).float()
