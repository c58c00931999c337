"""Joint augmentation of image and labels: one affine warp into the crop, flip, and colour jitter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.training.dataset import Sample


@dataclass(frozen=True)
class Augmentation:
    """How training crops are drawn.

    Args:
        crop_size: (height, width) in pixels.
        scale: (smallest, largest) zoom relative to the model's input size, drawn log-uniformly.
        stretch: largest extra zoom of one axis against the other, drawn log-uniformly up to this ratio.
        rotation_deg: largest rotation either way.
        flip: mirror half of the crops.
        jitter: largest relative change of brightness, contrast and saturation.
        hue_deg: largest hue shift either way.
        rare_class: share of crops that are centred on a pixel of a class drawn uniformly from those in the image.
    """

    crop_size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    stretch: float = 1.15
    rotation_deg: float = 5.0
    flip: bool = True
    jitter: float = 0.4
    hue_deg: float = 10.0
    rare_class: float = 0.3

    def __call__(
        self, sample: Sample, input_size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw one crop.

        Args:
            sample: the whole image with its labels.
            input_size: (height, width) of the model's input for the whole image: the meaning of scale 1.
            rng: the only source of randomness.

        Returns:
            (h, w, 3) uint8 image and (h, w) uint8 labels of `crop_size`, void where the crop leaves the image.
        """
        height, width = self.crop_size
        zoom = math.exp(rng.uniform(*np.log(self.scale)))
        stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(self.stretch))
        scale_y = input_size[0] / sample.image.shape[0] * zoom * stretch
        scale_x = input_size[1] / sample.image.shape[1] * zoom / stretch
        centre_y, centre_x = self._centre(sample.labels, (height / scale_y, width / scale_x), rng)
        angle = math.radians(rng.uniform(-self.rotation_deg, self.rotation_deg))
        cos, sin = math.cos(angle), math.sin(angle)
        mirror = -1.0 if self.flip and rng.random() < 0.5 else 1.0
        linear = np.array([[mirror * cos * scale_x, -mirror * sin * scale_y], [sin * scale_x, cos * scale_y]])
        offset = np.array([width / 2, height / 2]) - linear @ np.array([centre_x, centre_y])
        matrix = np.hstack([linear, offset[:, None]])
        image = cv2.warpAffine(
            sample.image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=(127, 127, 127)
        )
        labels = cv2.warpAffine(
            sample.labels, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=(IGNORE_INDEX,)
        )
        return self._recolour(image, rng), labels

    def _centre(self, labels: np.ndarray, extent: tuple[float, float], rng: np.random.Generator) -> tuple[float, float]:
        """Centre (y, x) in image pixels of a crop that covers `extent` (height, width) of them."""
        if rng.random() < self.rare_class:
            # A thinned copy is enough to find a place, and sixteen times faster to search.
            present = np.unique(labels[::4, ::4])
            present = present[present != IGNORE_INDEX]
            if present.size:
                rows, columns = np.nonzero(labels[::4, ::4] == rng.choice(present))
                pick = rng.integers(rows.size)
                jitter = rng.uniform(-0.25, 0.25, 2)
                return rows[pick] * 4 + jitter[0] * extent[0], columns[pick] * 4 + jitter[1] * extent[1]
        centre = []
        for length, covered in zip(labels.shape, extent, strict=True):
            slack = abs(length - covered) / 2
            centre.append(length / 2 + rng.uniform(-slack, slack))
        return centre[0], centre[1]

    def _recolour(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        brightness, contrast, saturation = 1.0 + rng.uniform(-self.jitter, self.jitter, 3)
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.int16)
        hsv[..., 0] = (hsv[..., 0] + round(rng.uniform(-self.hue_deg, self.hue_deg) / 2)) % 180
        hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
        image = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
        # Contrast turns about mid-grey; a table maps all values at once, clipped instead of wrapped.
        values = (np.arange(256) - 127.5) * contrast + 127.5 * brightness
        return cv2.LUT(image, np.clip(values, 0, 255).astype(np.uint8))
