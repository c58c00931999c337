"""Whether batches pay is measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from clustvit_ros.engine import Prediction, ScriptedEngine, Settings
from clustvit_ros.engine.batching import measure_batching


class LinearEngine(ScriptedEngine):
    """Takes `first_ms` for the first image of a batch and `more_ms` for each further one; no time really passes."""

    def __init__(self, first_ms: float, more_ms: float) -> None:
        self._now_s, self._images = 0.0, 1
        super().__init__(lambda *_: first_ms + more_ms * (self._images - 1), self._pass, lambda: self._now_s)

    def _pass(self, seconds: float) -> None:
        self._now_s += seconds

    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        self._images = len(images) if images[0].ndim == 3 else 1
        return super().segment(images, settings)


@pytest.mark.parametrize(("more_ms", "worthwhile"), [(2.0, True), (10.0, False), (8.5, False)])
def test_a_batch_is_worthwhile_when_it_is_clearly_faster(more_ms: float, worthwhile: bool) -> None:
    gain = measure_batching(LinearEngine(10.0, more_ms), 2)
    assert gain.single_ms == pytest.approx(10.0)
    assert gain.batch_ms == pytest.approx(10.0 + more_ms)
    assert gain.worthwhile is worthwhile
    assert ("are batched" if worthwhile else "one by one") in str(gain)


def test_a_slow_engine_is_not_measured_for_long() -> None:
    engine = LinearEngine(1000.0, 500.0)
    measure_batching(engine, 3)
    assert engine._now_s < 6.0
