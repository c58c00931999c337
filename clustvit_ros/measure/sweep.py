# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Sweeps over operating points and merge thresholds: what each costs in milliseconds, and what in accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from clustvit_ros.engine.engine import Engine, Settings
from clustvit_ros.engine.ladder import INPUT_SCALES, default_ladder, scaled_size
from clustvit_ros.measure.evaluation import GflopsCounter
from clustvit_ros.measure.metrics import ConfusionMatrix
from clustvit_ros.measure.pictures import new_figure, save_figure
from clustvit_ros.networks.model_folder import MeasuredPoint, ModelConfig
from clustvit_ros.networks.vit import grid_size_of
from clustvit_ros.policy import percentile

_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SHARES = (0.125, 0.25, 0.5, 1.0)


class Rung(NamedTuple):
    """An operating point that images of any size have.

    Attributes:
        input_scale: share of the sides of the full input.
        share: of that size's tokens that may be kept.
    """

    input_scale: float
    share: float

    def settings(self, engine: Engine, image_size: tuple[int, int]) -> Settings:
        """The call for images of (height, width) `image_size`."""
        ladder = engine.capacities(image_size, self.input_scale)
        capacity = ladder[max(round(len(ladder) * self.share) - 1, 0)]
        return Settings(1.0, capacity, confidence=False, input_scale=self.input_scale)


@dataclass(frozen=True)
class SweepRow:
    """One setting, measured.

    Args:
        merge_threshold, token_capacity, input_scale: the setting.
        accuracy: percent; mIoU against labels, else agreement with the full result.
        latency_ms_p50, latency_ms_p95: milliseconds of an engine call.
        tokens_kept_mean: per image.
        input_size: (height, width) at which the network saw the last image.
        tokens_total: tokens of that size.
        agreement: share of pixels that equal the full network's (full size, unmerged), 0..1.
        pareto: no other setting is both faster (p50) and at least as accurate.
        gflops_mean: per image, where they were counted.
    """

    merge_threshold: float
    token_capacity: int
    accuracy: float
    latency_ms_p50: float
    latency_ms_p95: float
    tokens_kept_mean: float
    input_scale: float = 1.0
    input_size: tuple[int, int] = (0, 0)
    tokens_total: int = 0
    agreement: float = 1.0
    pareto: bool = False
    gflops_mean: float | None = None

    def told(self, merges: bool) -> str:
        """The setting in words.

        Args:
            merges: whether the network merges tokens; else it is the size alone.
        """
        words = {"merge_threshold": self.merge_threshold, "token_capacity": self.token_capacity} if merges else {}
        if self.token_capacity in (0, self.tokens_total):
            words.pop("token_capacity", None)
        if self.input_scale != 1.0 or not merges:
            words["input_scale"] = self.input_scale
        return ", ".join(f"{name} {value:g}" for name, value in words.items())


class _Tally:
    """What one setting showed so far."""

    def __init__(self, num_classes: int) -> None:
        self.matrix = ConfusionMatrix(num_classes)
        self.agreements: list[float] = []
        self.latencies_ms: list[float] = []
        self.kept: list[float] = []
        self.gflops: list[float] = []
        self.input_size, self.tokens_total = (0, 0), 0
        self.setting = Settings()

    def row(self, labelled: bool) -> SweepRow:
        """Everything in figures; setting, size and tokens are those of the last image."""
        setting = self.setting
        agreement = statistics.fmean(self.agreements)
        return SweepRow(
            setting.merge_threshold, setting.token_capacity,
            accuracy=round(100 * (self.matrix.miou() if labelled else agreement), 3),
            latency_ms_p50=round(statistics.median(self.latencies_ms), 3),
            latency_ms_p95=round(percentile(self.latencies_ms, 0.95), 3),
            tokens_kept_mean=round(statistics.fmean(self.kept), 1), input_scale=setting.input_scale,
            input_size=self.input_size, tokens_total=self.tokens_total, agreement=round(agreement, 5),
            gflops_mean=round(statistics.fmean(self.gflops), 3) if self.gflops else None,
        )  # fmt: skip


