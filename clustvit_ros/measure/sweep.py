# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Sweeps over merge settings: what each costs in milliseconds, and what in accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clustvit_ros.engine.engine import Engine, Settings
from clustvit_ros.engine.ladder import default_ladder
from clustvit_ros.measure.metrics import ConfusionMatrix
from clustvit_ros.measure.tables import new_figure, save_figure
from clustvit_ros.policy import percentile

_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class SweepRow:
    """One setting, measured.

    Args:
        merge_threshold, token_capacity: the setting.
        accuracy: percent; mIoU against labels, else agreement with the unmerged result.
        latency_ms_p50, latency_ms_p95: milliseconds of an engine call.
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
                latency_ms_p95=round(percentile(latencies_ms[row], 0.95), 3),
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


def ladder_settings(tokens_total: int) -> list[Settings]:
    """What a sweep compares: thresholds from 0.1 to 1, and every rung of the capacity ladder below all tokens."""
    by_threshold = [Settings(threshold, confidence=False) for threshold in _THRESHOLDS]
    by_capacity = [Settings(1.0, capacity, confidence=False) for capacity in default_ladder(tokens_total)[:-1]]
    return by_threshold + by_capacity


def draw_sweep(
    rows: Sequence[SweepRow],
    current: SweepRow,
    suggestion: SweepRow | None,
    budget_ms: float | None,
    measure: str,
    title: str,
    path: Path,
) -> None:
    """Draw accuracy against latency as PNG (or whatever the path's suffix says)."""
    figure, ((axes,),) = new_figure((8, 5))
    for label, marker, chosen in (
        ("merge_threshold", "o", [row for row in rows if row.token_capacity == 0]),
        ("token_capacity", "s", [row for row in rows if row.token_capacity > 0]),
    ):
        axes.scatter([r.latency_ms_p50 for r in chosen], [r.accuracy for r in chosen], marker=marker, s=30, label=label)
        for row in chosen:
            text = f"{row.token_capacity}" if row.token_capacity else f"{row.merge_threshold:g}"
            axes.annotate(text, (row.latency_ms_p50, row.accuracy), (4, -10), textcoords="offset points", fontsize=7)
    front = sorted((row for row in rows if row.pareto), key=lambda row: row.latency_ms_p50)
    axes.plot(
        [r.latency_ms_p50 for r in front], [r.accuracy for r in front], "-", lw=1, color="grey", label="Pareto front"
    )
    axes.plot(current.latency_ms_p50, current.accuracy, "*", ms=15, mfc="none", mec="black", label="current setting")
    if suggestion:
        axes.plot(suggestion.latency_ms_p50, suggestion.accuracy, "D", ms=11, mfc="none", mec="red", label="suggested")
    if budget_ms:
        axes.axvline(budget_ms, ls="--", lw=1, color="red", label=f"budget {budget_ms:g} ms")
    axes.set_xlabel("latency p50 (ms)")
    axes.set_ylabel(f"{measure} (%)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def sweep_table(rows: Sequence[SweepRow], measure: str, suggestion: SweepRow | None, budget_ms: float | None) -> str:
    """The rows as text, and what is suggested for a budget in milliseconds (p95), where there is one."""
    lines = [
        f"{'threshold':>9} {'capacity':>8} {'kept':>7} {'p50 ms':>8} {'p95 ms':>8} {'accuracy %':>10}   ({measure})"
    ]
    for row in rows:
        front = "  Pareto" if row.pareto else ""
        lines.append(
            f"{row.merge_threshold:9.2f} {row.token_capacity or '-':>8} {row.tokens_kept_mean:7.0f} "
            f"{row.latency_ms_p50:8.1f} {row.latency_ms_p95:8.1f} {row.accuracy:10.2f}{front}"
        )
    if budget_ms and suggestion:
        capacity = f", token_capacity {suggestion.token_capacity}" if suggestion.token_capacity else ""
        lines.append(
            f"within {budget_ms:g} ms: merge_threshold {suggestion.merge_threshold:g}{capacity} "
            f"({suggestion.accuracy:.2f} %, p95 {suggestion.latency_ms_p95:.1f} ms)"
        )
    elif budget_ms:
        fastest = min(rows, key=lambda row: row.latency_ms_p95)
        lines.append(
            f"nothing stays within {budget_ms:g} ms here; the fastest setting has p95 {fastest.latency_ms_p95:.1f} ms"
        )
    return "\n".join(lines)
