# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Scoring an engine on labelled images: the one way in which all models of this package are judged."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from clustvit_ros.classes import Sample
from clustvit_ros.engine.engine import Engine, Prediction, Settings
from clustvit_ros.engine.network_engine import NetworkEngine
from clustvit_ros.errors import DataError
from clustvit_ros.measure.flops import count_cost
from clustvit_ros.measure.metrics import BoundaryIoU, CalibrationError, ConfusionMatrix
from clustvit_ros.networks.model_folder import TEMPERATURES, ModelConfig
from clustvit_ros.policy import percentile

GflopsCounter = Callable[[tuple[int, int], int], float]
"""(height, width) at which the network sees an image, and token capacity -> 1e9 operations of a call."""


class LabelledSamples(Protocol):
    """Labelled images by index, e.g. `training.dataset.LabelledImages`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def evaluate(
    engine: Engine, data: LabelledSamples, settings: Settings = Settings(),
    on_image: Callable[[Sample, Prediction], None] | None = None,
    count_gflops: GflopsCounter | None = None, details: bool = False, groups: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Segment every image and compare with its labels at the image's own size.

    Args:
        engine: warmed up inside.
        data: images with labels of the engine's classes.
        settings: settings of every call; the confidence map is computed as asked for there.
        on_image: called with each sample and its prediction.
        count_gflops: counts operations; None leaves them out.
        details: boundary IoU, confusion matrix and a record for each image as well.
        groups: indices of images that are scored by themselves as well, such as those of a drive.

    Returns:
        `miou`, `per_class_iou` (None for a class that occurs nowhere) and `pixel_accuracy` in percent; `images`;
        `tokens_total` and `tokens_kept_mean` per image, `tokens_merged_mean` as a share 0..1; `latency_ms_p50` and
        `latency_ms_p95`, from image in to mask out; `ece`, the expected calibration error 0..1, where there is a
        confidence map; `gflops_mean` per image when counted; `groups`, `miou` (None without a labelled pixel) and
        `images` of each. With `details`, `boundary_iou` and `per_class_boundary_iou` in percent, `confusion` (rows:
        truth, columns: prediction, the last one unlabelled; pixels), and `per_image` records.
    """
    names = engine.info.classes.names
    matrix, calibration = ConfusionMatrix(len(names)), CalibrationError()
    by_group = {name: (frozenset(indices), ConfusionMatrix(len(names))) for name, indices in (groups or {}).items()}
    boundaries = BoundaryIoU(len(names)) if details else None
    latencies_ms, kept, total = [], [], 0
    gflops: list[float] = []
    records: list[dict[str, Any]] = []
    engine.warmup(data[0].image.shape[:2])
    for index in tqdm(range(len(data)), desc="evaluate", leave=False, mininterval=1.0):
        sample = data[index]
        prediction = engine.segment(sample.image, settings)
        for counted in (matrix, *(each for indices, each in by_group.values() if index in indices)):
            counted.add(sample.labels, prediction.mask[0])
        if prediction.confidence is not None:
            calibration.add(sample.labels, prediction.mask[0], prediction.confidence[0])
        latencies_ms.append(prediction.stats.total_ms)
        kept.append(prediction.stats.tokens_kept / prediction.stats.tokens_total)
        total = prediction.stats.tokens_total
        if count_gflops:
            gflops.append(count_gflops(prediction.stats.input_size, prediction.stats.token_capacity))
        if boundaries:
            boundaries.add(sample.labels, prediction.mask[0])
            records.append(_record(sample, prediction, len(names), gflops[-1] if gflops else None))
        if on_image:
            on_image(sample, prediction)
    scores: dict[str, Any] = {
        "miou": round(100 * matrix.miou(), 3), "per_class_iou": _by_name(names, matrix.iou()),
        "pixel_accuracy": round(100 * matrix.pixel_accuracy(), 3), "images": len(data), "tokens_total": total,
        "tokens_kept_mean": round(statistics.fmean(kept) * total, 2),
        "tokens_merged_mean": round(1 - statistics.fmean(kept), 4),
        "latency_ms_p50": round(statistics.median(latencies_ms), 3),
        "latency_ms_p95": round(percentile(latencies_ms, 0.95), 3),
    }  # fmt: skip
    if settings.confidence:
        scores["ece"] = round(calibration.value(), 4)
    if by_group:
        scores["groups"] = {
            name: {"miou": round(100 * each.miou(), 3) if each.counts.any() else None, "images": len(indices)}
            for name, (indices, each) in by_group.items()
        }
    if gflops:
        scores["gflops_mean"] = round(statistics.fmean(gflops), 3)
    if boundaries:
        scores["boundary_iou"] = round(100 * float(np.nanmean(boundaries.iou())), 3)
        scores["per_class_boundary_iou"] = _by_name(names, boundaries.iou())
        scores["confusion"] = matrix.counts.tolist()
        scores["per_image"] = records
    return scores