def sweep(
    engine: Engine, images: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None,
    settings: Sequence[Settings | Rung],
    count_gflops: GflopsCounter | None = None,
) -> list[SweepRow]:  # fmt: skip
    """Measure every setting on every image.

    Settings take turns on each image, so that a machine that slows down meanwhile slows all of them.

    Args:
        engine: warmed up inside, at every size.
        images: (H, W, 3) uint8 RGB.
        labels: (H, W) class ids for each image; None compares with the engine's own full result.
        settings: what to compare.
        count_gflops: counts operations; None leaves them out.

    Returns:
        One row per setting, in the same order, the Pareto front marked.
    """
    tallies = [_Tally(len(engine.info.classes)) for _ in settings]
    full = Settings(merge_threshold=1.0, confidence=False)
    for size in {image.shape[:2] for image in images}:
        engine.warmup((size[0], size[1]))
        for setting in settings:
            engine.segment(np.zeros((*size, 3), np.uint8), _call(setting, engine, size))
    for index in tqdm(range(len(images)), desc="sweep", leave=False, mininterval=1.0):
        image = images[index]
        reference = engine.segment(image, full).mask[0]
        for tally, setting in zip(tallies, settings, strict=True):
            tally.setting = _call(setting, engine, image.shape[:2])
            prediction = engine.segment(image, tally.setting)
            stats = prediction.stats
            tally.latencies_ms.append(stats.total_ms)
            tally.kept.append(stats.tokens_kept)
            tally.input_size, tally.tokens_total = stats.input_size, stats.tokens_total
            tally.agreements.append(float((prediction.mask[0] == reference).mean()))
            if count_gflops:
                tally.gflops.append(count_gflops(stats.input_size, stats.token_capacity))
            if labels is not None:
                tally.matrix.add(labels[index], prediction.mask[0])
    rows = [tally.row(labels is not None) for tally in tallies]
    return [replace(row, pareto=_on_front(row, rows)) for row in rows]


def _call(setting: Settings | Rung, engine: Engine, image_size: tuple[int, ...]) -> Settings:
    if isinstance(setting, Settings):
        return setting
    return setting.settings(engine, (image_size[0], image_size[1]))


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
    """Merging alone: thresholds from 0.1 to 1, and every rung of the capacity ladder below all tokens."""
    by_threshold = [Settings(threshold, confidence=False) for threshold in _THRESHOLDS]
    by_capacity = [Settings(1.0, capacity, confidence=False) for capacity in default_ladder(tokens_total)[:-1]]
    return by_threshold + by_capacity


def ladder_rungs(config: ModelConfig) -> list[Rung]:
    """Operating points: every size of the ladder, with an eighth, a quarter, half and all of its tokens.

    Sizes that are one for the model's own input are left out but for the largest scale.
    """
    patch_size = config.network.patch_size
    scales = {scaled_size(config.input.size, scale, patch_size): scale for scale in INPUT_SCALES}
    shares = _SHARES if config.network.merges else (1.0,)
    return [Rung(scale, share) for scale in sorted(scales.values(), reverse=True) for share in shares]


def measured_points(rungs: Sequence[Rung], rows: Sequence[SweepRow], config: ModelConfig) -> tuple[MeasuredPoint, ...]:
    """What `model.yaml` keeps of a sweep on labels: sizes and capacities of the model's own input.

    Args:
        rungs: what was measured, whatever the images' sizes.
        rows: what came of each.
        config: the model.
    """
    points: dict[tuple[tuple[int, int], int], MeasuredPoint] = {}
    method = getattr(config.network, "merge_method", "")
    for rung, row in zip(rungs, rows, strict=True):
        patch_size = config.network.patch_size
        size = scaled_size(config.input.size, rung.input_scale, patch_size)
        grid_rows, columns = grid_size_of(size, patch_size)
        capacity = max(round(grid_rows * columns * rung.share), 1)
        points[size, capacity] = MeasuredPoint(size, capacity, row.accuracy, row.agreement, method)
    return tuple(points.values())


