"""Whole-image and sliding-window inference on normalised images, as mmsegmentation computes them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.errors import ConfigError


def whole_logits(network: nn.Module, images: Tensor, **settings) -> Tensor:
    """Class logits at image resolution: (B, 3, H, W) -> (B, Q, H, W), bilinear."""
    logits = network(images, **settings).logits
    return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def sliding_window_logits(
    network: nn.Module, images: Tensor, crop_size: tuple[int, int], stride: tuple[int, int], **settings
) -> Tensor:
    """Class logits averaged over overlapping windows, each clustered on its own.

    Args:
        images: (B, 3, H, W) float, normalised.
        crop_size: (height, width) of a window in pixels; an image smaller than it is one window of its own size.
        stride: (vertical, horizontal) step in pixels, at most the crop size.
        settings: `merge_threshold` and `token_capacity` of the network.

    Returns:
        (B, Q, H, W) float, mean of the windows' logits (before any softmax).

    Raises:
        ConfigError: a stride that leaves gaps.
    """
    if not all(0 < step <= side for step, side in zip(stride, crop_size, strict=True)):
        raise ConfigError(f"stride: got {stride} with windows of {crop_size}, expected 1 up to the window's size")
    height, width = images.shape[2:]
    total, count = None, images.new_zeros(1, 1, height, width)
    for top, left, bottom, right in window_boxes((height, width), crop_size, stride):
        logits = whole_logits(network, images[:, :, top:bottom, left:right], **settings)
        if total is None:
            total = logits.new_zeros(logits.shape[0], logits.shape[1], height, width)
        total[:, :, top:bottom, left:right] += logits
        count[:, :, top:bottom, left:right] += 1
    assert total is not None  # an image has at least one window
    return total / count


def window_boxes(
    image_size: tuple[int, int], crop_size: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """Windows as (top, left, bottom, right), row by row; the last of a row or column is moved back to the border."""
    tops = _starts(image_size[0], crop_size[0], stride[0])
    lefts = _starts(image_size[1], crop_size[1], stride[1])
    return [
        (top, left, min(top + crop_size[0], image_size[0]), min(left + crop_size[1], image_size[1]))
        for top in tops
        for left in lefts
    ]


def _starts(length: int, crop: int, stride: int) -> list[int]:
    last = max(length - crop, 0)
    return [min(start, last) for start in range(0, last + stride, stride)] if last else [0]
