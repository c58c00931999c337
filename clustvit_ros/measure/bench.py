# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Timing networks fairly: one pipeline for all, interleaved, so that whatever drifts on the machine hits all alike.

What is timed is what a node runs for a frame: camera image in (uint8, in host memory), mask out (in host memory),
without confidence.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import math
import multiprocessing
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from clustvit_ros.engine import create_engine
from clustvit_ros.engine.engine import Settings, Stats
from clustvit_ros.engine.machine import machine_name
from clustvit_ros.engine.network_engine import NetworkEngine
from clustvit_ros.engine.onnx_engine import OnnxEngine
from clustvit_ros.errors import ConfigError
from clustvit_ros.measure.flops import count_cost
from clustvit_ros.measure.pictures import new_figure, save_figure
from clustvit_ros.networks.model_folder import load_config
from clustvit_ros.policy import percentile

K = TypeVar("K")
T = TypeVar("T")

ROW_KEYS = (
    "arch", "engine", "execution_providers", "device", "precision", "threads", "size", "batch", "classes",
    "tokens_total", "tokens_kept", "p50_ms", "p95_ms", "p99_ms", "gflops", "parameters", "peak_memory_mb", "stages_ms",
)  # fmt: skip
"""The keys of a result, in order."""


_ALL_BUT_CERTAIN = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class BenchCase:
    """One network in one configuration.

    Args:
        arch: what results call it.
        model: its model folder.
        engine, device, threads, precision, compiled: as `create_engine` takes them.
        size: (height, width) of the images, which are of the aspect of the model's input.
        batch: images per call.
        token_capacity: tokens kept; 0 is all.
        execution_provider: name of ONNX Runtime's provider; empty is the device's own.
        cache_dir: folder of exported files; None is the user's cache.
        input_scale: share of the sides of the model's input at which the network sees them.
    """

    arch: str
    model: Path
    engine: str
    device: str
    threads: int
    size: tuple[int, int]
    batch: int = 1
    token_capacity: int = 0
    execution_provider: str = ""
    cache_dir: Path | None = None
    precision: str = "float32"
    compiled: bool = False
    input_scale: float = 1.0

    def open(self) -> NetworkEngine:
        """The engine, ready to run.

        Raises:
            ModelError, ConfigError, EngineError: as `create_engine`, or an engine that runs no network.
        """
        if self.engine == "onnxruntime":
            return OnnxEngine(
                self.model, self.device, self.threads, self.execution_provider, self.cache_dir, self.precision
            )
        engine = create_engine(str(self.model), self.engine, self.device, self.threads, self.precision, self.compiled)
        if not isinstance(engine, NetworkEngine):
            raise ConfigError(f"bench: engine {self.engine!r} runs no network, so there is nothing to measure")
        return engine


class Pipeline:
    """A case with its engine and images, ready to be called again and again."""

    def __init__(self, case: BenchCase, engine: NetworkEngine) -> None:
        self.case, self.engine = case, engine
        # As in a node the kept tokens are counted and the count is read back; it is the capacity that decides.
        self._settings = Settings(
            merge_threshold=_ALL_BUT_CERTAIN, token_capacity=case.token_capacity, confidence=False,
            input_scale=case.input_scale,
        )  # fmt: skip
        self._images = np.random.default_rng(0).integers(0, 256, (case.batch, *case.size, 3), np.uint8)

    def __call__(self) -> Stats:
        """Segment the images once; their masks have arrived in host memory on return."""
        return self.engine.segment(self._images, self._settings).stats


