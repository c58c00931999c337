"""`clustvit-ros tune`: accuracy against latency for every merge setting, as a picture and as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from clustvit_ros.engine import Engine, Settings, create_engine
from clustvit_ros.engine.ladder import default_ladder
from clustvit_ros.errors import ConfigError
from clustvit_ros.measure.sweep import SweepRow, suggest, sweep
from clustvit_ros.training.dataset import LabelledImages, find_images, read_image

_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("tune", help="what merging costs and saves on your images, drawn")
    parser.add_argument("--model", required=True, help="a shipped model's name or a model folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--labels", type=Path, help="folder of labels; without it, agreement with the unmerged result")
    parser.add_argument("--budget-ms", type=float, help="suggest a setting for this latency (p95)")
    parser.add_argument("--merge-threshold", type=float, default=0.5, help="the current setting, marked in the picture")
    parser.add_argument("--token-capacity", type=int, default=0, help="likewise (default: 0, no bound)")
    parser.add_argument("--limit", type=int, default=50, help="use so many images, evenly chosen (default: 50)")
    parser.add_argument("--engine", default="torch", help="torch or onnxruntime (default: torch)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = automatic (default: 0)")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--plot", type=Path, default=Path("tune.png"), help="the picture (default: tune.png)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.limit < 1:
        raise ConfigError(f"--limit: got {args.limit}, expected at least 1 image")
    current = Settings(args.merge_threshold, args.token_capacity, confidence=False)
    engine = create_engine(args.model, args.engine, args.device, args.threads)
    images, labels = _load(args, len(engine.info.classes))
    settings = _settings(engine, images[0])
    if current not in settings:
        settings.append(current)
    rows = sweep(engine, images, labels, settings)
    measure = "mIoU" if labels is not None else "agreement with the unmerged result"
    suggestion = suggest(rows, args.budget_ms) if args.budget_ms else None
    _print(rows, measure, suggestion, args.budget_ms)
    if args.json:
        report = {
            "model": engine.info.model, "engine": engine.info.engine, "device": engine.info.device,
            "images": len(images), "measure": measure, "budget_ms": args.budget_ms,
            "suggestion": asdict(suggestion) if suggestion else None, "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    title = f"{engine.info.model} on {engine.info.device}, {len(images)} images"
    draw(rows, rows[settings.index(current)], suggestion, args.budget_ms, measure, title, args.plot)
    print(f"picture in {args.plot}")
    return 0


def draw(
    rows: Sequence[SweepRow],
    current: SweepRow,
    suggestion: SweepRow | None,
    budget_ms: float | None,
    measure: str,
    title: str,
    path: Path,
) -> None:
    """Draw accuracy against latency as PNG (or whatever the path's suffix says)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
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
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _load(args: argparse.Namespace, num_classes: int) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    if args.labels is None:
        paths = list(find_images(args.images).values())
        return [read_image(paths[i]) for i in _evenly(len(paths), args.limit)], None
    data = LabelledImages(args.images, args.labels, num_classes)
    samples = [data[i] for i in _evenly(len(data), args.limit)]
    return [sample.image for sample in samples], [sample.labels for sample in samples]


def _evenly(count: int, limit: int) -> list[int]:
    chosen = min(count, limit)
    return [i * count // chosen for i in range(chosen)]


def _settings(engine: Engine, image: np.ndarray) -> list[Settings]:
    return ladder_settings(engine.segment(image).stats.tokens_total)


def ladder_settings(tokens_total: int) -> list[Settings]:
    """What a sweep compares: thresholds from 0.1 to 1, and every rung of the capacity ladder below all tokens."""
    by_threshold = [Settings(threshold, confidence=False) for threshold in _THRESHOLDS]
    by_capacity = [Settings(1.0, capacity, confidence=False) for capacity in default_ladder(tokens_total)[:-1]]
    return by_threshold + by_capacity


def _print(rows: Sequence[SweepRow], measure: str, suggestion: SweepRow | None, budget_ms: float | None) -> None:
    print(f"{'threshold':>9} {'capacity':>8} {'kept':>7} {'p50 ms':>8} {'p95 ms':>8} {'accuracy %':>10}   ({measure})")
    for row in rows:
        front = "  Pareto" if row.pareto else ""
        print(
            f"{row.merge_threshold:9.2f} {row.token_capacity or '-':>8} {row.tokens_kept_mean:7.0f} "
            f"{row.latency_ms_p50:8.1f} {row.latency_ms_p95:8.1f} {row.accuracy:10.2f}{front}"
        )
    if budget_ms and suggestion:
        capacity = f", token_capacity {suggestion.token_capacity}" if suggestion.token_capacity else ""
        print(
            f"within {budget_ms:g} ms: merge_threshold {suggestion.merge_threshold:g}{capacity} "
            f"({suggestion.accuracy:.2f} %, p95 {suggestion.latency_ms_p95:.1f} ms)"
        )
    elif budget_ms:
        fastest = min(rows, key=lambda row: row.latency_ms_p95)
        print(
            f"nothing stays within {budget_ms:g} ms here; the fastest setting has p95 {fastest.latency_ms_p95:.1f} ms"
        )
