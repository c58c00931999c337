# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Which engine and precision `auto` is on this CPU: measured by a command, looked up whenever an engine is made.

CPUs differ too much for a rule: bfloat16 takes half of float32's time with AMX, three quarters on a Zen 4, and one and
a half times as much on a Xeon that has AVX-512's instructions for it. A node does not measure by itself: another engine
beside its own takes memory and time, and a machine that segments frames is not one to measure on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from clustvit_ros import __version__
from clustvit_ros.engine.engine import Engine
from clustvit_ros.engine.machine import machine_name, others_seconds, power_mode, usable_cores
from clustvit_ros.errors import ClustvitError
from clustvit_ros.networks.model_folder import hash_model, hash_weights, load_config
from clustvit_ros.paths import replacing, user_cache_dir

CANDIDATES = (("torch", "float32"), ("torch", "bfloat16"), ("torch", "int8"), ("onnxruntime", "float32"))
"""Engine and precision; the first is what `auto` is where nothing was measured, and what all are compared with."""

LEAST_EQUAL = 0.995
"""Share of the pixels that must be the same as in float32."""

# What takes more than this share of the first one's time is not worth it. ONNX Runtime must gain more: its threads do
# not give way to other processes, nor take part in a budget.
_MOST_TIME = {"torch": 0.97, "onnxruntime": 0.9}
# Cores that others may use on average while a measurement is made that is kept.
_UNDISTURBED_CORES = 0.25
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineRow:
    """One engine in one precision.

    Args:
        engine: e.g. "torch".
        precision: e.g. "bfloat16".
        latency_ms: median of a frame.
        share: median of its latency's ratio to that of the first candidate on the same image.
        equal: share of pixels that are the same as the first candidate's, 0..1.
    """

    engine: str
    precision: str
    latency_ms: float
    share: float
    equal: float


def measure(
    make: Callable[[str, str], Engine], images: Sequence[np.ndarray],
    others_s: Callable[[], float | None] = others_seconds,
) -> tuple[list[EngineRow], dict[str, str], float]:  # fmt: skip
    """Run every candidate on every image, in turns.

    Args:
        make: makes the engine of a name and precision.
        images: (H, W, 3) uint8 RGB, of one size.
        others_s: seconds that other processes have computed.

    Returns:
        A row of each, why others cannot run here, and the cores that other processes used meanwhile.

    Raises:
        ClustvitError: the first candidate cannot run.
    """
    engines: list[Engine] = []
    problems: dict[str, str] = {}
    for engine, precision in CANDIDATES:
        try:
            engines.append(make(engine, precision))
        except ClustvitError as error:
            if not engines:
                raise
            problems[f"{engine} in {precision}"] = str(error)
    for each in engines:
        each.warmup((images[0].shape[0], images[0].shape[1]))
        each.segment(images[0])
    started_s, before_s = time.monotonic(), others_s()
    times_ms: list[list[float]] = [[] for _ in engines]
    equal: list[list[float]] = [[] for _ in engines]
    for image in images:
        results = [each.segment(image) for each in engines]
        for result, times, same in zip(results, times_ms, equal, strict=True):
            times.append(result.stats.total_ms)
            same.append(float((result.mask == results[0].mask).mean()))
    after_s = others_s()
    known = before_s is not None and after_s is not None
    cores = max(after_s - before_s, 0.0) / (time.monotonic() - started_s) if known else 0.0  # type: ignore[operator]
    rows = [
        EngineRow(
            each.info.engine, each.info.precision, round(statistics.median(times), 2),
            round(statistics.median(ms / first for ms, first in zip(times, times_ms[0], strict=True)), 3),
            round(statistics.fmean(same), 5),
        )
        for each, times, same in zip(engines, times_ms, equal, strict=True)
    ]  # fmt: skip
    for each in engines:
        each.close()
    return rows, problems, cores


def fastest(rows: Sequence[EngineRow], engine: str = "auto", precision: str = "auto") -> EngineRow | None:
    """The fastest row that keeps its pixels; None where the first candidate is as good, or nothing was measured.

    Args:
        rows: as measured.
        engine: "auto", or the one that it must be.
        precision: likewise.
    """
    fit = [
        row for row in rows
        if engine in ("auto", row.engine) and precision in ("auto", row.precision)
        and row.equal >= LEAST_EQUAL and row.share <= _MOST_TIME.get(row.engine, 0.0)
    ]  # fmt: skip
    return min(fit, key=lambda row: row.share, default=None)


def is_disturbed(cores: float) -> bool:
    """Whether others used so many cores while it was measured that it says nothing."""
    return cores > _UNDISTURBED_CORES


def store(model: str, threads: int, rows: Sequence[EngineRow]) -> Path:
    """Keep rows for a model on this machine; the file they are in.

    Raises:
        OSError: it cannot be written.
    """
    path = _path(model, threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as partial:
        partial.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return path


def load(model: str, threads: int) -> list[EngineRow]:
    """What was measured for a model on this machine, as it is now; empty where nothing was, or it cannot be read."""
    if not any(_folder().glob("*.json")):
        return []  # and no weights are read for it
    path = _path(model, threads)
    try:
        return [EngineRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        _LOG.warning("%s cannot be read (%s); `clustvit-ros tune --engines` measures again", path, error)
        return []


def _path(model: str, threads: int) -> Path:
    network = hash_model(load_config(model), hash_weights(model))
    facts = (network, threads, machine_name(), power_mode(), usable_cores(), torch.__version__, __version__)
    return _folder() / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def _folder() -> Path:
    return user_cache_dir() / "engines"
