# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Calibration between frames, and what a budget allows, with scripted time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clustvit_ros.engine import Prediction, ScriptedEngine, Settings, Stats
from clustvit_ros.errors import ConfigError, EngineError
from clustvit_ros.policy import Plan, Policy
from clustvit_ros.policy.calibration import CalibrationCache
from clustvit_ros.policy.parameter_spec import build
from clustvit_ros.policy.parameters import SegmentationParameters
from clustvit_ros.policy.plan import FramePace

SIZE = (128, 128)  # 64 tokens, a rung every 8
STEPS = 48  # 40 of the calibration, and one for each point that may come


class Engine(ScriptedEngine):
    """Takes half a millisecond for each token, in scripted time; fails on request."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.failure: Exception | None = None
        self.calls = 0
        self.warmed: list[tuple[int, int] | None] = []
        super().__init__(lambda _call, kept, _total: kept / 2, self._sleep_scripted, lambda: self.now_s)

    def _sleep_scripted(self, seconds: float) -> None:
        self.now_s += seconds

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        self.warmed.append(image_size)

    def segment(self, images: Any, settings: Settings = Settings()) -> Any:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        return super().segment(images, settings)


class Logger:
    """Keeps what is logged, by level."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {"info": [], "warning": [], "error": []}

    def info(self, text: str, **_throttle: Any) -> None:
        self.lines["info"].append(text)

    def warning(self, text: str) -> None:
        self.lines["warning"].append(text)

    def error(self, text: str) -> None:
        self.lines["error"].append(text)


class Bench:
    """A policy, and frames to put through it."""

    def __init__(self, tmp_path: Path, **values: Any) -> None:
        self.engine, self.logger = Engine(), Logger()
        self.others_s = 0.0
        self.exempt = 0.0
        self.policy = Policy(
            self.engine, self.logger, CalibrationCache(tmp_path), lambda: self.engine.now_s, lambda: self.others_s
        )
        self.parameters = build(SegmentationParameters, {"merge_threshold": 1.0, "min_input_scale": 1.0, **values})

    def set(self, **values: Any) -> None:
        """Change parameters as the parameter server does: checked first."""
        changed = replace(self.parameters, **values)
        self.policy.check(self.parameters, changed)
        self.parameters = changed

    def frame(self, overhead_ms: float = 0.0, idle: int = 0, size: tuple[int, int] = SIZE, load: float = 1.0) -> Plan:
        """Segment one frame; then `idle` times nothing waits. Returns its plan."""
        plan = self.policy.plan([np.zeros((*size, 3), np.uint8)], self.parameters)
        scale = plan.settings.input_scale
        total = self.engine.capacities(size, scale)[-1]
        capacity = min(plan.settings.token_capacity or total, total)
        engine_ms = capacity / 2 * (total / self.engine.capacities(size)[-1]) * load
        stats = Stats(
            total, capacity, capacity, self.parameters.merge_threshold, engine_ms, input_size=plan.input_size,
            input_scale=scale, tokens_exempt=int(self.exempt * total),
        )  # fmt: skip
        result = Prediction(np.zeros((1, *size), np.uint8), None, None, stats)
        self.policy.learn(plan, result, [engine_ms + overhead_ms])
        answers = iter([True] * idle + [False])
        self.policy.use_idle_time(lambda: next(answers))
        return plan

    def calibrated(self) -> Bench:
        """Let the first calibration finish, with a budget that everything fits."""
        wanted, self.parameters = self.parameters, replace(self.parameters, latency_budget_ms=60_000.0)
        if wanted.latency_budget_ms:
            self.parameters = wanted
        self.frame(idle=STEPS)
        self.parameters = wanted
        assert self.policy.status.table is not None
        self.frame()
        return self


def test_calibration_takes_one_measurement_per_frame_and_all_idle_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=21)
    for frame in range(1, 4):
        assert bench.frame().budget_state == "calibrating"
        assert bench.engine.calls == frame
    bench.frame(idle=STEPS)
    assert bench.engine.calls == STEPS
    plan = bench.frame()
    assert (plan.budget_state, plan.settings.token_capacity) == ("held", 40)
    assert bench.engine.calls == STEPS
    assert bench.engine.warmed == [SIZE]
    assert bench.logger.lines["info"][0].startswith("calibrating 8 operating points for 128x128 images")
    assert bench.logger.lines["info"][-1] == (
        "latency of 128x128 images: 8 of 64 tokens 4.0 ms, 16 of 64 tokens 8.0 ms, 24 of 64 tokens 12.0 ms, "
        "32 of 64 tokens 16.0 ms, 40 of 64 tokens 20.0 ms, 48 of 64 tokens 24.0 ms, 56 of 64 tokens 28.0 ms, "
        "64 of 64 tokens 32.0 ms"
    )


