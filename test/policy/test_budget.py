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

from clustvit_ros.engine.ladder import Accuracy, OperatingPoint, WorthOrder, front_of
from clustvit_ros.errors import ConfigError
from clustvit_ros.policy import BudgetController, LatencyTable, check_budget

POINTS = [OperatingPoint(1.0, 1000 * eighths // 8, 1000) for eighths in range(1, 9)]
TABLE = LatencyTable({0: {(1000, point.capacity): 5.0 + 20.0 * point.share for point in POINTS}})
BUDGET_MS = 18.0


def controller_for(budget_ms: float = BUDGET_MS) -> BudgetController:
    return BudgetController(TABLE, POINTS, budget_ms)


def simulate(
    load: Callable[[int], float] = lambda frame: 1.0, noise: Callable[[random.Random], float] = lambda rng: 1.0,
    frames: int = 600, seed: int = 0, true: LatencyTable = TABLE, controller: BudgetController | None = None,
):  # fmt: skip
    """(capacity, latency_ms) of each frame on a device that is `load` times slower than calibrated."""
    rng = random.Random(seed)
    controller = controller or controller_for()
    series = []
    for frame in range(frames):
        point = controller.decide().point
        latency_ms = true[point] * load(frame) * noise(rng)
        controller.observe(point, latency_ms)
        series.append((point.capacity, latency_ms))
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
    assert series[108][0] == POINTS[0].capacity
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
    wrong = LatencyTable({0: {tokens: ms * (1 + 0.2 * tokens[1] / 1000) for _, tokens, ms in TABLE.items()}})
    series = simulate(noise=gauss(0.02), frames=3000, true=wrong)
    assert misses(series[100:]) <= 0.02
    assert changes(series[1500:]) <= 4


def test_overload_is_clamped_and_said():
    controller = controller_for()
    simulate(load=lambda frame: 10.0, frames=30, controller=controller)
    decision = controller.decide()
    assert decision.point.capacity == POINTS[0].capacity and not decision.feasible
    assert decision.predicted_ms > BUDGET_MS and decision.slowdown == pytest.approx(10.0, rel=0.05)


def test_overhead_outside_the_engine_counts():
    controller = controller_for()
    for _ in range(40):
        controller.observe(controller.decide().point, TABLE[controller.decide().point], overhead_ms=6.0)
    decision = controller.decide()
    assert decision.point.capacity == 250  # 10 ms fit into 18 - 6, 12.5 do not
    assert decision.engine_budget_ms == pytest.approx(12.0, abs=0.3)


def test_only_points_that_are_given_are_chosen():
    series = simulate(load=lambda frame: 5.0, controller=BudgetController(TABLE, POINTS[3:], 25.0))
    assert min(capacity for capacity, _ in series) == 500


def test_a_smaller_capacity_than_allowed_teaches_as_well():
    controller = controller_for()
    for _ in range(30):
        controller.observe(POINTS[0], TABLE[POINTS[0]] * 1.5)  # few tokens were needed, and took half as long again
    assert controller.decide().slowdown == pytest.approx(1.5, rel=0.05)


def test_two_late_frames_of_fifty_are_rare():
    """Latencies with a long tail: what is seen in a minute is exceeded in the next one."""
    stretches, bad = 200, 0
    for seed in range(stretches):
        series = simulate(noise=lambda rng: 1.0 + rng.expovariate(1 / 0.08), frames=140, seed=seed)
        bad += sum(latency_ms > BUDGET_MS for _, latency_ms in series[90:]) > 1
    assert bad <= 0.04 * stretches


def slow_at_times(rng: random.Random, share: float) -> Callable[[random.Random], float]:
    """A virtual core beside which another machine's computes now and then, for some frames in a row."""
    beside = False

    def noise(_: random.Random) -> float:
        nonlocal beside
        beside = rng.random() < share if rng.random() < 0.3 else beside
        return rng.gauss(1.3 if beside else 1.0, 0.03)

    return noise


def test_after_a_late_frame_there_is_rarely_a_second_one():
    stretches, bad = 200, 0
    for seed in range(stretches):
        series = simulate(noise=slow_at_times(random.Random(seed), 0.06), frames=60, seed=seed)
        bad += sum(latency_ms > BUDGET_MS for _, latency_ms in series[10:]) > 1
    assert bad <= 0.1 * stretches


def test_budget_below_the_fastest_point_names_the_minimum():
    fastest = "got 3, but 125 of 1000 tokens, the fastest allowed, take up to 7.5 ms here .*"
    with pytest.raises(ConfigError, match=fastest + "at least 8.3"):
        check_budget(TABLE, POINTS, 3.0)
    with pytest.raises(ConfigError, match=r"take up to 7\.5 ms .* 6\.0 ms pass outside .* at least 14\.9"):
        check_budget(TABLE, POINTS, 8.0, overhead_ms=6.0)
    with pytest.raises(ConfigError, match="but 500 of 1000 tokens"):
        check_budget(TABLE, POINTS[3:], 10.0)
    with pytest.raises(ConfigError, match="at least 8"):
        check_budget(TABLE, POINTS, float("nan"))
    check_budget(TABLE, POINTS, 7.6)


def test_what_a_budget_can_hold_is_judged_by_how_frames_run_now():
    check_budget(TABLE, POINTS, 5.0, slowdown=0.6)
    with pytest.raises(ConfigError, match=r"take up to 15\.0 ms .* at least 16\.5"):
        check_budget(TABLE, POINTS, 7.6, slowdown=2.0)


def test_an_infeasible_budget_gets_the_fastest_point_and_names_what_would_hold():
    decision = controller_for(3.0).decide()
    assert decision.point.capacity == 125 and not decision.feasible and decision.least_ms == 7.5


def test_without_a_budget_nothing_is_bounded_but_everything_is_learnt():
    controller = BudgetController(TABLE, POINTS)
    series = simulate(load=lambda frame: 1.5, controller=controller, frames=30)
    assert {capacity for capacity, _ in series} == {1000}
    controller.retarget(BUDGET_MS, POINTS)
    assert controller.decide().point.capacity == 250  # 10 ms times 1.5; 375 tokens would take 18.75


def test_another_budget_takes_effect_with_the_next_frame():
    controller = controller_for()
    for _ in range(40):
        controller.observe(controller.decide().point, TABLE[controller.decide().point], overhead_ms=6.0)
    controller.retarget(BUDGET_MS, POINTS, counts_overhead=False)
    assert controller.decide().point.capacity == 625
    controller.retarget(14.0, POINTS[2:], counts_overhead=False)
    assert controller.decide().point.capacity == 375
    controller.retarget(26.0, POINTS)
    assert controller.decide().point.capacity == 625  # 17.5 fits into 26 - 6
    assert controller.overhead_ms == pytest.approx(6.0, rel=0.03)
    assert controller.slowdown == pytest.approx(1.0, rel=0.03)


SIZES = {1.0: 1000, 0.75: 560, 0.5: 250}
GRID = [
    OperatingPoint(scale, round(total * share), total) for scale, total in SIZES.items() for share in (0.25, 0.5, 1.0)
]
GRID_TABLE = LatencyTable(
    {0: {(p.tokens_total, p.capacity): 2 + p.tokens_total / 100 + p.capacity / 25 for p in GRID}}
)


def test_without_measured_accuracy_size_comes_before_capacity():
    front = front_of(GRID, GRID_TABLE, WorthOrder())
    shares = [(point.input_scale, point.share) for point in front]
    assert shares == [(0.5, 0.248), (0.5, 0.5), (0.75, 0.25), (0.75, 0.5), (1.0, 0.25), (1.0, 0.5), (1.0, 1.0)]
    assert [GRID_TABLE[p] for p in front] == sorted(GRID_TABLE[p] for p in front)


def test_measured_accuracy_decides_which_axis_is_traded():
    def front(loss_by_size: float, loss_by_merging: float) -> list[tuple[float, float]]:
        accuracies = [
            Accuracy(scale, share, 60.0 - loss_by_size * (1 - scale) - loss_by_merging * (1 - share))
            for scale in SIZES for share in (0.25, 1.0)
        ]  # fmt: skip
        return [(p.input_scale, round(p.share, 1)) for p in front_of(GRID, GRID_TABLE, WorthOrder(accuracies))]

    merging_is_free, shrinking_is_free = front(20.0, 0.1), front(0.1, 20.0)
    assert (1.0, 0.2) in merging_is_free and (0.5, 1.0) not in merging_is_free
    assert (0.5, 1.0) in shrinking_is_free and (1.0, 0.2) not in shrinking_is_free


def test_chance_gains_from_merging_do_not_bar_more_tokens():
    worth = WorthOrder([Accuracy(1.0, 0.25, 60.3), Accuracy(1.0, 1.0, 60.0)])
    assert worth(POINTS[7]) > worth(POINTS[2]) > worth(POINTS[0])


def test_chance_gains_from_shrinking_do_not_bar_the_full_size_and_real_ones_do():
    def best(gain: float) -> float:
        worth = WorthOrder([Accuracy(0.75, 1.0, 60.0 + gain), Accuracy(1.0, 1.0, 60.0)])
        return max(GRID, key=worth).input_scale

    assert best(0.4) == 1.0 and best(4.0) == 0.75


def two_counts() -> BudgetController:
    """Two threads take 60 % of one thread's time while nobody else computes."""
    of_one = {(1000, point.capacity): 10.0 + 20.0 * point.share for point in POINTS}
    table = LatencyTable({2: {tokens: 0.6 * ms for tokens, ms in of_one.items()}, 1: of_one})
    return BudgetController(table, POINTS, BUDGET_MS)


def drive(controller: BudgetController, frames: int, slowdown_of_two: float, others: float) -> list[tuple[int, int]]:
    """(threads, capacity) of each frame, where one thread is never slowed down."""
    series = []
    for _ in range(frames):
        decision = controller.decide()
        true_ms = (10.0 + 20.0 * decision.point.share) * (1.0 if decision.threads == 1 else 0.6 * slowdown_of_two)
        controller.observe(decision.point, true_ms, threads=decision.threads, others=others)
        series.append((decision.threads, decision.point.capacity))
    return series


def test_threads_that_wait_for_others_are_given_up_and_taken_again():
    controller = two_counts()
    idle = drive(controller, 40, 1.0, others=0.1)
    assert set(idle[10:]) == {(2, 875)}
    loaded = drive(controller, 60, 4.0, others=1.0)
    assert set(loaded[5:]) == {(1, 250)}  # 15 ms on one thread; 375 tokens take 17.5, which leaves no headroom
    after = drive(controller, 30, 1.0, others=0.1)
    assert after[-1] == (2, 875)


def test_a_little_less_load_is_no_reason_to_try_again():
    controller = two_counts()
    drive(controller, 40, 4.0, others=0.6)
    for others in (0.9, 0.2, 0.7, 0.3) * 20:  # it wavers
        assert {threads for threads, _ in drive(controller, 3, 4.0, others=others)} == {1}


def test_what_failed_under_a_load_is_tried_again_once_it_is_gone():
    controller = two_counts()
    drive(controller, 40, 1.0, others=0.1)
    for _ in range(4):
        drive(controller, 20, 4.0, others=1.0)
        assert drive(controller, 30, 1.0, others=0.1)[-1] == (2, 875)


def test_threads_that_met_a_bad_moment_of_an_idle_machine_are_tried_again():
    controller = two_counts()
    drive(controller, 40, 1.0, others=0.1)
    assert {threads for threads, _ in drive(controller, 12, 4.0, others=0.1)[5:]} == {1}
    after = drive(controller, 90, 1.0, others=0.1)
    assert after[30][0] == 1 and after[-1] == (2, 875)


def test_threads_that_keep_waiting_on_an_idle_machine_cost_few_frames():
    controller = two_counts()
    drive(controller, 40, 1.0, others=0.1)
    of_two = [threads for threads, _ in drive(controller, 1000, 4.0, others=0.1)].count(2)
    assert 3 < of_two <= 15  # tried again after 60 frames, then 120, 240 and 480 later


def test_another_budget_is_not_kept_from_threads_by_spikes_of_long_ago():
    controller = two_counts()
    drive(controller, 40, 1.0, others=0.6)
    drive(controller, 60, 1.0, others=0.6)  # a load, so that nothing is forgotten by itself
    for _ in range(2):
        drive(controller, 1, 2.2, others=0.6)
        drive(controller, 1, 1.0, others=0.6)
    alone = {threads for threads, _ in drive(controller, 50, 1.0, others=0.6)}
    controller.retarget(0.8 * BUDGET_MS, POINTS)
    assert alone == {1} and {threads for threads, _ in drive(controller, 10, 1.0, others=0.6)} == {2}


def test_a_budget_moves_along_both_axes():
    front = front_of(GRID, GRID_TABLE, WorthOrder())
    controller = BudgetController(GRID_TABLE, front, 16.0)
    assert controller.decide().point == OperatingPoint(0.75, 140, 560)  # 13.2 ms; twice as many tokens take 18.8
    for _ in range(8):
        controller.observe(controller.decide().point, 1.6 * GRID_TABLE[controller.decide().point])
    assert controller.decide().point.input_scale == 0.5 and controller.decide().feasible


def test_same_observations_same_decisions():
    assert simulate(noise=gauss(0.1), seed=3) == simulate(noise=gauss(0.1), seed=3)


def test_a_budget_that_only_more_threads_can_hold_is_held():
    fast, slow = POINTS[0], POINTS[-1]  # of which two threads gain the first too little, and the second enough
    table = LatencyTable({2: {(1000, 125): 90.0, (1000, 1000): 95.0}, 1: {(1000, 125): 100.0, (1000, 1000): 110.0}})
    decision = BudgetController(table, [fast, slow], 97.0).decide()
    assert (decision.point, decision.threads, decision.feasible, decision.least_ms) == (slow, 2, True, 95.0)
    assert not BudgetController(table, [fast, slow], 94.0).decide().feasible
