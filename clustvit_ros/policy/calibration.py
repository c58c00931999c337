# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Times operating points with the real engine on this device, in steps that fit between two camera frames.

A few sizes and a few capacities at each are timed, the others interpolated. Results are kept in the user's cache folder
for the same model, engine, machine and image size, so that only the first start measures.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clustvit_ros import __version__
from clustvit_ros.engine.engine import Engine, Settings
from clustvit_ros.engine.ladder import OperatingPoint
from clustvit_ros.engine.machine import machine_name, others_seconds, power_mode
from clustvit_ros.errors import ConfigError
from clustvit_ros.paths import replacing, user_cache_dir
from clustvit_ros.policy.ledger import percentile

_ROUNDS = 5
_LIMIT_MS = 3_500.0
# Before each timed call, as between frames: they find other caches than calls in a row do. 144x192 then takes 0.10 of
# the full size's time; in a row 0.09, with 30 and 200 ms 0.10.
_PAUSE_S = 0.01
# Cores that others may use on average while a calibration is made that is kept for later starts.
_UNDISTURBED_CORES = 0.25
_FORMAT = 5
_LOG = logging.getLogger(__name__)

Tokens = tuple[int, int]
"""Tokens at some input size, and how many of them may be kept."""


class LatencyTable:
    """Calibrated latency of every operating point.

    Measured noise must not make a larger capacity look cheaper than a smaller one: each size is made to rise by pooling
    neighbours that do not (isotonic regression). Between the measured sizes, the same share of tokens is interpolated
    over the number of tokens; beyond them, the nearest counts.

    Args:
        latency_ms: CPU threads (0: the engine's own choice) -> (tokens at that size, capacity) -> milliseconds; at
            least one of each.

    Raises:
        ConfigError: no entry, or one that is not positive.
    """

    def __init__(self, latency_ms: Mapping[int, Mapping[Tokens, float]]) -> None:
        if not latency_ms or not all(latency_ms.values()):
            raise ConfigError(f"latency table: got {latency_ms}, expected at least one entry for each count of threads")
        entries = [entry for of_count in latency_ms.values() for entry in of_count.items()]
        if any(not 1 <= kept <= total or not 0.0 < ms < math.inf for (total, kept), ms in entries):
            raise ConfigError(
                f"latency table: got {latency_ms}, expected positive token counts and milliseconds, and capacities of "
                "at most all tokens"
            )
        self.measured = {threads: dict(sorted(of_count.items())) for threads, of_count in latency_ms.items()}
        self._surfaces = {threads: _Surface(of_count) for threads, of_count in self.measured.items()}

    def covers(self, points: Sequence[OperatingPoint]) -> bool:
        """Whether all of the points lie within the sizes that were measured."""
        totals = [total for total, _ in next(iter(self.measured.values()))]
        return all(totals[0] <= point.tokens_total <= totals[-1] for point in points)

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """The counts of threads that it knows."""
        return tuple(self.measured)

    def __getitem__(self, point: OperatingPoint) -> float:
        """Milliseconds at a point, with as many threads as are best."""
        return min(surface[point] for surface in self._surfaces.values())

    def at(self, point: OperatingPoint, threads: int) -> float:
        """Milliseconds at a point with a number of threads."""
        return self._surfaces[threads][point]

    def items(self) -> Iterator[tuple[int, Tokens, float]]:
        """(threads, (tokens at that size, capacity), milliseconds) of what was measured, each size made to rise."""
        for threads, surface in self._surfaces.items():
            for total, kept in self.measured[threads]:
                yield threads, (total, kept), surface[OperatingPoint(1.0, kept, total)]


class _Surface:
    """Latency over sizes and capacities, with one number of threads."""

    def __init__(self, latency_ms: Mapping[Tokens, float]) -> None:
        self._totals = sorted({total for total, _ in latency_ms})
        self._curves: list[tuple[list[float], list[float]]] = []
        for size in self._totals:
            kept_counts = sorted(kept for total, kept in latency_ms if total == size)
            rising = _rising([latency_ms[size, kept] for kept in kept_counts])
            self._curves.append(([kept / size for kept in kept_counts], rising))
        self._known = functools.lru_cache(4096)(self._between)  # asked for at every frame

    def __getitem__(self, point: OperatingPoint) -> float:
        return self._known(point.tokens_total, point.share)

    def _between(self, tokens_total: int, share: float) -> float:
        index = bisect.bisect_left(self._totals, tokens_total)
        if index == len(self._totals) or index == 0 or self._totals[index] == tokens_total:
            return self._at(min(index, len(self._totals) - 1), share)
        low, high = self._totals[index - 1 : index + 1]
        weight = (tokens_total - low) / (high - low)
        return self._at(index - 1, share) * (1.0 - weight) + self._at(index, share) * weight

    def _at(self, index: int, share: float) -> float:
        return float(np.interp(share, *self._curves[index]))


