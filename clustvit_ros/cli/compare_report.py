"""The page of `clustvit-ros compare`: tables, what bounds them, and how cost grows, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clustvit_ros.engine.machine import machine_name
from clustvit_ros.errors import ConfigError

_QUANTITIES = {"latency_ms": "latency (ms)", "peak_memory_mb": "peak memory (MB)", "gflops": "GFLOPs"}


def write_report(
    folder: Path,
    costs: Sequence[dict[str, Any]],
    scores: Mapping[str, dict[str, Any]],
    exponents: Mapping[str, Mapping[str, float]],
    attention_shares: Mapping[int, float],
    device: str,
) -> str:
    """Write `comparison.md` and `comparison.png`.

    Args:
        folder: exists.
        costs: rows of systems and sizes.
        scores: by system; those that were not trained are missing.
        exponents: by system and quantity.
        attention_shares: tokens to the share of a ViT-B block's operations that attention takes.
        device: for people.

    Returns:
        The page, Markdown.

    Raises:
        ConfigError: matplotlib is missing.
    """
    text = format_report(costs, scores, exponents, attention_shares, device)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    draw_growth(costs, exponents, folder / "comparison.png")
    return text


def format_report(
    costs: Sequence[dict[str, Any]],
    scores: Mapping[str, dict[str, Any]],
    exponents: Mapping[str, Mapping[str, float]],
    attention_shares: Mapping[int, float],
    device: str,
) -> str:
    """The page as Markdown; arguments as of `write_report`."""
    names = list(dict.fromkeys(row["system"] for row in costs))
    sizes = list(dict.fromkeys(row["size_px"] for row in costs))
    first = {name: next(row for row in costs if row["system"] == name) for name in names}
    header = ["system", "architecture", "M params", "tokens kept"]
    summary = [[*header, "mIoU", "pixel accuracy", "training min"]]
    for name in names:
        row, score = first[name], scores.get(name)
        found = (
            [f"{score['miou']:.1f}", f"{score['pixel_accuracy']:.1f}", f"{score['minutes']:.1f}"]
            if score
            else ["-"] * 3
        )
        summary.append([name, row["architecture"], f"{row['parameters'] / 1e6:.1f}", f"{row['kept']:.0%}", *found])
    parts = [f"{device}, {machine_name()}, PyTorch {torch.__version__}, float32, one image per call.", ""]
    parts += _table(summary)
    if scores:
        score = next(iter(scores.values()))
        height, width = score["crop"]
        unmerged = f"{score['merge_after']:.0%}"
        input_height, input_width = score["input"]
        parts += [
            "",
            f"Scores: validation images after {score['steps']} steps of {score['batch']} crops of {height}x{width} "
            f"from random weights, images at {input_height}x{input_width}, one seed; what merges tokens does so after "
            f"{unmerged} of the training, and is scored with the share kept that stands above. Such a budget says "
            "which system learns fast, not which is best in the end.",
        ]
    for quantity, title in _QUANTITIES.items():
        lines = [[title, *(f"{size} px" for size in sizes), "exponent"]]
        for name in names:
            values = {row["size_px"]: row[quantity] for row in costs if row["system"] == name}
            cells = [f"{values[size]:.1f}" if size in values else "-" for size in sizes]
            exponent = exponents.get(name, {}).get(quantity)
            lines.append([name, *cells, "-" if exponent is None else f"{exponent:.2f}"])
        parts += ["", *_table(lines)]
    parts += ["", "An exponent p is of cost ~ tokens^p, fitted over all sizes; 1 is linear, 2 quadratic.", ""]
    parts += _table(
        [["tokens", "attention's share of a ViT-B block", "no attention-only method is faster than"]]
        + [[str(n), f"{share:.0%}", f"{1 / (1 - share):.2f}x"] for n, share in attention_shares.items()]
    )
    return "\n".join(parts) + "\n"


def draw_growth(costs: Sequence[dict[str, Any]], exponents: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw latency and memory against tokens, both logarithmic.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"compare: matplotlib cannot be imported ({error}); install clustvit_ros with its 'train' extra"
        ) from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    quantities = ("latency_ms", "peak_memory_mb")
    sizes = sorted({row["tokens"] for row in costs})
    for axes, quantity in zip(figure.subplots(1, len(quantities)), quantities, strict=True):
        for name in dict.fromkeys(row["system"] for row in costs):
            points = sorted((row["tokens"], row[quantity]) for row in costs if row["system"] == name)
            exponent = exponents.get(name, {}).get(quantity)
            label = name if exponent is None else f"{name}: tokens^{exponent:.2f}"
            axes.loglog(*zip(*points, strict=True), marker="o", label=label)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("tokens (16 px patches)")
        axes.set_ylabel(_QUANTITIES[quantity])
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return rows
