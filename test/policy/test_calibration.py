# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Timing operating points, and keeping what was measured."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
from test_policy import STEPS, Bench

from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.engine.ladder import OperatingPoint
from clustvit_ros.errors import EngineError
from clustvit_ros.policy.calibration import Calibration, CalibrationCache, CalibrationKey, LatencyTable, points_of

SIZE = (128, 128)  # 64 tokens, a rung every 8
POINTS = tuple(OperatingPoint(1.0, capacity, 64) for capacity in (8, 16, 64))
TABLE = LatencyTable({0: {(64, 8): 4.0, (64, 16): 8.5, (64, 64): 30.25}})


@pytest.fixture
def key():
    engine = ScriptedEngine()
    engine._info = dataclasses.replace(engine.info, model_sha256="1234")
    return CalibrationKey.of(engine, 2, SIZE, POINTS)


def measured(engine, on_progress=lambda share: None):
    calibration = Calibration(engine, SIZE)
    while not calibration.done:
        calibration.step()
        on_progress(calibration.progress)
    return {kept: value for _, (_, kept), value in calibration.table().items()}


def test_every_capacity_is_timed(scripted_engine):
    engine, _ = scripted_engine(lambda call, kept, total: 2.0 + kept)
    shares = []
    assert measured(engine, shares.append) == pytest.approx({c: 2.0 + c for c in range(8, 65, 8)})
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_calls_come_after_a_pause_as_frames_do(scripted_engine):
    engine, _ = scripted_engine(lambda call, kept, total: 1.0)
    calibration = Calibration(engine, SIZE)
    started_s = time.monotonic()
    for _ in range(10):
        calibration.step()
    assert time.monotonic() - started_s >= 0.1


def test_other_processes_do_not_spoil_it(scripted_engine):
    engine, _ = scripted_engine(lambda call, kept, total: kept * (3.0 if call % 2 else 1.0))
    assert measured(engine) == pytest.approx({c: float(c) for c in range(8, 65, 8)})


def test_a_slow_engine_is_not_timed_for_minutes(scripted_engine):
    engine, clock = scripted_engine(lambda call, kept, total: 60.0 * kept)
    calibration = Calibration(engine, SIZE, limit_ms=4000.0)
    while not calibration.done:
        calibration.step()
    assert clock.now_s < 8.0
    # What there was no time for is interpolated.
    table = calibration.table()
    assert [table[OperatingPoint(1.0, c, 64)] for c in (8, 32, 64)] == pytest.approx([480.0, 1920.0, 3840.0], rel=0.3)


def test_of_several_sizes_three_are_timed_and_the_rest_interpolated(scripted_engine):
    engine, _ = scripted_engine(lambda call, kept, total: 10.0 + kept)  # times the share of the full size's tokens
    calibration = Calibration(engine, SIZE, (0.375, 0.5, 0.625, 0.75, 0.875, 1.0))
    assert {point.input_scale for point in calibration.points} == {0.375, 0.75, 1.0} and len(calibration.points) == 9
    while not calibration.done:
        calibration.step()
    table = calibration.table()
    for scale, capacity in ((1.0, 64), (1.0, 24), (0.75, 36), (0.375, 9)):
        total = engine.capacities(SIZE, scale)[-1]
        assert table[OperatingPoint(scale, capacity, total)] == pytest.approx((10.0 + capacity) * total / 64)
    between = table[OperatingPoint(0.5, 16, 16)]
    assert table[OperatingPoint(0.375, 9, 9)] < between < table[OperatingPoint(0.75, 36, 36)]


def test_scales_that_give_one_size_are_one_point(scripted_engine):
    engine, _ = scripted_engine(1.0)
    points = points_of(engine, (64, 64), (0.9, 0.95, 1.0))
    assert {point.input_scale for point in points} == {1.0} and len(points) == 8


@pytest.mark.parametrize(("others_s", "disturbed"), [(0.0, False), (0.1, False), (0.6, True), (None, False)])
def test_it_knows_whether_others_computed_meanwhile(others_s, disturbed):
    now = [0.0]
    calibration = Calibration(
        ScriptedEngine(), SIZE, others_s=lambda: None if others_s is None else now[0] * others_s,
        clock=lambda: now[0],
    )  # fmt: skip
    now[0] = 5.0
    assert calibration.disturbed is disturbed


def test_what_was_stored_is_found_again(key, tmp_path):
    cache = CalibrationCache(tmp_path / "not yet there")
    assert cache.load(key) is None
    cache.store(key, TABLE)
    assert cache.load(key).measured == TABLE.measured
    assert [path.suffix for path in cache.path(key).parent.iterdir()] == [".json"]
    assert cache.path(key).name.startswith("scripted-128x128-")


