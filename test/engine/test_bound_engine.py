"""An engine in a thread of its own."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from clustvit_ros.engine import ScriptedEngine, Settings, create_engine
from clustvit_ros.engine.bound_engine import BoundEngine
from clustvit_ros.errors import EngineError, ImageError, ModelError


class Witness(ScriptedEngine):
    """Remembers which threads called it."""

    def __init__(self):
        super().__init__()
        self.threads = {threading.get_ident()}

    def warmup(self, image_size=None):
        self.threads.add(threading.get_ident())

    def segment(self, images, settings=Settings()):
        self.threads.add(threading.get_ident())
        return super().segment(images, settings)

    def close(self):
        self.threads.add(threading.get_ident())


IMAGE = np.full((32, 48, 3), 100, np.uint8)


def test_everything_happens_in_one_thread_that_is_no_callers():
    made = []
    engine = BoundEngine(lambda: made.append(Witness()) or made[0])
    engine.warmup((32, 48))
    caller = threading.Thread(target=lambda: engine.segment(IMAGE))
    caller.start()
    caller.join()
    engine.segment(IMAGE)
    engine.close()
    (thread,) = made[0].threads
    assert thread not in (threading.get_ident(), caller.ident)


def test_results_are_the_engines_own(toy_model):
    direct = create_engine(str(toy_model), device="cpu")
    bound = BoundEngine(lambda: create_engine(str(toy_model), device="cpu"))
    assert bound.info == direct.info and bound.capacities((120, 160)) == direct.capacities((120, 160))
    assert np.array_equal(bound.segment(IMAGE).mask, direct.segment(IMAGE).mask)
    bound.close()


def test_errors_reach_the_caller_and_the_engine_goes_on():
    with pytest.raises(ModelError, match="not shipped"):
        BoundEngine(lambda: create_engine("nonsense"))
    engine = BoundEngine(ScriptedEngine)
    with pytest.raises(ImageError):
        engine.segment(np.zeros((3, 3), np.uint8))
    assert engine.segment(IMAGE).mask.shape == (1, 32, 48)


def test_a_closed_engine_says_so_and_its_thread_ends():
    before = threading.active_count()
    engine = BoundEngine(ScriptedEngine)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.segment(IMAGE)
    for thread in threading.enumerate():
        if thread.name == "engine":
            thread.join(5.0)
    assert threading.active_count() <= before
