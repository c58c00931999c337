# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""An engine without a network: deterministic masks and a scripted latency, for tests and for bring-up without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX, ClassSet
from clustvit_ros.engine.engine import Engine, EngineInfo, Prediction, Settings, Stats, as_batch
from clustvit_ros.engine.ladder import choose_capacity, default_ladder, scaled_size

_PATCH_PX = 16
_FIXED_SHARE = 0.25
_CLASSES = ClassSet(("dark", "dim", "bright", "glare"), ((40, 40, 90), (90, 90, 160), (200, 180, 60), (255, 255, 220)))


def proportional(full_ms: float) -> Callable[[int, int, int], float]:
    """A latency that falls with the kept tokens as a network's does.

    Args:
        full_ms: milliseconds with every token kept; a quarter of it is spent whatever is merged.
    """
    return lambda _call, kept, total: full_ms * (_FIXED_SHARE + (1.0 - _FIXED_SHARE) * kept / total)


class ScriptedEngine(Engine):
    """Labels every pixel by its brightness: four equal bands of the green channel.

    The brightness bands make a mask that a test can compute from the image it sent. Confidence is the distance to the
    nearest band edge. "Tokens" are 16x16 patches; the threshold is the share of them that is to be kept, and as in a
    network, the capacity is the smallest rung of the ladder that has room for those.

    Args:
        latency_ms: milliseconds of a call; a number, or a function of (call index, kept tokens, total tokens). At a
            smaller input, as much less as there are fewer tokens.
        failure: called with the call's index; what it returns is raised instead of a prediction, None is none.
        device: what `info` calls the device.
        sleep: waits that many seconds; replace it to script time.
        clock: monotonic seconds; replace it with `sleep`.
    """

    def __init__(
        self, latency_ms: float | Callable[[int, int, int], float] = 0.0, sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter, failure: Callable[[int], Exception | None] = lambda _call: None,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self._latency_ms = latency_ms if callable(latency_ms) else lambda *_: float(latency_ms)
        self._sleep, self._clock, self._failure = sleep, clock, failure
        self._calls = 0
        self._info = EngineInfo(
            model="scripted", engine="scripted", device=device, device_reason="", precision="none", classes=_CLASSES,
            input_size=(480, 640), tokens_total=1200,
        )  # fmt: skip

    @property
    def info(self) -> EngineInfo:
        return self._info

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Nothing to warm up."""

    def input_size(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, int]:
        return scaled_size(image_size, input_scale, _PATCH_PX)

    def capacities(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, ...]:
        return default_ladder(_count_tokens(self.input_size(image_size, input_scale)))

    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        start = self._clock()
        batch = as_batch(images)
        failure = self._failure(self._calls)
        if failure is not None:
            self._calls += 1
            raise failure
        size = settings.output_size or batch.shape[1:3]
        input_size = self.input_size(batch.shape[1:3], settings.input_scale)
        seen = [i[..., 1] for i in batch]
        if input_size != batch.shape[1:3]:
            seen = [cv2.resize(plane, input_size[::-1], interpolation=cv2.INTER_AREA) for plane in seen]
        green = np.stack([cv2.resize(plane, size[::-1], interpolation=cv2.INTER_NEAREST) for plane in seen])
        mask, within = green >> 6, green & 63
        confidence = 128 + 2 * np.minimum(within, 63 - within)
        mask = np.where(confidence < settings.confidence_threshold * 255, np.uint8(IGNORE_INDEX), mask)
        confidence = np.where(mask == IGNORE_INDEX, np.uint8(0), confidence)

        total, full = _count_tokens(input_size), _count_tokens(batch.shape[1:3])
        capacity = choose_capacity(
            default_ladder(total),
            max(round(total * settings.merge_threshold), settings.min_tokens),
            settings.token_capacity,
        )
        self._sleep(self._latency_ms(self._calls, capacity, total) * total / full / 1000.0)
        self._calls += 1
        total_ms = (self._clock() - start) * 1000.0
        stats = Stats(
            total, capacity, capacity, settings.merge_threshold, total_ms, {"scripted": total_ms},
            input_size=input_size, input_scale=settings.input_scale,
        )  # fmt: skip
        cluster_map = (green > 255 * settings.merge_threshold).astype(np.uint8)
        return Prediction(
            mask, confidence if settings.confidence else None, cluster_map if settings.clusters else None, stats,
            np.stack(seen) >> 6 if settings.looks_back else None,
        )


def _count_tokens(image_size: tuple[int, int]) -> int:
    return -(-image_size[0] // _PATCH_PX) * -(-image_size[1] // _PATCH_PX)