@pytest.mark.parametrize(
    "change",
    [
        {"model_sha256": "5678"}, {"engine": "torch"}, {"precision": "float16"}, {"device": "cuda:0 (Orin)"},
        {"threads": 1}, {"image_size": (64, 64)}, {"points": POINTS[:2]}, {"thread_counts": (2, 1)},
        {"machine": "another"},
        {"power_mode": "pmode:0001"}, {"version": "9"},
    ],
)  # fmt: skip
def test_another_key_is_another_calibration(change, key, tmp_path):
    cache = CalibrationCache(tmp_path)
    cache.store(key, TABLE)
    assert cache.load(dataclasses.replace(key, **change)) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:20],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00\xff",
        lambda text: text.replace('"format": 5', '"format": 4'),
        lambda text: text.replace('"1234"', '"4321"'),
        lambda text: text.replace("8.5", '"slow"'),
        lambda text: text.replace("8.5", "-8.5"),
        lambda text: text.replace("8.5", "NaN"),
        lambda text: text.replace("16,", "17,"),
        lambda text: text.replace('"latency_ms"', '"latency"'),
    ],
)
def test_a_damaged_file_is_none_and_is_overwritten(damage, key, tmp_path):
    cache = CalibrationCache(tmp_path)
    cache.store(key, TABLE)
    text = cache.path(key).read_text()
    cache.path(key).write_text(damage(text))
    assert cache.load(key) is None
    cache.store(key, TABLE)
    assert cache.load(key).measured == TABLE.measured
    assert cache.path(key).read_text() == text


def test_engines_without_weights_are_not_kept(key, tmp_path):
    cache = CalibrationCache(tmp_path)
    anonymous = dataclasses.replace(key, model_sha256="")
    cache.store(anonymous, TABLE)
    assert cache.load(anonymous) is None and not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(key, tmp_path, monkeypatch):
    cache = CalibrationCache(tmp_path)
    cache.store(key, TABLE)

    def fail(*_paths):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.store(key, LatencyTable({0: {(64, 64): 3.0}}))
    assert cache.load(key).measured == TABLE.measured
    assert len(list(tmp_path.iterdir())) == 1


def test_the_users_cache_is_the_default(key, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    CalibrationCache().store(key, TABLE)
    (path,) = (tmp_path / "clustvit_ros" / "calibration").iterdir()
    assert json.loads(path.read_text())["key"]["model_sha256"] == "1234"


def test_a_size_larger_than_was_timed_is_not_chosen_before_it_is(tmp_path):
    bench = Bench(tmp_path, latency_budget_ms=9, input_scale=0.5, min_input_scale=0.5).calibrated()
    bench.set(input_scale=1.0)
    for _ in range(12):
        plan = bench.frame()
        assert (plan.budget_state, plan.input_size) == ("held", (64, 64)), "what is known, until more is"
    bench.set(min_input_scale=1.0)
    plan = bench.frame()
    assert (plan.budget_state, plan.settings.token_capacity) == ("calibrating", 8), "nothing of it is known"
    for _ in range(3):
        plan = bench.frame(idle=2 * STEPS)
    assert (plan.budget_state, plan.settings.token_capacity) == ("held", 16)
    assert bench.policy.status.misses == 0


def test_a_calibration_that_failed_is_tried_again_with_other_sizes(tmp_path):
    bench = Bench(tmp_path, latency_budget_ms=21)
    bench.engine.failure = EngineError("out of memory")
    bench.frame()
    bench.engine.failure = None
    assert bench.frame(idle=STEPS).budget_state == "uncalibrated"
    bench.set(input_scale=0.5, min_input_scale=0.5)
    bench.frame(idle=2 * STEPS)
    assert bench.frame().budget_state == "held" and not bench.policy.status.problem()


def test_frames_of_a_size_that_was_not_timed_say_nothing_about_the_load(tmp_path):
    bench = Bench(tmp_path, latency_budget_ms=3, input_scale=0.5, min_input_scale=0.5).calibrated()
    bench.set(latency_budget_ms=0.0, input_scale=1.0)
    for _ in range(30):
        bench.frame()
    bench.set(latency_budget_ms=3, input_scale=0.5)
    assert bench.frame().settings.token_capacity == 16


def test_a_replay_takes_other_bounds_whatever_budget_it_was_started_with(tmp_path):
    bench = Bench(tmp_path, latency_budget_ms=50, processing="every_frame")
    bench.set(input_scale=0.5, min_input_scale=0.5, budget_reference="stamp", min_tokens=5)
    assert bench.frame().input_size == (64, 64)


@pytest.mark.parametrize(("size", "exempt", "fewest"), [(SIZE, 0.1, 8), ((240, 320), 0.1, 37), ((240, 320), 0.24, 75)])
def test_exempt_tokens_bind_a_budget_to_the_rung_that_holds_them(size, exempt, fewest, tmp_path):
    bench = Bench(tmp_path, latency_budget_ms=2, merge_exempt_region="0 0 0.1 1")
    bench.exempt = exempt  # 30 and 72 of 300 tokens, whose rungs are 37 and 75
    for _ in range(3):
        plan = bench.frame(size=size)
    assert plan.settings.token_capacity == fewest


def test_what_waits_for_a_measurement_is_no_example_whichever_camera_it_is_from(tmp_path):
    bench = Bench(tmp_path, latency_budget_ms=40, budget_reference="stamp").calibrated()
    for _ in range(20):
        assert bench.frame(size=(256, 256)).budget_state == "calibrating"  # by one call after it
        plan = bench.frame(overhead_ms=30.0)
        assert (plan.budget_state, plan.settings.token_capacity) == ("held", 64)
