"""From class logits on the patch grid to uint8 label maps at image resolution.

Logits are upsampled bilinearly (`align_corners=False`) in bands of rows, so that a full-resolution float tensor of all
classes never exists: 150 classes at 512x512 would be 157 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clustvit_ros.classes import IGNORE_INDEX

# Rows of one band; a band of 150 classes x 640 columns then stays within a few megabytes.
_BAND_ROWS = 16


def label_maps(
    logits: Tensor, size: tuple[int, int], confidence_threshold: float = 0.0, with_confidence: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Upsample logits, take the best class and its softmax probability.

    Args:
        logits: (B, Q, h, w) float.
        size: (H, W) of the result.
        confidence_threshold: pixels below this probability (0..1) get the ignore index.
        with_confidence: compute the confidence map.

    Returns:
        mask: (B, H, W) uint8 (int32 above 255 classes), the first class in case of a tie.
        confidence: (B, H, W) uint8, probability scaled to 0..255 and 0 where the mask is 255; None if not asked for.
    """
    B, Q, h, w = logits.shape
    height, width = size
    left, right, across = _interpolation(w, width, logits)
    columns = torch.lerp(logits[..., left], logits[..., right], across)  # B Q h W
    top, bottom, down = _interpolation(h, height, logits)
    mask = torch.empty(B, height, width, dtype=torch.uint8 if Q <= IGNORE_INDEX else torch.int32, device=logits.device)
    needs_confidence = with_confidence or confidence_threshold > 0.0
    confidence = torch.empty(B, height, width, dtype=torch.uint8, device=logits.device) if needs_confidence else None
    for start in range(0, height, _BAND_ROWS):
        rows = slice(start, start + _BAND_ROWS)
        band = torch.lerp(columns[:, :, top[rows]], columns[:, :, bottom[rows]], down[rows, None])  # B Q rows W
        best, index = band.max(dim=1)
        mask[:, rows] = index
        if confidence is not None:
            probability = band.sub_(best[:, None]).exp_().sum(dim=1).reciprocal_()
            unsure = probability < confidence_threshold
            mask[:, rows].masked_fill_(unsure, IGNORE_INDEX)
            confidence[:, rows] = probability.mul_(255.0).round_().masked_fill_(unsure, 0.0)
    return mask, confidence if with_confidence else None


def cluster_map(cluster_ids: Tensor, grid_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cluster id per pixel, nearest: (B, N) int64 -> (B, H, W) uint8, 0 = kept."""
    grid = cluster_ids.to(torch.uint8).unflatten(1, grid_size)
    rows = torch.arange(size[0], device=grid.device) * grid_size[0] // size[0]
    columns = torch.arange(size[1], device=grid.device) * grid_size[1] // size[1]
    return grid[:, rows][:, :, columns]


def _interpolation(length: int, target: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source indices (lower, upper) and weight of the upper for each of `target` samples."""
    position = (torch.arange(target, device=like.device, dtype=torch.float32) + 0.5) * (length / target) - 0.5
    position = position.clamp(min=0.0)
    lower = position.floor().long().clamp(max=length - 1)
    return lower, (lower + 1).clamp(max=length - 1), (position - lower).to(like.dtype)
