# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Threads beside other processes that compute: what is left to them, and that an engine follows."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from clustvit_ros.engine import create_engine
from clustvit_ros.engine.machine import WINDOW_S, CoreShare, OthersMeter, compute_beside


class Machine:
    """A clock, and processes that use cores while it runs."""

    def __init__(self) -> None:
        self.now_s = self.busy_s = self.own_s = 0.0
        self.tells = True

    def run(self, seconds: float, others: float, own: float = 1.0) -> None:
        self.now_s += seconds
        self.busy_s += seconds * (others + own)
        self.own_s += seconds * own

    def share(self, cores: int, most: int | None = None) -> CoreShare:
        busy = lambda: self.busy_s if self.tells else None  # noqa: E731
        return CoreShare(most or cores, cores, busy, lambda: self.own_s, lambda: self.now_s)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def after(machine: Machine, share: CoreShare, others: float, own: float = 1.0) -> int:
    """Threads after one window with so many cores used by others."""
    machine.run(WINDOW_S, others, own)
    return share.threads()


def test_alone_all_cores_are_used(machine):
    share = machine.share(cores=2)
    assert share.threads() == 2
    assert after(machine, share, others=0.1, own=1.9) == 2


def test_a_core_that_another_process_burns_is_left_to_it_and_taken_back(machine):
    share = machine.share(cores=2)
    assert after(machine, share, others=0.9) == 1
    assert share.others == pytest.approx(0.9)
    assert after(machine, share, others=1.0) == 1
    assert after(machine, share, others=0.05) == 2


def test_between_the_two_limits_nothing_changes(machine):
    share = machine.share(cores=2)
    assert [after(machine, share, others) for others in (0.3, 0.25, 0.3)] == [2, 2, 2]
    after(machine, share, others=1.0)
    assert [after(machine, share, others) for others in (0.3, 0.25, 0.3)] == [1, 1, 1]


@pytest.mark.parametrize(("others", "threads"), [(0.2, 8), (1.0, 7), (2.5, 5), (7.0, 1), (8.0, 1)])
def test_of_many_cores_only_those_in_use_are_left(machine, others, threads):
    assert after(machine, machine.share(cores=8), others) == threads


def test_fewer_threads_than_cores_need_not_give_way(machine):
    share = machine.share(cores=8, most=4)
    assert after(machine, share, others=4.0) == 4
    assert after(machine, share, others=6.0) == 2


def test_within_a_window_and_after_a_pause_the_choice_stands(machine):
    share = machine.share(cores=2)
    machine.run(WINDOW_S / 2, others=1.0)
    assert share.threads() == 2
    machine.run(60.0, others=1.0, own=0.0)
    assert share.threads() == 2, "a minute without frames says nothing about now"
    assert after(machine, share, others=1.0) == 1


def test_frames_of_many_seconds_are_windows_of_their_own(machine):
    share = machine.share(cores=2)
    machine.run(8.0, others=1.0)
    assert share.threads() == 1
    machine.run(8.0, others=0.0)
    assert share.threads() == 2


def test_a_system_that_does_not_tell_changes_nothing(machine):
    machine.tells = False
    share = machine.share(cores=2)
    assert after(machine, share, others=2.0) == 2
    machine.tells = True
    machine.run(WINDOW_S, others=2.0)
    assert share.threads() == 2, "the window has no start"
    assert after(machine, share, others=2.0) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")
@pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs two threads")
def test_an_engine_gives_way_to_real_processes_and_segments_the_same(toy_model):
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    engine = create_engine(str(toy_model), "torch", "cpu", share_cores=True)
    try:
        alone = engine.segment(image)
        assert alone.stats.threads == torch.get_num_threads() > 1
        burners = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(torch.get_num_threads())
        ]  # fmt: skip
        try:
            beside = wait_for_one_thread(engine, image)
        finally:
            for burner in burners:
                burner.kill()
                burner.wait()
        assert (beside.mask == alone.mask).mean() > 0.999
    finally:
        engine.close()
        create_engine(str(toy_model), "torch", "cpu", share_cores=True).close()  # every thread again, for other tests


def test_threads_that_were_asked_for_stay(toy_model):
    before = torch.get_num_threads()
    try:
        engine = create_engine(str(toy_model), "torch", "cpu", threads=1, share_cores=True)
        assert engine.segment(np.zeros((64, 96, 3), np.uint8)).stats.threads == 1
    finally:
        torch.set_num_threads(before)


def wait_for_one_thread(engine, image):
    """The first prediction that one thread made."""
    deadline_s = time.monotonic() + 30.0
    while (prediction := engine.segment(image)).stats.threads > 1:
        assert time.monotonic() < deadline_s, f"still {prediction.stats.threads} threads"
        time.sleep(0.02)
    return prediction


def test_the_meter_tells_what_others_used_in_the_last_second():
    now_s, others_s = [0.0], [0.0]
    meter = OthersMeter(lambda: others_s[0], lambda: now_s[0])
    assert meter.cores() is None
    for expected in (0.5, 1.5, 0.0):
        now_s[0], others_s[0] = now_s[0] + 2 * WINDOW_S, others_s[0] + 2 * WINDOW_S * expected
        assert meter.cores() == pytest.approx(expected)
        now_s[0] += 0.5 * WINDOW_S
        assert meter.cores() == pytest.approx(expected)  # until a window is over
        now_s[0] -= 0.5 * WINDOW_S


def test_where_the_system_tells_nothing_the_meter_does_not_either():
    now_s = [0.0]
    meter = OthersMeter(lambda: None, lambda: now_s[0])
    now_s[0] = 5.0
    assert meter.cores() is None


def test_what_this_process_computes_beside_its_engine_is_left_to_it(machine):
    share = machine.share(cores=4)
    try:
        compute_beside(1)
        assert after(machine, share, others=0.0) == 3
        assert after(machine, share, others=1.0) == 2
    finally:
        compute_beside(0)
    assert after(machine, share, others=0.0) == 4
