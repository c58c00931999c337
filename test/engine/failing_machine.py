# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A machine whose GPU fails on command, for tests of what happens then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest

from clustvit_ros.engine import Engine, Prediction, ScriptedEngine, Settings
from clustvit_ros.engine.host import EngineHost, EngineOrder
from clustvit_ros.engine.worker import DeviceLost, FrameSlot

IMAGE = np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3)  # 24 tokens: rungs of 3
WAIT_S = 10.0


class Session:
    """Segments the frames that it gets, under the settings that come with them."""

    def __init__(self, engine: Engine, slot: FrameSlot[Settings], results: list[Prediction]) -> None:
        self.engine, self._slot, self._results = engine, slot, results

    def handle(self, frame: Settings) -> None:
        try:
            self._results.append(self.engine.segment(IMAGE, frame))
        except DeviceLost:
            self._slot.put_back(frame)
            raise
        except Exception as error:
            self._results.append(error)

    def use_idle_time(self, is_free: Callable[[], bool]) -> None:
        pass


class Machine:
    """A GPU that fails while `failure` is set, and optionally only above `most_tokens`; a CPU that always works."""

    all: ClassVar[list[Machine]] = []

    def __init__(self, device: str = "cuda", gpu_works_at_start: bool = True, adapts: bool = True) -> None:
        Machine.all.append(self)
        self.now_s = 0.0
        self.failure: Exception | None = None
        self.most_tokens = 0
        self.made: list[str] = []
        self.closed: list[str] = []
        self.warmed: list[tuple[int, int] | None] = []
        self.gpu_can_be_made, self.gpu_is_a_cpu = gpu_works_at_start, False
        self.may_load = threading.Event()
        self.may_load.set()
        self.ended: list[BaseException | None] = []
        self.results: list = []
        self.slot: FrameSlot[Settings] = FrameSlot()
        self.slot.open()
        self.host: EngineHost[Settings] = EngineHost(self.slot, clock=lambda: self.now_s)
        self.device, self.adapts = device, adapts
        self.start("a")
        self.wait_for(lambda: bool(self.ended))

    def start(self, model: str) -> None:
        def bind(engine: Engine) -> Session:
            return Session(engine, self.slot, self.results)

        self.host.start(EngineOrder(model, self.make, bind, self.device, self.adapts, self.ended.append))

    def make(self, device: str) -> Engine:
        self.made.append(device)
        self.may_load.wait(WAIT_S)
        if device != "cpu" and not self.gpu_can_be_made:
            raise RuntimeError("CUDA error: no CUDA-capable device is detected")
        return Part(self, "cpu (fake)" if device == "cpu" or self.gpu_is_a_cpu else "cuda:0 (Fake)")

    def segment(self, **settings: float) -> int:
        """The token capacity that a frame was segmented with."""
        before = len(self.results)
        self.slot.put(Settings(**{"merge_threshold": 1.0, **settings}))  # type: ignore[arg-type]
        self.wait_for(lambda: len(self.results) > before and not self.slot.busy)
        result = self.results[-1]
        if isinstance(result, Exception):
            raise result
        np.testing.assert_array_equal(result.mask[0], IMAGE[..., 1] >> 6)
        return result.stats.token_capacity

    def wait_for(self, condition: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(int(WAIT_S / 0.002)):
            if condition():
                return
            pause.wait(0.002)
        pytest.fail("not in time")

    @property
    def device_in_use(self) -> str:
        self.wait_for(lambda: self.host.session is not None)
        return self.host.session.engine.info.device  # type: ignore[union-attr]


class Part(ScriptedEngine):
    """One of the machine's engines."""

    def __init__(self, machine: Machine, device: str) -> None:
        super().__init__(device=device)
        self.machine = machine

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        self.machine.warmed.append(image_size)

    def segment(self, images, settings=Settings()):
        prediction = super().segment(images, settings)
        machine, tokens = self.machine, prediction.stats.token_capacity
        if machine.failure is not None and "cuda" in self.info.device and tokens > machine.most_tokens:
            raise machine.failure
        return prediction

    def close(self) -> None:
        self.machine.closed.append(self.info.device)
