"""Segmentation scores: one confusion matrix judges every model, in training, evaluation and the demo."""

from __future__ import annotations

import numpy as np

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
