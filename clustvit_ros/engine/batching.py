"""Whether a batch is faster than its images one by one: measured, since it depends on the device.

A GPU that one image does not fill gains; a CPU that it does fill may even lose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustvit_ros.engine.engine import Engine, Settings

# A gain below this would be within the noise, and a batch makes its first image wait for the last.
_WORTHWHILE = 0.9
_MAX_ROUNDS = 3
_ENOUGH_MS = 500.0


@dataclass(frozen=True)
class BatchGain:
    """What batching brings on this device.

    Args:
        size: images of the batch that was timed.
        batch_ms: milliseconds of that batch.
        single_ms: milliseconds of one image.
    """

    size: int
    batch_ms: float
    single_ms: float

    @property
    def worthwhile(self) -> bool:
        """A batch is clearly faster than its images one by one."""
        return self.batch_ms < _WORTHWHILE * self.size * self.single_ms

    def __str__(self) -> str:
        verdict = "images that arrive together are batched" if self.worthwhile else "images are segmented one by one"
        return f"{self.size} images take {self.batch_ms:.1f} ms in a batch, {self.single_ms:.1f} ms each: {verdict}"


def measure_batching(engine: Engine, size: int) -> BatchGain:
    """Time a batch and a single image, alternately, and take the best of each.

    Args:
        engine: warm; used by the thread that calls.
        size: images of the batch.

    Raises:
        EngineError: the device failed.
    """
    image = np.random.default_rng(0).integers(0, 256, (*engine.info.input_size, 3), dtype=np.uint8)
    settings = Settings(confidence=False)
    images = {1: image, size: np.stack([image] * size)}
    engine.segment(images[size], settings)  # the first call with a new shape is no example
    best_ms = dict.fromkeys(images, float("inf"))
    spent_ms = 0.0
    for _ in range(_MAX_ROUNDS):
        for count, batch in images.items():
            total_ms = engine.segment(batch, settings).stats.total_ms
            best_ms[count] = min(best_ms[count], total_ms)
            spent_ms += total_ms
        if spent_ms > _ENOUGH_MS:
            break
    return BatchGain(size, best_ms[size], best_ms[1])