def draw_sweep(
    rows: Sequence[SweepRow], current: SweepRow, suggestion: SweepRow | None, budget_ms: float | None, measure: str,
    title: str, path: Path,
) -> None:  # fmt: skip
    """Draw accuracy against latency as PNG (or whatever the path's suffix says), a line for each input size."""
    figure, ((axes,),) = new_figure((9, 6))
    by_threshold = [row for row in rows if row.token_capacity == 0]
    axes.scatter(
        [r.latency_ms_p50 for r in by_threshold], [r.accuracy for r in by_threshold], marker="x", s=22, color="0.45",
        label="merge_threshold, full size",
    )  # fmt: skip
    for scale in sorted({row.input_scale for row in rows if row.token_capacity}, reverse=True):
        of_size = sorted(
            (row for row in rows if row.token_capacity and row.input_scale == scale), key=lambda r: r.token_capacity
        )
        size = "{}x{}".format(*of_size[0].input_size)
        axes.plot(
            [r.latency_ms_p50 for r in of_size], [r.accuracy for r in of_size], "o-", ms=4, lw=0.8, alpha=0.8,
            label=f"input {scale:g}: {size}",
        )  # fmt: skip
        for row in (of_size[0], of_size[-1]):
            axes.annotate(
                f"{row.token_capacity}", (row.latency_ms_p50, row.accuracy), (3, -9), textcoords="offset points",
                fontsize=7,
            )  # fmt: skip
    front = sorted((row for row in rows if row.pareto), key=lambda row: row.latency_ms_p50)
    axes.plot(
        [r.latency_ms_p50 for r in front], [r.accuracy for r in front], "-", lw=4, alpha=0.25, color="black",
        label="Pareto front", zorder=0,
    )  # fmt: skip
    axes.plot(current.latency_ms_p50, current.accuracy, "*", ms=15, mfc="none", mec="black", label="current setting")
    if suggestion:
        axes.plot(suggestion.latency_ms_p50, suggestion.accuracy, "D", ms=11, mfc="none", mec="red", label="suggested")
    if budget_ms:
        axes.axvline(budget_ms, ls="--", lw=1, color="red", label=f"budget {budget_ms:g} ms")
    axes.set_xlabel("latency p50 (ms)")
    axes.set_ylabel(f"{measure} (%)")
    axes.set_title(f"{title}; small figures: tokens kept", fontsize=9)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def sweep_table(rows: Sequence[SweepRow], measure: str, suggestion: SweepRow | None, budget_ms: float | None) -> str:
    """The rows as text, and what is suggested for a budget in milliseconds (p95), where there is one."""
    lines = [
        f"{'input':>9} {'threshold':>9} {'capacity':>8} {'kept':>7} {'p50 ms':>8} {'p95 ms':>8} {'accuracy %':>10} "
        f"{'equal %':>8}   ({measure}; equal: pixels as the full network's)"
    ]
    for row in rows:
        front = "  Pareto" if row.pareto else ""
        size = "{}x{}".format(*row.input_size)
        lines.append(
            f"{size:>9} {row.merge_threshold:9.2f} {row.token_capacity or '-':>8} {row.tokens_kept_mean:7.0f} "
            f"{row.latency_ms_p50:8.1f} {row.latency_ms_p95:8.1f} {row.accuracy:10.2f} {100 * row.agreement:8.2f}"
            f"{front}"
        )
    merges = any(row.tokens_kept_mean < row.tokens_total for row in rows)
    if budget_ms and suggestion:
        lines.append(
            f"within {budget_ms:g} ms: {suggestion.told(merges)} "
            f"({suggestion.accuracy:.2f} %, p95 {suggestion.latency_ms_p95:.1f} ms)"
        )
    elif budget_ms:
        fastest = min(rows, key=lambda row: row.latency_ms_p95)
        lines.append(
            f"nothing stays within {budget_ms:g} ms here; the fastest setting has p95 {fastest.latency_ms_p95:.1f} ms"
        )
    return "\n".join(lines)