@pytest.mark.parametrize(
    ("values", "ceiling"),
    [
        ({}, 0),
        ({"token_capacity": 30}, 30),
        ({"latency_budget_ms": 21}, 8),
        ({"latency_budget_ms": 21, "min_tokens": 20}, 24),
        ({"latency_budget_ms": 21, "min_tokens": 999}, 64),
        ({"latency_budget_ms": 21, "min_tokens": 20, "token_capacity": 10}, 10),
    ],
)
def test_until_calibrated_a_budget_gets_the_fewest_tokens_allowed(
    values: dict[str, Any], ceiling: int, tmp_path: Path
) -> None:
    assert Bench(tmp_path, **values).frame().settings.token_capacity == ceiling


def test_without_a_budget_nothing_is_bounded_but_load_is_learnt(tmp_path: Path) -> None:
    bench = Bench(tmp_path).calibrated()
    for _ in range(30):
        plan = bench.frame(load=2.0)
        assert (plan.budget_state, plan.settings.token_capacity) == ("off", 0)
    bench.set(latency_budget_ms=21)
    assert bench.frame(load=2.0).settings.token_capacity == 16  # 8 ms, twice


def test_refusals_name_the_minimum_and_leave_the_settings(tmp_path: Path) -> None:
    bench = Bench(tmp_path).calibrated()
    least = r"got 3, but 8 of 64 tokens, .* take up to 4\.[01] ms here .* at least 4\.[4-6]"
    with pytest.raises(ConfigError, match=least):
        bench.set(latency_budget_ms=3)
    with pytest.raises(ConfigError, match="but 48 of 64 tokens, the fastest allowed, take up to 24"):
        bench.set(latency_budget_ms=10, min_tokens=41)
    for _ in range(30):
        bench.frame(overhead_ms=50.0)
    bench.set(latency_budget_ms=30)
    with pytest.raises(ConfigError, match=r"51\.2 ms pass outside the engine"):
        bench.set(budget_reference="stamp")
    with pytest.raises(ConfigError, match=r"with these values the budget in force cannot be held: .* 64 of 64 tokens"):
        bench.set(min_tokens=64)
    bench.set(merge_threshold=0.5)  # what does not concern the budget is none of its business
    assert bench.frame().parameters.budget_reference == "inference"


