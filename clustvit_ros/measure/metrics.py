# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Segmentation scores: one confusion matrix judges every model, in training, evaluation and the demo."""

from __future__ import annotations

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.errors import DataError


class ConfusionMatrix:
    """Pixel counts by true and predicted class.

    A labelled pixel that is predicted as unlabelled (any value without a class) counts against its class's recall:
    leaving pixels out never raises a score. Void pixels of the truth do not count.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        # The last column collects predictions without a class.
        self.counts = np.zeros((num_classes, num_classes + 1), np.int64)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image.

        Args:
            truth: (H, W) integers; values without a class are void.
            prediction: (H, W) integers.

        Raises:
            DataError: the sizes differ.
        """
        if truth.shape != prediction.shape:
            raise DataError(f"prediction of size {prediction.shape} cannot be scored against labels of {truth.shape}")
        labelled = truth < self.num_classes
        predicted = np.minimum(prediction[labelled].astype(np.int64), self.num_classes)
        width = self.num_classes + 1
        index = truth[labelled].astype(np.int64) * width + predicted
        self.counts += np.bincount(index, minlength=self.counts.size).reshape(self.counts.shape)

    def iou(self) -> np.ndarray:
        """Intersection over union per class: (Q,) float 0..1, NaN for a class in neither truth nor prediction."""
        intersection = np.diagonal(self.counts).astype(float)
        union = self.counts.sum(axis=1) + self.counts.sum(axis=0)[: self.num_classes] - intersection
        return np.divide(intersection, union, out=np.full_like(intersection, np.nan), where=union > 0)

    def miou(self) -> float:
        """Mean IoU over classes that occur, 0..1.

        Raises:
            DataError: no labelled pixel was counted.
        """
        if not self.counts.any():
            raise DataError("mIoU is undefined: no labelled pixel was counted; check that the labels are not all void")
        return float(np.nanmean(self.iou()))

    def pixel_accuracy(self) -> float:
        """Share of labelled pixels whose class is right, 0..1."""
        return float(np.trace(self.counts) / max(self.counts.sum(), 1))


class CalibrationError:
    """Expected calibration error: by how much confidence and share of right pixels differ, mean over pixels.

    Guo et al., arXiv 1706.04599: pixels are sorted into bins of equal width by their confidence. Void pixels of the
    truth, and those that the mask leaves unlabelled, do not count.

    Args:
        bins: 15 as published.
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        # By the 256 values that a confidence map can hold.
        self._right, self._all = np.zeros(256, np.int64), np.zeros(256, np.int64)

    def add(self, truth: np.ndarray, prediction: np.ndarray, confidence: np.ndarray) -> None:
        """Count one image.

        Args:
            truth, prediction: (H, W) integers, 255 = none.
            confidence: (H, W) uint8, probability scaled to 0..255.
        """
        counted = (truth != IGNORE_INDEX) & (prediction != IGNORE_INDEX)
        self._all += np.bincount(confidence[counted], minlength=256)
        self._right += np.bincount(confidence[counted & (truth == prediction)], minlength=256)

    def value(self) -> float:
        """0 (confidence means what it says) to 1; NaN where nothing was counted."""
        values = np.arange(256)
        index = np.minimum(values * self.bins // 255, self.bins - 1)
        stated, right = (np.bincount(index, sums, self.bins) for sums in (self._all * values / 255, self._right))
        total = self._all.sum()
        return float(np.abs(stated - right).sum() / total) if total else float("nan")


class BoundaryIoU:
    """IoU of the bands inside of object boundaries, which thin and ragged objects cannot hide in large areas.

    Cheng et al., "Boundary IoU", arXiv 2103.16562: for each class, truth and prediction are reduced to the pixels
    within `width` of their own boundary; intersection and union are summed over all images. Void pixels of the truth
    count for neither side.

    Args:
        num_classes: Q.
        width: width of the band as a share of the image's diagonal, 0.02 as published.
    """

    def __init__(self, num_classes: int, width: float = 0.02) -> None:
        self.num_classes, self.width = num_classes, width
        self._intersection = np.zeros(num_classes, np.int64)
        self._union = np.zeros(num_classes, np.int64)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image.

        Args:
            truth: (H, W) integers; values without a class are void.
            prediction: (H, W) integers.
        """
        distance_px = max(round(self.width * float(np.hypot(*truth.shape))), 1)
        labelled = truth < self.num_classes
        for index in np.union1d(truth[labelled], prediction[labelled]):
            if index >= self.num_classes:
                continue
            true_band = _inner_band(truth == index, distance_px)
            predicted_band = _inner_band((prediction == index) & labelled, distance_px)
            self._intersection[index] += np.count_nonzero(true_band & predicted_band)
            self._union[index] += np.count_nonzero(true_band | predicted_band)

    def iou(self) -> np.ndarray:
        """Per class: (Q,) float 0..1, NaN for a class in neither truth nor prediction."""
        union = self._union.astype(float)
        return np.divide(self._intersection, union, out=np.full_like(union, np.nan), where=union > 0)


def _inner_band(mask: np.ndarray, distance_px: int) -> np.ndarray:
    """Pixels of a mask within a distance of its boundary; the image's edge is a boundary too, as published."""
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inside = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance_px)
    return mask & (inside[1:-1, 1:-1] == 0)