def time_in_turns(calls: Mapping[K, Callable[[], T]], runs: int, warmup: int = 1) -> dict[K, list[tuple[float, T]]]:
    """Time calls in turns (A B A B), so that a busy moment falls on all alike.

    Args:
        calls: what is called, by a name for each.
        runs: timed calls of each.
        warmup: calls of each before them, at least one.

    Returns:
        By the same names, milliseconds and result of every timed call.
    """
    for call in calls.values():
        for _ in range(max(warmup, 1)):
            call()
    timed: dict[K, list[tuple[float, T]]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            start_s = time.perf_counter()
            result = call()
            timed[name].append(((time.perf_counter() - start_s) * 1000.0, result))
    return timed


def median_times(calls: Mapping[K, Callable[[], object]], runs: int) -> dict[K, float]:
    """Median milliseconds of calls that are timed in turns, by the same names."""
    return {name: statistics.median(ms for ms, _ in timed) for name, timed in time_in_turns(calls, runs).items()}


def run_cases(cases: list[BenchCase], runs: int, warmup: int) -> list[dict[str, Any]]:
    """Measure cases side by side.

    Args:
        cases: measured in turns, one call each: A B A B.
        runs: timed calls of each case.
        warmup: calls of each case before them.

    Returns:
        A row per case, in their order, with `ROW_KEYS`: milliseconds; `gflops` (1e9 operations, two per multiply-add)
        of one call; `peak_memory_mb` (1e6 bytes) that a fresh process takes for the model and its calls.

    Raises:
        ModelError, ConfigError, EngineError: a case cannot be run.
    """
    engines: dict[tuple, NetworkEngine] = {}
    pipelines = []
    for case in cases:
        # Cases that differ in their capacity alone share an engine.
        key = (case.model, case.engine, case.execution_provider, case.precision, case.compiled)
        if key not in engines:
            engines[key] = case.open()
        pipelines.append(Pipeline(case, engines[key]))
    timed = time_in_turns(dict(enumerate(pipelines)), runs, warmup)
    return [
        _row(pipeline, [stats for _, stats in timed[index]], [ms for ms, _ in timed[index]])
        for index, pipeline in enumerate(pipelines)
    ]


def _row(pipeline: Pipeline, samples: Sequence[Stats], times_ms: list[float]) -> dict[str, Any]:
    case, info, stats = pipeline.case, pipeline.engine.info, samples[-1]
    config = load_config(case.model)
    size, kept = stats.input_size, stats.token_capacity
    cost = count_cost(config.network, len(config.classes), size, case.batch, kept)
    stages_ms = {
        stage: round(statistics.median(each.stages_ms[stage] for each in samples), 4) for stage in stats.stages_ms
    }
    p50_ms, p95_ms, p99_ms = (round(percentile(times_ms, share), 3) for share in (0.5, 0.95, 0.99))
    # What ran, not what was asked for: graphs fall back to eager frames where they cannot be captured.
    engine = f"{info.engine}:{case.execution_provider}" if case.execution_provider else info.engine
    values = (
        case.arch, f"{engine}:compiled" if case.compiled else engine, info.execution_providers, info.device,
        info.precision, torch.get_num_threads(), f"{size[0]}x{size[1]}", case.batch, len(config.classes),
        stats.tokens_total, kept, p50_ms, p95_ms, p99_ms, round(cost.flops / 1e9, 3), cost.parameters,
        round(_peak_memory_mb(case), 1), stages_ms,
    )  # fmt: skip
    return dict(zip(ROW_KEYS, values, strict=True))


def _peak_memory_mb(case: BenchCase) -> float:
    """Peak memory of a case in 1e6 bytes, measured in a process of its own.

    In this one, memory that another network has freed would be taken again unseen.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(_measure_peak_memory_mb, case).result()


def _measure_peak_memory_mb(case: BenchCase) -> float:
    resident_before = _status_bytes("VmRSS")
    engine = case.open()
    pipeline = Pipeline(case, engine)
    device = engine.device
    free_before = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    for _ in range(2):
        pipeline()
    if device.type == "cpu":
        return (_status_bytes("VmHWM") - resident_before) / 1e6
    if case.engine == "onnxruntime":
        # Its allocator is not PyTorch's: what the device has less than before it ran.
        return (free_before - torch.cuda.mem_get_info(device)[0]) / 1e6
    return torch.cuda.max_memory_allocated(device) / 1e6


def _status_bytes(name: str) -> int:
    """A memory figure of this process; unlike getrusage's, its peak starts with the process and not its parent."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"bench: /proc/self/status has no {name}; memory can be measured on Linux only")


# In the order of time; each engine has those that it can tell apart.
_STAGES = ("preprocess", "network", "encode", "finish", "decode", "postprocess")


def format_table(rows: Sequence[dict[str, Any]], bounds_ms: Sequence[float] | None = None) -> str:
    """Rows as Markdown tables of at most 120 columns: latencies, costs, stages.

    Args:
        rows: as `run_cases` returns them.
        bounds_ms: per row the time that the device would allow, shown beside the measured one.
    """
    measured = {stage for row in rows for stage in row["stages_ms"]}
    stages = sorted(measured, key=lambda stage: (_STAGES.index(stage) if stage in _STAGES else len(_STAGES), stage))
    latency = [["arch", "engine", "precision", "size", "kept", "p50 ms", "p95 ms", "p99 ms", "vs first"]]
    cost = [["arch", "kept", "GFLOPs", "M params", "peak MB", *(["roofline ms", "x roofline"] if bounds_ms else [])]]
    parts = [["arch", "kept", *stages]]
    for index, row in enumerate(rows):
        kept = f"{row['tokens_kept']}/{row['tokens_total']}"
        latency.append([
            row["arch"], row["engine"], row["precision"], row["size"], kept,
            *(f"{row[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms")),
            f"{rows[0]['p50_ms'] / row['p50_ms']:.2f}x",
        ])  # fmt: skip
        roofline = [f"{bounds_ms[index]:.1f}", f"{row['p50_ms'] / bounds_ms[index]:.2f}"] if bounds_ms else []
        megabytes = f"{row['peak_memory_mb']:.0f}"
        cost.append(
            [row["arch"], kept, f"{row['gflops']:.1f}", f"{row['parameters'] / 1e6:.1f}", megabytes, *roofline]
        )
        times = [f"{row['stages_ms'][stage]:.1f}" if stage in row["stages_ms"] else "-" for stage in stages]
        parts.append([row["arch"], kept, *times])
    first = rows[0]
    title = f"{first['device']}, batch {first['batch']}, {first['classes']} classes"
    tables = (title, latency), ("cost", cost), ("milliseconds by stage, of the median call", parts)
    return "\n\n".join("\n".join([name, "", *markdown_table(lines)]) for name, lines in tables)


def draw_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw latency against kept tokens: a curve per network that merges, a level line per network that does not.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, ((axes,),) = new_figure((7, 4.5))
    names = ("arch", "engine", "precision", "size")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        points = sorted(
            (row["tokens_kept"], row["p50_ms"]) for row in rows if tuple(row[name] for name in names) == key
        )
        label = f"{key[0]} ({', '.join(key[1:])})"
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
    save_figure(figure, path)


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


def markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table as lines of text, columns aligned.

    Args:
        lines: cells of each row, the titles first.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled]
