"""Scoring an engine on labelled images: the one way in which all models of this package are judged."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from clustvit_ros.runtime.engine import Engine, Prediction, Settings
from clustvit_ros.training.dataset import LabelledImages, Sample
from clustvit_ros.training.metrics import ConfusionMatrix


def evaluate(
    engine: Engine,
    data: LabelledImages,
    settings: Settings = Settings(),
    on_image: Callable[[Sample, Prediction], None] | None = None,
) -> dict[str, Any]:
    """Segment every image and compare with its labels at the image's own size.

    Args:
        engine: warmed up inside.
        data: images with labels of the engine's classes.
        settings: of every call; the confidence map is computed as asked for there.
        on_image: called with each sample and its prediction.

    Returns:
        `miou`, `per_class_iou` (None for a class that occurs nowhere) and `pixel_accuracy` in percent; `images`;
        `tokens_total` and `tokens_kept_mean` per image, `tokens_merged_mean` as a share 0..1; `latency_ms_p50` and
        `latency_ms_p95`, from image in to mask out.
    """
    names = engine.info.classes.names
    matrix = ConfusionMatrix(len(names))
    latencies_ms, kept, total = [], [], 0
    engine.warmup(data[0].image.shape[:2])
    for index in tqdm(range(len(data)), desc="evaluate", leave=False, mininterval=1.0):
        sample = data[index]
        prediction = engine.segment(sample.image, settings)
        matrix.add(sample.labels, prediction.mask[0])
        latencies_ms.append(prediction.stats.total_ms)
        kept.append(prediction.stats.tokens_kept / prediction.stats.tokens_total)
        total = prediction.stats.tokens_total
        if on_image:
            on_image(sample, prediction)
    iou = matrix.iou()
    return {
        "miou": round(100 * matrix.miou(), 3),
        "per_class_iou": {
            name: None if np.isnan(value) else round(100 * float(value), 3)
            for name, value in zip(names, iou, strict=True)
        },
        "pixel_accuracy": round(100 * matrix.pixel_accuracy(), 3),
        "images": len(data),
        "tokens_total": total,
        "tokens_kept_mean": round(statistics.fmean(kept) * total, 2),
        "tokens_merged_mean": round(1 - statistics.fmean(kept), 4),
        "latency_ms_p50": round(statistics.median(latencies_ms), 3),
        "latency_ms_p95": round(float(np.percentile(latencies_ms, 95)), 3),
    }
