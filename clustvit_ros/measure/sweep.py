"""Sweeps over merge settings: what each costs in milliseconds, and what in accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from clustvit_ros.engine.engine import Engine, Settings
from clustvit_ros.measure.metrics import ConfusionMatrix


@dataclass(frozen=True)
class SweepRow:
    """One setting, measured.

    Args:
        merge_threshold, token_capacity: the setting.
        accuracy: percent; mIoU against labels, else agreement with the unmerged result.
        latency_ms_p50, latency_ms_p95: of an engine call.
        tokens_kept_mean: per image.
        pareto: no other setting is both faster (p50) and at least as accurate.
        gflops_mean: per image, where they were counted.
    """

    merge_threshold: float
    token_capacity: int
    accuracy: float
    latency_ms_p50: float
    latency_ms_p95: float
    tokens_kept_mean: float
    pareto: bool = False
    gflops_mean: float | None = None


def sweep(
    engine: Engine,
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray] | None,
    settings: Sequence[Settings],
    count_gflops: Callable[[tuple[int, int], int], float] | None = None,
) -> list[SweepRow]:
    """Measure every setting on every image.

    Settings take turns on each image, so that a machine that slows down meanwhile slows all of them.

    Args:
        images: (H, W, 3) uint8 RGB.
        labels: (H, W) class ids for each image; None compares with the engine's own result without merging.
        settings: what to compare.
        count_gflops: (image size, token capacity) to 1e9 operations of a call; None leaves them out.

    Returns:
        One row per setting, in the same order, the Pareto front marked.
    """
    num_classes = len(engine.info.classes)
    matrices = [ConfusionMatrix(num_classes) for _ in settings]
    agreements: list[list[float]] = [[] for _ in settings]
    latencies_ms: list[list[float]] = [[] for _ in settings]
    kept: list[list[float]] = [[] for _ in settings]
    gflops: list[list[float]] = [[] for _ in settings]
    for size in {image.shape[:2] for image in images}:
        engine.warmup((size[0], size[1]))
    for index in tqdm(range(len(images)), desc="sweep", leave=False, mininterval=1.0):
        image = images[index]
        reference = None if labels is not None else engine.segment(image, Settings(merge_threshold=1.0)).mask[0]
        for row, setting in enumerate(settings):
            prediction = engine.segment(image, setting)
            latencies_ms[row].append(prediction.stats.total_ms)
            kept[row].append(prediction.stats.tokens_kept)
            if count_gflops:
                gflops[row].append(count_gflops(image.shape[:2], prediction.stats.token_capacity))
            if labels is not None:
                matrices[row].add(labels[index], prediction.mask[0])
            else:
                agreements[row].append(float((prediction.mask[0] == reference).mean()))
    rows = []
    for row, setting in enumerate(settings):
        accuracy = matrices[row].miou() if labels is not None else statistics.fmean(agreements[row])
        rows.append(
            SweepRow(
                merge_threshold=setting.merge_threshold,
                token_capacity=setting.token_capacity,
                accuracy=round(100 * accuracy, 3),
                latency_ms_p50=round(statistics.median(latencies_ms[row]), 3),
                latency_ms_p95=round(float(np.percentile(latencies_ms[row], 95)), 3),
                tokens_kept_mean=round(statistics.fmean(kept[row]), 1),
                gflops_mean=round(statistics.fmean(gflops[row]), 3) if count_gflops else None,
            )
        )
    return [SweepRow(**{**asdict(row), "pareto": _on_front(row, rows)}) for row in rows]


def suggest(rows: Sequence[SweepRow], budget_ms: float) -> SweepRow | None:
    """The most accurate setting whose p95 latency is within the budget, the faster one of equals; None if none is."""
    fitting = [row for row in rows if row.latency_ms_p95 <= budget_ms]
    return max(fitting, key=lambda row: (row.accuracy, -row.latency_ms_p50), default=None)


def _on_front(row: SweepRow, rows: Sequence[SweepRow]) -> bool:
    return not any(
        (other.latency_ms_p50 < row.latency_ms_p50 and other.accuracy >= row.accuracy)
        or (other.latency_ms_p50 == row.latency_ms_p50 and other.accuracy > row.accuracy)
        for other in rows
    )
