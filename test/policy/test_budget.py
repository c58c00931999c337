# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The budget controller against scripted loads; no clock, no sleeping."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from clustvit_ros.errors import ConfigError
from clustvit_ros.policy import BudgetController, LatencyTable
from clustvit_ros.policy.budget import check_budget

TABLE = LatencyTable({1000 * eighths // 8: 5.0 + 20.0 * eighths / 8 for eighths in range(1, 9)})
BUDGET_MS = 18.0


def simulate(
    load: Callable[[int], float] = lambda frame: 1.0, noise: Callable[[random.Random], float] = lambda rng: 1.0,
    frames: int = 600, seed: int = 0, true: LatencyTable = TABLE, controller: BudgetController | None = None,
):  # fmt: skip
    """(capacity, latency_ms) of each frame on a device that is `load` times slower than calibrated."""
    rng = random.Random(seed)
    controller = controller or BudgetController(TABLE, BUDGET_MS)
    series = []
    for frame in range(frames):
        capacity = controller.decide().capacity
        latency_ms = true[capacity] * load(frame) * noise(rng)
        controller.observe(capacity, latency_ms)
        series.append((capacity, latency_ms))
    return series


def misses(series) -> float:
    return sum(latency_ms > BUDGET_MS for _, latency_ms in series) / len(series)


def changes(series) -> int:
    return sum(before[0] != after[0] for before, after in pairwise(series))


def gauss(relative):
    return lambda rng: max(rng.gauss(1.0, relative), 0.2)


def test_idle_device_gets_the_largest_capacity_that_fits():
    series = simulate()
    assert {capacity for capacity, _ in series} == {625}  # 17.5 ms; 750 tokens take 20
    assert misses(series) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "noise",
    [gauss(0.03), gauss(0.1), lambda rng: rng.uniform(0.9, 1.2), lambda rng: rng.lognormvariate(0.0, 0.15)],
    ids=["normal 3 %", "normal 10 %", "uniform", "lognormal"],
)
def test_noise_misses_at_most_two_percent_and_does_not_oscillate(noise, seed):
    steady = simulate(noise=noise, frames=2000, seed=seed)[30:]
    assert misses(steady) <= 0.02
    assert changes(steady) <= len(steady) * 0.02
    assert sum(capacity for capacity, _ in steady) / len(steady) >= 200  # and does not hide at the bottom


def test_step_of_load_is_met_within_five_frames():
    series = simulate(load=lambda frame: 1.0 if frame < 200 else 1.8)
    assert misses(series[205:]) == 0 and changes(series[205:]) == 0


def test_recovers_within_thirty_frames_after_a_lasting_load():
    series = simulate(load=lambda frame: 1.8 if 200 <= frame < 400 else 1.0, noise=gauss(0.03))
    assert series[399][0] < series[199][0]
    assert max(capacity for capacity, _ in series[400:430]) == series[199][0]


def test_a_single_spike_changes_nothing():
    series = simulate(load=lambda frame: 8.0 if frame == 100 else 1.0, noise=gauss(0.02))
    assert changes(series[30:]) == 0


@pytest.mark.parametrize("seed", range(3))
def test_spikes_that_keep_coming_are_allowed_for(seed):
    spikes = lambda rng: rng.gauss(1.0, 0.02) * (1.35 if rng.random() < 0.1 else 1.0)  # noqa: E731
    series = simulate(noise=spikes, frames=2000, seed=seed)[100:]
    assert sorted(latency_ms for _, latency_ms in series)[int(0.95 * len(series))] <= BUDGET_MS
    assert changes(series) <= len(series) * 0.02


def test_recovers_within_thirty_frames_after_a_burst_of_spikes():
    series = simulate(load=lambda frame: 8.0 if 100 <= frame < 110 else 1.0, noise=gauss(0.02))
    assert series[108][0] == TABLE.capacities[0]
    assert max(capacity for capacity, _ in series[110:140]) == series[99][0]


def test_ramp_is_followed():
    series = simulate(load=lambda frame: 1.0 + 0.8 * min(max(frame - 100, 0) / 200, 1.0), noise=gauss(0.03))
    assert misses(series[30:]) <= 0.02


def test_load_that_comes_and_goes_is_followed_without_a_limit_cycle():
    series = simulate(load=lambda frame: 1.7 if frame // 100 % 2 else 1.0, noise=gauss(0.03), frames=2000)
    for start in range(0, 2000, 100):
        assert misses(series[start + 30 : start + 100]) <= 0.02
    # Up once and down once per period of 200 frames, plus a step on the way.
    assert changes(series) <= 10 * 5


def test_a_wrong_table_does_not_make_it_oscillate():
    wrong = LatencyTable({c: value * (1 + 0.2 * c / 1000) for c, value in TABLE.items()})
    series = simulate(noise=gauss(0.02), frames=3000, true=wrong)
    assert misses(series[100:]) <= 0.02
    assert changes(series[1500:]) <= 4


def test_overload_is_clamped_and_said():
    controller = BudgetController(TABLE, BUDGET_MS)
    simulate(load=lambda frame: 10.0, frames=30, controller=controller)
    decision = controller.decide()
    assert decision.capacity == TABLE.capacities[0] and not decision.feasible
    assert decision.predicted_ms > BUDGET_MS and decision.slowdown == pytest.approx(10.0, rel=0.05)


def test_overhead_outside_the_engine_counts():
    controller = BudgetController(TABLE, BUDGET_MS)
    for _ in range(40):
        controller.observe(controller.decide().capacity, TABLE[controller.decide().capacity], overhead_ms=6.0)
    decision = controller.decide()
    assert decision.capacity == 250  # 10 ms fit into 18 - 6, 12.5 do not
    assert decision.engine_budget_ms == pytest.approx(12.0, abs=0.3)


def test_min_tokens_is_never_undercut():
    controller = BudgetController(TABLE, 25.0, min_tokens=400)
    series = simulate(load=lambda frame: 5.0, controller=controller)
    assert min(capacity for capacity, _ in series) == 500


def test_a_smaller_capacity_than_allowed_teaches_as_well():
    controller = BudgetController(TABLE, BUDGET_MS)
    for _ in range(30):
        controller.observe(125, TABLE[125] * 1.5)  # few tokens were needed, and took half as long again
    assert controller.decide().slowdown == pytest.approx(1.5, rel=0.05)


def test_budget_below_the_fastest_capacity_names_the_minimum():
    with pytest.raises(ConfigError, match=r"got 3, but 125 tokens already take 7\.5 ms here; .* at least 7\.7"):
        check_budget(TABLE, 3.0)
    with pytest.raises(ConfigError, match=r"125 tokens already take 7\.5 ms .* 6\.0 ms pass outside .* at least 13\.9"):
        check_budget(TABLE, 8.0, overhead_ms=6.0)
    with pytest.raises(ConfigError, match="but 500 tokens"):
        check_budget(TABLE, 10.0, min_tokens=400)
    with pytest.raises(ConfigError, match="at least 7"):
        check_budget(TABLE, float("nan"))
    check_budget(TABLE, 7.6)


def test_a_device_faster_than_calibrated_lowers_the_minimum_and_a_load_does_not_raise_it():
    check_budget(TABLE, 5.0, slowdown=0.6)
    check_budget(TABLE, 7.6, slowdown=2.0)


def test_an_infeasible_budget_gets_the_smallest_capacity():
    decision = BudgetController(TABLE, 3.0).decide()
    assert decision.capacity == 125 and not decision.feasible


def test_without_a_budget_nothing_is_bounded_but_everything_is_learnt():
    controller = BudgetController(TABLE)
    series = simulate(load=lambda frame: 1.5, controller=controller, frames=30)
    assert {capacity for capacity, _ in series} == {1000}
    controller.retarget(BUDGET_MS)
    assert controller.decide().capacity == 250  # 10 ms times 1.5; 375 tokens would take 18.75


def test_another_budget_takes_effect_with_the_next_frame():
    controller = BudgetController(TABLE, BUDGET_MS)
    for _ in range(40):
        controller.observe(controller.decide().capacity, TABLE[controller.decide().capacity], overhead_ms=6.0)
    controller.retarget(BUDGET_MS, counts_overhead=False)
    assert controller.decide().capacity == 625
    controller.retarget(14.0, min_tokens=300, counts_overhead=False)
    assert controller.decide().capacity == 375
    controller.retarget(26.0)
    assert controller.decide().capacity == 625  # 17.5 fits into 26 - 6
    assert controller.typical_overhead_ms == 6.0 and controller.typical_slowdown == pytest.approx(1.0)


def test_same_observations_same_decisions():
    assert simulate(noise=gauss(0.1), seed=3) == simulate(noise=gauss(0.1), seed=3)