def test_before_calibration_a_budget_is_accepted_and_checked_later(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.set(latency_budget_ms=1)
    assert "accepted unchecked" in bench.logger.lines["info"][-1]
    bench.calibrated()
    assert "got 1, but 8 of 64 tokens, the fastest allowed, take up to 4.0 ms" in bench.logger.lines["error"][0]
    assert bench.frame().budget_state == "infeasible"
    problem = bench.policy.status.problem()
    assert problem.startswith("latency_budget_ms 1 cannot be held now: 8 of 64 tokens, the fastest")
    assert "the smallest budget that holds now is 4." in problem
    bench.set(latency_budget_ms=2)
    assert "eases the budget that is missed now, but not enough" in bench.logger.lines["warning"][-1]
    for worse, told in ({"latency_budget_ms": 1}, "got 1, but"), ({"min_tokens": 16}, "in force cannot be held: .* 16"):
        with pytest.raises(ConfigError, match=told):
            bench.set(**worse)


def test_stamp_reference_leaves_the_engine_what_remains(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=31, budget_reference="stamp").calibrated()
    for _ in range(30):
        plan = bench.frame(overhead_ms=9.0)
    assert plan.settings.token_capacity == 40  # 20 ms and 9 outside
    assert plan.decision.overhead_ms == pytest.approx(9.0, abs=0.3)


def test_misses_are_counted_and_forgotten_with_the_budget(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=21).calibrated()
    for _ in range(10):
        bench.frame(load=100.0)
    assert bench.policy.status.misses >= 10
    bench.set(latency_budget_ms=10_000)
    for _ in range(30):
        bench.frame()
    status = bench.policy.status
    assert (status.recent[0], status.problem()) == (0, "")
    assert status.misses >= 10


def test_another_image_size_has_another_table_and_both_are_remembered(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=21).calibrated()
    other = (64, 64)
    assert bench.frame(size=other).budget_state == "calibrating"
    bench.frame(size=other, idle=STEPS)
    calls = bench.engine.calls
    for size in (SIZE, other, SIZE):
        assert bench.frame(size=size).budget_state == "held"
    assert bench.engine.calls == calls
    assert bench.engine.warmed == [SIZE, other]


def test_a_stream_that_changes_its_size_does_not_add_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for height in range(1, 100):
        bench.frame(size=(height, 16))
    assert len(bench.policy._sizes) <= 16


def test_recalibration_measures_again_once_while_the_budget_is_held(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=21).calibrated()
    bench.set(recalibrate=True)
    assert bench.frame().budget_state == "held"
    bench.frame(idle=STEPS)
    assert bench.engine.calls == 2 * STEPS
    assert bench.policy.status.recalibrated is bench.parameters
    bench.frame(idle=STEPS)
    assert bench.engine.calls == 2 * STEPS
    bench.set(recalibrate=False)
    bench.frame()
    bench.set(recalibrate=True)
    bench.frame(idle=STEPS)
    assert bench.engine.calls == 3 * STEPS


def test_a_failing_calibration_does_not_stop_the_frames(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=21)
    bench.engine.failure = EngineError("out of memory")
    bench.frame()
    assert bench.logger.lines["error"] == ["calibration failed: out of memory"]
    plan = bench.frame()
    assert (plan.budget_state, plan.settings.token_capacity) == ("uncalibrated", 8)
    assert "calibration failed (out of memory)" in bench.policy.status.problem()
    bench.engine.failure = None
    bench.set(recalibrate=True)
    bench.frame(idle=STEPS)
    assert bench.frame().budget_state == "held"


def test_a_replay_plans_what_the_user_says_and_measures_nothing(tmp_path: Path) -> None:
    values = {"latency_budget_ms": 1, "deadline_policy": "drop", "token_capacity": 7, "processing": "every_frame"}
    bench = Bench(tmp_path, **values)
    plan = bench.frame(idle=STEPS, load=1e6)
    assert (plan.settings.token_capacity, plan.budget_ms, plan.budget_state) == (7, 0.0, "off")
    assert not plan.is_missed(1e6, 1e6)
    assert (bench.engine.calls, bench.engine.warmed) == (0, [SIZE])
    with pytest.raises(ConfigError, match="expected 0 while processing is every_frame"):
        bench.set(latency_budget_ms=2)
    bench.set(merge_threshold=0.5)


def test_a_plan_says_why_a_frame_is_made_as_it_is(tmp_path: Path) -> None:
    plan = Bench(tmp_path, latency_budget_ms=9, deadline_policy="drop", min_tokens=2, token_capacity=5).frame()
    expected = {
        "latency_budget_ms": "9", "budget_reference": "inference", "deadline_policy": "drop", "min_tokens": "2",
        "token_ceiling": "5", "budget_state": "calibrating",
    }  # fmt: skip
    assert expected.items() <= plan.as_pairs().items()
    assert plan.input_size == SIZE
    assert plan.is_missed(9.5, 0.0) and not plan.is_missed(8.5, 100.0)


def test_without_a_budget_nothing_is_measured(tmp_path: Path) -> None:
    bench = Bench(tmp_path, input_scale=0.75, min_input_scale=0.5)
    plan = bench.frame(idle=STEPS)
    assert bench.engine.calls == 0 and bench.policy.status.table is None
    assert (plan.settings.input_scale, plan.input_size, plan.settings.token_capacity) == (0.75, (96, 96), 0)


def test_a_budget_shrinks_the_input_within_the_users_bounds(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=0.55, min_input_scale=0.5)
    for _ in range(3):
        bench.frame(idle=STEPS)
    plan = bench.frame()
    assert plan.input_size == (64, 64) and plan.budget_state == "held"  # the size of 1/2 and of 9/16
    assert plan.settings.token_capacity == 4  # 2 ms at full size, a quarter of it at half the sides
    bench.set(input_scale=0.75, latency_budget_ms=30)
    assert bench.frame().settings.input_scale == 0.75
    bench.set(input_scale=0.5)
    assert bench.frame().settings.input_scale == 0.5
    with pytest.raises(ConfigError, match=r"min_input_scale: got 0\.8 with input_scale 0\.5, expected 0\.25 to 0\.5"):
        bench.set(min_input_scale=0.8)


def test_wider_bounds_are_calibrated_once_and_narrower_ones_are_known(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=21).calibrated()
    bench.set(min_input_scale=0.5)
    assert bench.frame().budget_state == "held"  # by what is known, until more is
    for _ in range(3):
        bench.frame(idle=STEPS)
    calls = bench.engine.calls
    assert calls > STEPS
    bench.set(min_input_scale=0.75)
    bench.frame(idle=STEPS)
    assert bench.engine.calls == calls


def test_min_tokens_and_token_capacity_bind_at_every_size(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=0.1, min_input_scale=0.375, min_tokens=12, token_capacity=20).calibrated()
    for _ in range(3):
        plan = bench.frame(idle=STEPS)
    assert plan.input_size == (64, 64) and plan.settings.token_capacity == 12  # 3/8 has 9 tokens in all
    bench.set(latency_budget_ms=60)
    assert (bench.frame().settings.input_scale, bench.frame().settings.token_capacity) == (1.0, 20)


def test_exempt_tokens_bind_at_every_size_and_are_part_of_what_a_budget_can_hold(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=60, min_input_scale=0.5, merge_exempt_region="0.4 0 1 1").calibrated()
    bench.exempt = 0.6  # of the tokens
    for _ in range(3):
        bench.frame(idle=STEPS)
    with pytest.raises(ConfigError, match=r"got 1, but .* of .* tokens"):
        bench.set(latency_budget_ms=1)
    bench.set(latency_budget_ms=3)
    plan = bench.frame()
    total = bench.engine.capacities(SIZE, plan.settings.input_scale)[-1]
    assert plan.settings.token_capacity >= 0.6 * total
    bench.exempt = 0.0
    for _ in range(12):
        bench.frame(idle=STEPS)
    bench.set(latency_budget_ms=0.55)
    bench.exempt = 0.6
    bench.frame()
    bench.set(merge_exempt_region=(), latency_budget_ms=0.56)  # what was exempt is so no more


def test_an_engine_that_goes_on_without_graphs_is_measured_anew(tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=20.0)
    bench.frame(idle=200)
    assert bench.policy.status.table is not None
    bench.engine._info = replace(bench.engine.info, engine="slower")
    bench.frame()
    assert bench.policy.status.table is None and bench.logger.lines["info"][-1].startswith("calibrating")


@pytest.mark.parametrize(("others_s", "kept"), [(0.0, 1), (1000.0, 0)])
def test_a_calibration_beside_other_work_is_used_but_not_kept(others_s: float, kept: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path, latency_budget_ms=21)
    info = replace(bench.engine.info, model_sha256="1234")
    bench.engine._info = info
    bench.frame()
    bench.others_s = others_s
    bench.frame(idle=STEPS)
    assert bench.frame().budget_state == "held"
    assert len(list(tmp_path.glob("*.json"))) == kept
    assert any("is not kept" in line for line in bench.logger.lines["info"]) == (not kept)


@pytest.mark.parametrize("rate_hz", [1.0, 7.0, 10.0, 20.0, 29.0, 30.0, 60.0])
def test_a_rate_is_kept_and_frames_are_spaced_as_evenly_as_the_cameras_allow(rate_hz: float) -> None:
    rng, pace = np.random.default_rng(3), FramePace()
    arrivals = np.arange(600) / 30.0 + rng.uniform(0.0, 0.008, 600)  # twenty seconds of 30 Hz, with DDS's jitter
    taken = np.array([arrival for arrival in arrivals if pace.admits(float(arrival), rate_hz)])
    expected = min(rate_hz, 30.0)
    assert len(taken) == pytest.approx(20.0 * expected, abs=2)
    gaps = np.diff(taken)
    assert gaps.min() > 1 / expected - 0.042 and gaps.max() < 1 / expected + 0.042


def test_no_second_sees_more_frames_than_the_rate_allows_whatever_the_camera_does() -> None:
    pace, rng, now_s, taken = FramePace(), np.random.default_rng(4), 0.0, []
    for _ in range(3000):  # bursts and pauses
        now_s += float(rng.choice([0.001, 0.002, 0.05, 0.4]))
        if pace.admits(now_s, 10.0):
            taken.append(now_s)
    seconds = [sum(start <= each < start + 1.0 for each in taken) for start in taken]
    assert max(seconds) <= 11


def test_another_rate_holds_at_once() -> None:
    pace = FramePace()
    assert [pace.admits(at_s, hz) for at_s, hz in ((0.0, 5e-324), (1.0, 0.01), (2.0, 0.01))] == [True, False, False]
    assert [pace.admits(2.0 + tenth / 10, 10.0) for tenth in range(1, 11)].count(True) >= 9
    assert all(pace.admits(4.0 + tenth / 1000, 0.0) for tenth in range(10))
