# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Times every token capacity with the real engine on this device, in steps that fit between two camera frames.

Results are kept in the user's cache folder for the same model, engine, machine and image size, so that only the first
start measures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clustvit_ros import __version__
from clustvit_ros.engine.engine import Engine, EngineInfo, Settings
from clustvit_ros.engine.machine import machine_name, power_mode
from clustvit_ros.paths import replacing, user_cache_dir
from clustvit_ros.policy.ledger import percentile

_ROUNDS = 5
_LIMIT_MS = 10_000.0
_FORMAT = 1
_LOG = logging.getLogger(__name__)


class Calibration:
    """One calibration, a step at a time.

    Every round times each capacity once, so that a change of load during calibration touches all of them alike. The
    lower quartile of a capacity's times counts: what else runs on the machine only ever adds to them. The engine must
    be warm for the image size.

    Args:
        engine: to be timed.
        image_size: (height, width) of the camera images.
        rounds: how often each capacity is timed.
        limit_ms: ends earlier once the engine has spent so much; the largest and the smallest capacity are timed in
            any case, and those that no time was left for are interpolated.
    """

    def __init__(
        self, engine: Engine, image_size: tuple[int, int], rounds: int = _ROUNDS, limit_ms: float = _LIMIT_MS
    ) -> None:
        self._engine = engine
        self.capacities = engine.capacities(image_size)
        self._image = np.random.default_rng(0).integers(0, 256, (*image_size, 3), dtype=np.uint8)
        self._limit_ms = limit_ms
        # The ends first: the rest can be interpolated. Each round starts one further on, or a load that comes and goes
        # at the pace of the calls would hit the same capacities every time.
        order = [*dict.fromkeys((self.capacities[-1], *self.capacities))]
        self._plan = [c for turn in range(rounds) for c in (*order[turn % len(order) :], *order[: turn % len(order)])]
        self._samples: dict[int, list[float]] = {}
        self._steps = 0
        self._spent_ms = 0.0

    @property
    def done(self) -> bool:
        """Nothing is left to be measured."""
        if self._steps >= len(self._plan):
            return True
        return self._spent_ms >= self._limit_ms and len(self._samples) >= min(2, len(self.capacities))

    @property
    def progress(self) -> float:
        """0 to 1: of the steps or of the time limit, whichever is further."""
        return 1.0 if self.done else max(self._steps / len(self._plan), min(self._spent_ms / self._limit_ms, 0.99))

    def step(self) -> None:
        """Time the next capacity once.

        Raises:
            EngineError: the device failed.
        """
        capacity = self._plan[self._steps]
        self._steps += 1
        # The mask alone: what every frame pays. Feedback knows about what subscribers add.
        settings = Settings(merge_threshold=1.0, token_capacity=capacity, confidence=False)
        latency_ms = self._engine.segment(self._image, settings).stats.total_ms
        self._samples.setdefault(capacity, []).append(latency_ms)
        self._spent_ms += latency_ms

    def latency_ms(self) -> dict[int, float]:
        """Milliseconds of every capacity on the undisturbed device."""
        timed = sorted(self._samples)
        quartiles = [percentile(self._samples[capacity], 0.25) for capacity in timed]
        return {capacity: float(np.interp(capacity, timed, quartiles)) for capacity in self.capacities}


@dataclass(frozen=True)
class CalibrationKey:
    """Everything that makes a measured latency valid.

    Args:
        weights_sha256: hash of the model's weights file.
        engine, precision, device: as `EngineInfo` names them.
        threads: CPU threads asked for, 0 = automatic.
        image_size: (height, width) of the camera images.
        capacities: the engine's ladder.
        machine: board or processor.
        power_mode: name of the power mode, empty where it cannot be read.
        version: version of this package.
    """

    weights_sha256: str
    engine: str
    precision: str
    device: str
    threads: int
    image_size: tuple[int, int]
    capacities: tuple[int, ...]
    machine: str
    power_mode: str
    version: str = __version__

    @classmethod
    def of(
        cls, info: EngineInfo, threads: int, image_size: tuple[int, int], capacities: tuple[int, ...]
    ) -> CalibrationKey:
        """The key for an engine on this machine, as it is now."""
        return cls(
            weights_sha256=info.weights_sha256, engine=info.engine, precision=info.precision, device=info.device,
            threads=threads, image_size=image_size, capacities=capacities, machine=machine_name(),
            power_mode=power_mode(),
        )  # fmt: skip


class CalibrationCache:
    """Calibrations in files, one for each key.

    A file that is damaged or belongs to another key is as good as none, and is overwritten. Engines without weights
    (`weights_sha256` empty) are not kept: nothing says whether they are the same the next time.

    Args:
        folder: None is the user's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or user_cache_dir() / "calibration"

    def path(self, key: CalibrationKey) -> Path:
        """The file of a key."""
        digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{key.engine}-{key.image_size[0]}x{key.image_size[1]}-{digest[:16]}.json"

    def load(self, key: CalibrationKey) -> dict[int, float] | None:
        """Capacity -> milliseconds as stored, or None."""
        path = self.path(key)
        if not key.weights_sha256 or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT or content["key"] != _plain(key):
                return None
            latency_ms = {int(capacity): float(value) for capacity, value in content["latency_ms"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _LOG.warning("calibration %s cannot be read (%s); measuring again", path, error)
            return None
        plausible = all(0.0 < value < math.inf for value in latency_ms.values())
        return latency_ms if plausible and tuple(sorted(latency_ms)) == key.capacities else None

    def store(self, key: CalibrationKey, latency_ms: dict[int, float]) -> None:
        """Keep a calibration; readers see the old file or the new one, never half of it.

        Raises:
            OSError: the folder cannot be written.
        """
        if not key.weights_sha256:
            return
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": _FORMAT, "key": _plain(key), "latency_ms": latency_ms}
        with replacing(path, shared=True) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _plain(key: CalibrationKey) -> dict[str, Any]:
    # As JSON gives it back: tuples are lists.
    return json.loads(json.dumps(asdict(key)))
