"""Targets of the Clusterer, made from segmentation labels (ClustViT, arXiv 2510.01948)."""

from __future__ import annotations

import torch
from torch import Tensor

from clustvit_ros.classes import IGNORE_INDEX


def pseudo_clusters(labels: Tensor, patch_size: int, num_clusters: int) -> Tensor:
    """Which patches ought to be merged: homogeneous ones of the k classes that cover most such patches of the image.

    Args:
        labels: (B, H, W) int64 class ids, 255 = void; H and W are padded with void to whole patches.
        patch_size: in pixels.
        num_clusters: k.

    Returns:
        (B, h, w) int64. 1..k are ranks by descending count within the image (the lower class id first among equals);
        0 is everything else: patches with several values, void patches, and classes of lower rank.
    """
    pad_bottom, pad_right = -labels.shape[1] % patch_size, -labels.shape[2] % patch_size
    labels = torch.nn.functional.pad(labels, (0, pad_right, 0, pad_bottom), value=IGNORE_INDEX)
    patches = labels.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)  # B h w p p
    lowest, highest = patches.amin(dim=(3, 4)), patches.amax(dim=(3, 4))
    homogeneous = (lowest == highest) & (lowest != IGNORE_INDEX)
    classes = torch.where(homogeneous, lowest, IGNORE_INDEX).flatten(1)  # B N

    num_values = IGNORE_INDEX + 1
    counts = torch.zeros(labels.shape[0], num_values, dtype=torch.long, device=labels.device)
    counts.scatter_add_(1, classes, torch.ones_like(classes))
    counts[:, IGNORE_INDEX] = 0
    ranked = counts.argsort(dim=1, descending=True, stable=True)[:, :num_clusters]
    rank_of_class = torch.zeros_like(counts)
    ranks = torch.arange(1, ranked.shape[1] + 1, device=labels.device).expand_as(ranked)
    rank_of_class.scatter_(1, ranked, torch.where(counts.gather(1, ranked) > 0, ranks, 0))
    rank_of_class[:, IGNORE_INDEX] = 0
    return rank_of_class.gather(1, classes).unflatten(1, lowest.shape[1:])
