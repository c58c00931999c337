"""Class colours over the camera image, for people."""

from __future__ import annotations

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX


def draw_overlay(image: np.ndarray, mask: np.ndarray, palette: np.ndarray, alpha: float) -> np.ndarray:
    """Blend the colours of a mask into an image; unlabelled pixels show the image alone.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (h, w) uint8 or uint16 class ids, scaled to the image's size if it differs.
        palette: (classes, 3) uint8 RGB, as `ClassSet.palette` gives it.
        alpha: weight of the colours, 0 to 1.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    if mask.shape != image.shape[:2]:
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    colours = _look_up(mask, palette)
    blended = cv2.addWeighted(image, 1.0 - alpha, colours, alpha, 0.0)
    return cv2.copyTo(image, (mask == IGNORE_INDEX).view(np.uint8), blended)


def _look_up(mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    if mask.dtype != np.uint8:
        return palette[mask]
    # Each channel has its own table; several times faster than indexing the palette.
    return cv2.LUT(cv2.merge([mask, mask, mask]), palette[None, :256])
