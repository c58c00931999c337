# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Threads of one operation have a core each while they are as many as the cores, and are the system's to place else."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.engine.machine import CoreTeam, usable_cores

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names and places threads through /proc"),
    pytest.mark.skipif(usable_cores() < 2, reason="needs two cores"),
    pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend")[-1],
                       reason="needs a PyTorch that computes with OpenMP"),
]  # fmt: skip
CORES = usable_cores()


def in_fresh_thread(function):
    """What a function returns in a thread that has not computed anything, whose team is therefore new."""
    results, before = [], torch.get_num_threads()
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert results, "the function failed"
    return results[0]


def compute(threads):
    return torch.zeros(threads << 16, dtype=torch.uint8).add_(1)


def team_of_all():
    torch.set_num_threads(CORES)
    team = CoreTeam(compute, CORES)
    team.resize(CORES)
    return team


def places(owner):
    """The cores that each other thread of the owner's team may run on."""
    tasks = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    names = {task: Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in tasks}
    return [os.sched_getaffinity(task) for task, name in names.items() if name == f"team-{owner}" and task != owner]


def test_as_many_threads_as_cores_have_one_each_and_fewer_are_free():
    def placed():
        owner, free = threading.get_native_id(), os.sched_getaffinity(0)
        team = team_of_all()
        with team.in_place():
            own = os.sched_getaffinity(0)
        bound = places(owner)
        assert os.sched_getaffinity(0) == free
        torch.set_num_threads(1)
        team.resize(1)
        with team.in_place():
            assert os.sched_getaffinity(0) == free
        released = places(owner)
        torch.set_num_threads(CORES)
        team.resize(CORES)
        return own, bound, released, places(owner), free

    own, bound, released, again, free = in_fresh_thread(placed)
    assert len(own) == 1 and len(bound) == CORES - 1
    assert sorted(core for cores in (own, *bound) for core in cores) == sorted(free)
    assert released == [free] * (CORES - 1)
    assert sorted(map(sorted, again)) == sorted(map(sorted, bound))


def test_a_team_of_a_thread_that_had_computed_before_is_left_alone():
    def late():
        torch.set_num_threads(CORES)
        compute(CORES)
        team = team_of_all()
        with team.in_place():
            return os.sched_getaffinity(0)

    assert in_fresh_thread(late) == os.sched_getaffinity(0)


def test_another_thread_and_one_that_was_placed_from_outside_stay_where_they_are():
    def placed():
        team, free = team_of_all(), os.sched_getaffinity(0)
        with team.in_place():
            assert len(os.sched_getaffinity(0)) == 1
        others = []

        def other():
            with team.in_place():
                others.append(os.sched_getaffinity(0))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        last = {max(free)}
        os.sched_setaffinity(0, last)
        with team.in_place():
            inside = os.sched_getaffinity(0)
        return others, inside == os.sched_getaffinity(0) == last

    others, stayed = in_fresh_thread(placed)
    assert others == [os.sched_getaffinity(0)] and stayed


def test_threads_that_were_asked_for_are_the_systems_to_place(toy_model):
    """The calling thread could end on a core that another one is bound to."""

    def asked():
        engine = create_engine(str(toy_model), "torch", "cpu", threads=CORES, share_cores=True)
        try:
            engine.segment(np.zeros((64, 96, 3), np.uint8))
            return places(threading.get_native_id())
        finally:
            engine.close()

    assert all(cores == os.sched_getaffinity(0) for cores in in_fresh_thread(asked))


def test_an_engine_that_shares_cores_places_its_threads_and_gives_the_same_masks(toy_model):
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)

    def segmented():
        owner, free = threading.get_native_id(), os.sched_getaffinity(0)
        torch.set_num_threads(CORES)
        engine = create_engine(str(toy_model), "torch", "cpu", share_cores=True)
        try:
            counts = engine.thread_counts
            every = engine.segment(image, Settings(threads=counts[0]))
            bound = places(owner)
            one = engine.segment(image, Settings(threads=1))
        finally:
            engine.close()
        return counts, every.mask, bound, one.mask, places(owner), os.sched_getaffinity(0) == free

    counts, every, bound, one, released, free = in_fresh_thread(segmented)
    assert free and (every == one).mean() > 0.999
    if counts[0] == CORES:
        assert len(bound) == CORES - 1 and all(len(cores) == 1 for cores in bound)
        assert all(len(cores) == CORES for cores in released)