_MOST_FITTED, _FITTED_STRIDE = 200, 4


def fit_temperature(engine: NetworkEngine, data: LabelledSamples, settings: Settings = Settings()) -> float:
    """The temperature at which the true classes of images get the highest likelihood (Guo et al., arXiv 1706.04599).

    Args:
        engine: what it runs already divides its logits by is part of the result.
        data: images that nothing was learnt from; some hundred of them are used, and every fourth logit of those.
        settings: settings of the calls.

    Raises:
        DataError: none of the pixels that are used has a class.
    """
    found = []
    for index in range(0, len(data), -(-len(data) // _MOST_FITTED)):
        sample = data[index]
        size = engine.input_size(sample.image.shape[:2], settings.input_scale)
        with torch.inference_mode():
            logits = engine.infer(engine.preprocess(sample.image[None], size), settings).logits[0].float().cpu()
        labels = cv2.resize(sample.labels, (logits.shape[2], logits.shape[1]), interpolation=cv2.INTER_NEAREST)
        truth = torch.from_numpy(labels[::_FITTED_STRIDE, ::_FITTED_STRIDE]).long().flatten()
        sampled = logits[:, ::_FITTED_STRIDE, ::_FITTED_STRIDE].flatten(1).T
        found.append((sampled[truth < len(logits)], truth[truth < len(logits)]))
    sampled, truth = (torch.cat(part) for part in zip(*found, strict=True))
    if not len(truth):
        raise DataError(
            f"a temperature cannot be fitted: none of the {len(found)} images used has a labelled pixel where one in "
            f"{_FITTED_STRIDE}x{_FITTED_STRIDE} is looked at; expected labels that are not all void"
        )
    low, high = TEMPERATURES

    def loss(temperature: float) -> float:
        return float(F.cross_entropy(sampled / temperature, truth))

    best: float = min(np.geomspace(low, high, 241).tolist(), key=loss)
    return round(best, 3)


def gflops_counter(config: ModelConfig) -> GflopsCounter:
    """Counts each pair of size and capacity once."""

    @functools.cache
    def count(input_size: tuple[int, int], token_capacity: int) -> float:
        return count_cost(config.network, len(config.classes), input_size, 1, token_capacity).flops / 1e9

    return count


def _record(sample: Sample, prediction: Prediction, num_classes: int, gflops: float | None) -> dict[str, Any]:
    single = ConfusionMatrix(num_classes)
    single.add(sample.labels, prediction.mask[0])
    return {
        "image": sample.stem, "miou": round(100 * single.miou(), 3) if single.counts.any() else None,
        "tokens_kept": prediction.stats.tokens_kept, "gflops": None if gflops is None else round(gflops, 3),
        "latency_ms": round(prediction.stats.total_ms, 3),
    }  # fmt: skip


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    """Percentages by class name, None for NaN."""
    pairs = zip(names, values, strict=True)
    return {name: None if np.isnan(value) else round(100 * float(value), 3) for name, value in pairs}
