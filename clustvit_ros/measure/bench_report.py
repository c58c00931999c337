"""Benchmark rows for people: a table, a plot, and file names that say what was measured."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clustvit_ros.engine.machine import machine_name
from clustvit_ros.errors import ConfigError

# In the order of time; each engine has those that it can tell apart.
_STAGES = ("preprocess", "copy_in", "network", "encode", "finish", "decode", "postprocess", "copy_out")


def format_table(rows: Sequence[dict[str, Any]], bounds_ms: Sequence[float] | None = None) -> str:
    """Rows as a Markdown table.

    Args:
        rows: as `run_cases` returns them.
        bounds_ms: per row the time that the device would allow, shown beside the measured one.
    """
    header = [
        "arch",
        "engine",
        "precision",
        "kept",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "vs first",
        "GFLOPs",
        "M params",
        "peak MB",
    ]
    measured = {stage for row in rows for stage in row["stages_ms"]}
    stages = sorted(measured, key=lambda stage: (_STAGES.index(stage) if stage in _STAGES else len(_STAGES), stage))
    lines = [header + (["roofline ms", "x roofline"] if bounds_ms else []) + stages]
    for index, row in enumerate(rows):
        cells = [
            row["arch"], row["engine"], row["precision"], f"{row['tokens_kept']}/{row['tokens_total']}",
            *(f"{row[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms")),
            f"{rows[0]['p50_ms'] / row['p50_ms']:.2f}x", f"{row['gflops']:.1f}", f"{row['parameters'] / 1e6:.1f}",
            f"{row['peak_memory_mb']:.0f}",
        ]  # fmt: skip
        if bounds_ms:
            cells += [f"{bounds_ms[index]:.1f}", f"{row['p50_ms'] / bounds_ms[index]:.2f}"]
        cells += [f"{row['stages_ms'][stage]:.1f}" if stage in row["stages_ms"] else "-" for stage in stages]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    first = rows[0]
    title = f"{first['device']}, {first['size']}, batch {first['batch']}, {first['classes']} classes"
    table = ("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
    return "\n".join([title, "", *table])


def draw_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw latency against kept tokens: a curve per network that merges, a level line per network that does not.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"plot: matplotlib cannot be imported ({error}); install clustvit_ros with its 'train' extra"
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key in dict.fromkeys((row["arch"], row["engine"], row["precision"]) for row in rows):
        points = sorted(
            (row["tokens_kept"], row["p50_ms"]) for row in rows if (row["arch"], row["engine"], row["precision"]) == key
        )
        label = f"{key[0]} ({key[1]}, {key[2]})"
        if len(points) == 1 and points[0][0] == rows[0]["tokens_total"]:
            axes.axhline(points[0][1], linestyle="--", color=axes.plot([], [])[0].get_color(), label=label)
        else:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xlabel(f"tokens kept of {rows[0]['tokens_total']}")
    axes.set_ylabel("latency p50 (ms)")
    axes.set_title(f"{rows[0]['device']}, {rows[0]['size']}, batch {rows[0]['batch']}", fontsize="medium")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def result_stem(device: torch.device) -> str:
    """Name of a result file without its suffix: device, driver, PyTorch and date."""
    parts = [_hardware_name(device)]
    if device.type == "cuda":
        parts.append(f"driver-{_driver_version()}")
    parts += [f"torch-{torch.__version__}", datetime.date.today().isoformat()]
    return "_".join(re.sub(r"[^a-z0-9.+-]+", "-", part.lower()).strip("-") for part in parts)


def _hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu-{machine_name()}-{torch.get_num_threads()}-threads"


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        # Jetsons have no nvidia-smi before JetPack 7.
        return f"cuda{torch.version.cuda}"