class Calibration:
    """One calibration, a step at a time.

    Every round times each point once, so that a change of load during calibration touches all of them alike. The lower
    quartile of a point's times counts: what else runs on the machine only ever adds to them. The engine must be warm
    for the image size.

    Args:
        engine: to be timed.
        image_size: (height, width) of the camera images.
        input_scales: sizes that will be used, ascending; the ends and the middle one are timed. A single one is timed
            at every capacity of its ladder, several at the smallest, the middle and the largest.
        rounds: how often each point is timed.
        limit_ms: ends earlier once the engine has spent so much; the largest and the smallest point are timed in any
            case.
        others_s: seconds that this machine's cores have computed for others; None where the system does not tell.
        clock: gives monotonic seconds.
    """

    def __init__(
        self, engine: Engine, image_size: tuple[int, int], input_scales: Sequence[float] = (1.0,),
        rounds: int = _ROUNDS, limit_ms: float = _LIMIT_MS,
        others_s: Callable[[], float | None] = others_seconds, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._engine = engine
        self.points = anchors(engine, image_size, input_scales)
        self._image = np.random.default_rng(0).integers(0, 256, (*image_size, 3), dtype=np.uint8)
        self._limit_ms = limit_ms
        # The ends first: the rest can be interpolated. Each round starts one further on, or a load that comes and goes
        # at the pace of the calls would hit the same points every time.
        counts = engine.thread_counts
        points = dict.fromkeys((self.points[-1], self.points[0], *self.points))
        order = [(point, threads) for point in points for threads in counts]
        self._plan = [p for turn in range(rounds) for p in (*order[turn % len(order) :], *order[: turn % len(order)])]
        self._least_steps = min(2, len(self.points)) * len(counts)
        # A size's first call makes what later ones find ready; the full size's was the warm-up.
        self._cold = {point.input_scale for point in self.points} - {1.0}
        self._samples: dict[int, dict[Tokens, list[float]]] = {}
        self._steps = 0
        self._spent_ms = 0.0
        self._read = lambda: (clock(), others_s())
        self._start = self._read()

    @property
    def done(self) -> bool:
        """Nothing is left to be measured."""
        if self._steps >= len(self._plan):
            return True
        return self._spent_ms >= self._limit_ms and self._steps >= self._least_steps

    @property
    def progress(self) -> float:
        """0 to 1: of the steps or of the time limit, whichever is further."""
        return 1.0 if self.done else max(self._steps / len(self._plan), min(self._spent_ms / self._limit_ms, 0.99))

    @property
    def disturbed(self) -> bool:
        """Whether other processes have used the cores since it began."""
        (start_s, before_s), (now_s, after_s) = self._start, self._read()
        if before_s is None or after_s is None or now_s <= start_s:
            return False
        return (after_s - before_s) / (now_s - start_s) > _UNDISTURBED_CORES

    def step(self) -> None:
        """Time the next point once.

        Raises:
            EngineError: the device failed.
        """
        point, threads = self._plan[self._steps]
        # The mask alone: what every frame pays. Feedback knows about what subscribers add.
        settings = settings_at(point, threads)
        if point.input_scale in self._cold:
            self._spent_ms += self._engine.segment(self._image, settings).stats.total_ms
            self._cold.remove(point.input_scale)
        time.sleep(_PAUSE_S)
        latency_ms = self._engine.segment(self._image, settings).stats.total_ms
        self._steps += 1
        of_count = self._samples.setdefault(threads, {})
        of_count.setdefault((point.tokens_total, point.capacity), []).append(latency_ms)
        self._spent_ms += latency_ms

    def table(self) -> LatencyTable:
        """Milliseconds on the undisturbed device."""
        return LatencyTable(
            {
                threads: {tokens: percentile(samples, 0.25) for tokens, samples in of_count.items()}
                for threads, of_count in self._samples.items()
            }
        )


def settings_at(point: OperatingPoint, threads: int) -> Settings:
    """A call at exactly a point, for its mask alone."""
    return Settings(1.0, point.capacity, confidence=False, input_scale=point.input_scale, threads=threads)


def points_of(engine: Engine, image_size: tuple[int, int], input_scales: Sequence[float]) -> list[OperatingPoint]:
    """Every operating point of an engine, by size and capacity, ascending; of scales with one size, the largest.

    Args:
        engine: runs them.
        image_size: (height, width) of the camera images.
        input_scales: sizes, ascending.
    """
    ladders: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
    for scale in input_scales:
        ladders[engine.input_size(image_size, scale)] = scale, engine.capacities(image_size, scale)
    return [OperatingPoint(scale, capacity, ladder[-1]) for scale, ladder in ladders.values() for capacity in ladder]


def anchors(engine: Engine, image_size: tuple[int, int], input_scales: Sequence[float]) -> list[OperatingPoint]:
    """The points that a calibration times: all of one size, or three of three sizes; arguments as of `points_of`."""
    points = points_of(engine, image_size, input_scales)
    scales = list(dict.fromkeys(point.input_scale for point in points))
    if len(scales) == 1:
        return points
    chosen = []
    for scale in sorted({scales[0], scales[len(scales) // 2], scales[-1]}):
        of_size = [point for point in points if point.input_scale == scale]
        chosen += [of_size[index] for index in sorted({0, (len(of_size) - 1) // 2, len(of_size) - 1})]
    return chosen


def _rising(values: list[float]) -> list[float]:
    """The closest non-decreasing sequence (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before_total, before_count = pools.pop()
            total, count = total + before_total, count + before_count
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


@dataclass(frozen=True)
class CalibrationKey:
    """Everything that makes a measured latency valid.

    Args:
        model_sha256: hash of the model's weights and configuration.
        engine, precision, device: as `EngineInfo` names them.
        threads: CPU threads asked for, 0 = automatic.
        image_size: (height, width) of the camera images.
        points: what was to be timed.
        thread_counts: with how many CPU threads.
        machine: board or processor.
        power_mode: name of the power mode, empty where it cannot be read.
        version: version of this package.
    """

    model_sha256: str
    engine: str
    precision: str
    device: str
    threads: int
    image_size: tuple[int, int]
    points: tuple[OperatingPoint, ...]
    thread_counts: tuple[int, ...]
    machine: str
    power_mode: str
    version: str = __version__

    @classmethod
    def of(
        cls, engine: Engine, threads: int, image_size: tuple[int, int], points: Sequence[OperatingPoint]
    ) -> CalibrationKey:
        """The key for an engine on this machine, as it is now."""
        info = engine.info
        return cls(
            model_sha256=info.model_sha256, engine=info.engine, precision=info.precision, device=info.device,
            threads=threads, image_size=image_size, points=tuple(points), thread_counts=engine.thread_counts,
            machine=machine_name(), power_mode=power_mode(),
        )  # fmt: skip


class CalibrationCache:
    """Calibrations in files, one for each key.

    A file that is damaged or belongs to another key is as good as none, and is overwritten. Engines without weights
    (`model_sha256` empty) are not kept: nothing says whether they are the same the next time.

    Args:
        folder: None is the user's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or user_cache_dir() / "calibration"

    def path(self, key: CalibrationKey) -> Path:
        """The file of a key."""
        digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{key.engine}-{key.image_size[0]}x{key.image_size[1]}-{digest[:16]}.json"

    def load(self, key: CalibrationKey) -> LatencyTable | None:
        """The table as stored, or None."""
        path = self.path(key)
        if not key.model_sha256 or not os.path.isfile(path):
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT or content["key"] != _plain(key):
                return None
            latency_ms: dict[int, dict[Tokens, float]] = {}
            for threads, total, kept, ms in content["latency_ms"]:
                latency_ms.setdefault(int(threads), {})[int(total), int(kept)] = float(ms)
            known = {(point.tokens_total, point.capacity) for point in key.points}
            if tuple(latency_ms) != key.thread_counts or not all(set(each) <= known for each in latency_ms.values()):
                return None
            return LatencyTable(latency_ms)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
            _LOG.warning("calibration %s cannot be read (%s); measuring again", path, error)
            return None

    def store(self, key: CalibrationKey, table: LatencyTable) -> None:
        """Keep a calibration; readers see the old file or the new one, never half of it.

        Raises:
            OSError: the folder cannot be written.
        """
        if not key.model_sha256:
            return
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        measured = [[threads, *tokens, ms] for threads, each in table.measured.items() for tokens, ms in each.items()]
        content = {"format": _FORMAT, "key": _plain(key), "latency_ms": measured}
        with replacing(path, shared=True) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _plain(key: CalibrationKey) -> dict[str, Any]:
    # As JSON gives it back: tuples are lists.
    return json.loads(json.dumps(asdict(key)))
