# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""An evaluation as `report.json` and one self-contained `report.html` with tables and plots."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clustvit_ros.measure.pictures import new_figure
from clustvit_ros.networks.architectures import without_merging
from clustvit_ros.networks.model_folder import ModelConfig
from clustvit_ros.networks.vit_config import ViTConfig

_MERGED_POINT = 0.6
_COLUMNS = (
    ("model", "model", ""), ("miou", "mIoU %", ".2f"), ("boundary_iou", "boundary IoU %", ".2f"),
    ("pixel_accuracy", "pixel accuracy %", ".2f"), ("ece", "calibration error", ".3f"),
    ("tokens_kept_mean", "tokens kept", ".0f"),
    ("tokens_merged_mean", "merged", ".1%"), ("gflops_mean", "GFLOPs", ".2f"), ("latency_ms_p50", "p50 ms", ".1f"),
    ("latency_ms_p95", "p95 ms", ".1f"),
)  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .8em; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, th:first-child { text-align: left } img { max-width: 100% }
"""


def compare_twins(results: Sequence[dict[str, Any]], configs: Sequence[ModelConfig]) -> list[dict[str, Any]]:
    """What merging costs a ClustViT against its plain ViT twin, where both were evaluated.

    Twins are networks that differ in nothing but merging. Points that were not reached are left out.

    Args:
        results: scores of the models, with `sweep` where there is one.
        configs: configurations of the models.

    Returns:
        For each pair and point: `model`, `twin`, `point`, `miou`, `twin_miou`, `lost` (mIoU points), the setting, and
        `text` for people. Points: the model's own setting; the fewest tokens merged that are at least 60 %; the best
        setting with at most half of the twin's GFLOPs.
    """
    comparisons = []
    for result, config in zip(results, configs, strict=True):
        for twin, twin_config in zip(results, configs, strict=True):
            if not _are_twins(config, twin_config):
                continue
            for point, miou, setting in _points(result, twin):
                lost = twin["miou"] - miou
                text = (
                    f"{result['model']} {point}: mIoU {miou:.2f}, plain ViT ({twin['model']}) {twin['miou']:.2f}, "
                    f"{abs(lost):.2f} {'lost' if lost >= 0 else 'gained'} ({setting})"
                )
                comparisons.append(
                    {
                        "model": result["model"], "twin": twin["model"], "point": point, "miou": miou,
                        "twin_miou": twin["miou"], "lost": round(lost, 3), "setting": setting, "text": text,
                    }
                )  # fmt: skip
    return comparisons


def _are_twins(config: ModelConfig, other: ModelConfig) -> bool:
    """Whether `other` is the plain ViT of a ClustViT; what it says about clusters does not matter."""
    network, plain = config.network, other.network
    if not (isinstance(network, ViTConfig) and isinstance(plain, ViTConfig)):
        return False
    if network.backbone == "vit" or plain.backbone != "vit" or plain.merges:
        return False
    return without_merging(plain) == without_merging(network)


def _points(result: dict[str, Any], twin: dict[str, Any]) -> list[tuple[str, float, str]]:
    merged = f"{100 * result['tokens_merged_mean']:.0f} % merged"
    points = [("as evaluated", result["miou"], f"{merged}, {result['gflops_mean']:.1f} GFLOPs")]
    rows = result.get("sweep", [])
    enough = [row for row in rows if _merged(row) >= _MERGED_POINT]
    halved = [row for row in rows if row["gflops_mean"] <= twin["gflops_mean"] / 2]
    if enough:
        row = max(enough, key=lambda row: (row["tokens_kept_mean"], row["accuracy"]))
        points.append((f"at {100 * _MERGED_POINT:.0f} % merged", row["accuracy"], _setting(row)))
    if halved:
        row = max(halved, key=lambda row: row["accuracy"])
        points.append(("at half the GFLOPs", row["accuracy"], _setting(row)))
    return points


def _merged(row: dict[str, Any]) -> float:
    """Share of its own tokens that a setting merges."""
    return 1 - row["tokens_kept_mean"] / row["tokens_total"]


def _setting(row: dict[str, Any]) -> str:
    capacity = f", token_capacity {row['token_capacity']}" if row["token_capacity"] else ""
    merged, threshold = 100 * _merged(row), row["merge_threshold"]
    return f"merge_threshold {threshold:g}{capacity}: {merged:.0f} % merged, {row['gflops_mean']:.1f} GFLOPs"


def write_report(
    folder: Path, data: str, results: Sequence[dict[str, Any]], configs: Sequence[ModelConfig],
    comparisons: Sequence[dict[str, Any]], pictures: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Write `report.json` and `report.html`.

    Args:
        folder: made if it does not exist.
        data: what was evaluated on, for people.
        results: scores of the models, with details.
        configs: configurations of the models.
        comparisons: what `compare_twins` gave.
        pictures: JPEGs to show.

    Returns:
        The HTML file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"data": data, "models": list(results), "comparisons": list(comparisons)}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    parts = [f"<h1>Evaluation on {html.escape(data)}</h1>", _scores_table(results)]
    if comparisons:
        parts.append("<h2>Against the plain ViT twin</h2>")
        parts += [f"<p>{html.escape(comparison['text'])}</p>" for comparison in comparisons]
    if any(len(result.get("sweep", [])) > 1 for result in results):
        parts.append("<h2>Merge settings</h2>" + _embedded(_plot_sweeps(results)))
    parts.append("<h2>Classes</h2>" + _embedded(_plot_classes(results)) + _class_table(results))
    parts.append("<h2>Images</h2>" + _embedded(_plot_images(results)))
    parts.append("<h2>Confusion</h2><p>Rows: truth. Columns: prediction. Percent of the row's pixels.</p>")
    for result, config in zip(results, configs, strict=True):
        parts.append(f"<h3>{html.escape(result['model'])}</h3>" + _embedded(_plot_confusion(result, config)))
    if pictures:
        parts.append("<h2>Pictures</h2>")
        for path in pictures:
            encoded = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<p>{html.escape(path.stem)}<br><img src="data:image/jpeg;base64,{encoded}"></p>')
    body = "\n".join(parts)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{_STYLE}</style>{body}'
    )
    path = folder / "report.html"
    path.write_text(page + "</html>\n", encoding="utf-8")
    return path


def _scores_table(results: Sequence[dict[str, Any]]) -> str:
    rows = [[format(result[key], form) for key, _, form in _COLUMNS] for result in results]
    return _table([title for _, title, _ in _COLUMNS], rows)


def _class_table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for name in results[0]["per_class_iou"]:
        row = [name]
        for result in results:
            for key in ("per_class_iou", "per_class_boundary_iou"):
                value = result[key].get(name)
                row.append("-" if value is None else f"{value:.1f}")
        rows.append(row)
    titles = [f"{result['model']} {kind}" for result in results for kind in ("IoU", "boundary IoU")]
    return _table(["class", *titles], rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _plot_sweeps(results: Sequence[dict[str, Any]]):
    figure, axes = new_figure((16.5, 4.0), columns=3)
    for index, result in enumerate(results):
        rows = result.get("sweep", [])
        for kind, marker in (("threshold", "o"), ("capacity", "s")):
            chosen = [row for row in rows if bool(row["token_capacity"]) == (kind == "capacity")]
            if not chosen:
                continue
            chosen.sort(key=lambda row: row["tokens_kept_mean"])
            accuracies = [row["accuracy"] for row in chosen]
            label = result["model"] if len(rows) == 1 else f"{result['model']}, {kind}"
            for axis, values in zip(
                axes[0],
                (
                    [row["gflops_mean"] for row in chosen],
                    [row["latency_ms_p50"] for row in chosen],
                    [100 * _merged(row) for row in chosen],
                ),
                strict=True,
            ):
                axis.plot(values, accuracies, marker=marker, ms=4, lw=1, label=label, color=f"C{2 * index % 10}"
                          if kind == "threshold" else f"C{(2 * index + 1) % 10}")  # fmt: skip
    for axis, title in zip(axes[0], ("GFLOPs", "latency p50 (ms)", "tokens merged (%)"), strict=True):
        axis.set_xlabel(title)
        axis.set_ylabel("mIoU (%)")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    return figure


def _plot_classes(results: Sequence[dict[str, Any]]):
    names = list(results[0]["per_class_iou"])
    figure, axes = new_figure((max(8.0, 0.25 * len(names) * len(results)), 4.0))
    width = 0.8 / len(results)
    for index, result in enumerate(results):
        values = [result["per_class_iou"].get(name) or 0.0 for name in names]
        places = np.arange(len(names)) + (index - (len(results) - 1) / 2) * width
        axes[0, 0].bar(places, values, width, label=f"{result['model']} ({result['miou']:.1f})")
    axes[0, 0].set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes[0, 0].set_ylabel("IoU (%)")
    axes[0, 0].grid(alpha=0.3, axis="y")
    axes[0, 0].legend(fontsize=8)
    return figure


def _plot_images(results: Sequence[dict[str, Any]]):
    figure, axes = new_figure((16.5, 3.5), columns=3)
    for axis, key, title in zip(
        axes[0], ("miou", "tokens_kept", "latency_ms"), ("mIoU (%)", "tokens kept", "latency (ms)"), strict=True
    ):
        for result in results:
            values = [record[key] for record in result["per_image"] if record[key] is not None]
            axis.hist(values, bins=20, histtype="step", label=result["model"])
        axis.set_xlabel(f"{title}, per image")
        axis.set_ylabel("images")
    axes[0, 0].legend(fontsize=8)
    return figure


def _plot_confusion(result: dict[str, Any], config: ModelConfig):
    names = config.classes.names
    counts = np.asarray(result["confusion"], float)
    if not counts[:, -1].any():
        counts = counts[:, :-1]
    shares = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(max(4.0, 0.45 * len(names)), 24.0)
    figure, axes = new_figure((1.2 * side, side))
    shown = axes[0, 0].imshow(shares, cmap="Blues", vmin=0, vmax=100)
    titles = [*names, "unlabelled"][: shares.shape[1]]
    axes[0, 0].set_xticks(range(len(titles)), titles, rotation=60, ha="right", fontsize=7)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 30:
        for row, column in np.argwhere(shares >= 0.5):
            colour = "white" if shares[row, column] > 50 else "black"
            axes[0, 0].text(
                column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=6, color=colour
            )
    figure.colorbar(shown, ax=axes[0, 0], shrink=0.7)
    return figure


def _embedded(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
