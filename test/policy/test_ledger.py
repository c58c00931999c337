# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A camera's ledger: counts, percentiles, levels and sentences; and tables of latencies."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustvit_ros.engine import Stats
from clustvit_ros.engine.engine import FrameRecord
from clustvit_ros.engine.ladder import OperatingPoint
from clustvit_ros.errors import ConfigError
from clustvit_ros.policy import LatencyTable, LatencyWindow, percentile
from clustvit_ros.policy.ledger import ERROR, OK, WARN, Health, Ledger, judge, lost_share

STATS = Stats(tokens_total=9, tokens_kept=4.0, token_capacity=5, merge_threshold=0.5, total_ms=20.0)


def ledger(*problems: str, outcome: str = "segmented", **values: object) -> Ledger:
    """A ledger with one segmented frame, and one failed and rejected frame for each problem."""
    found = Ledger()
    found.add(FrameRecord(outcome=outcome, stats=STATS, **values))  # type: ignore[arg-type]
    for problem in problems:
        found.add(FrameRecord(outcome="rejected", problem=problem))
        found.add(FrameRecord(outcome="failed", problem=problem))
    return found


NO_CLOUD = ledger()
NO_CLOUD.add_points("unmatched", "no cloud")
ACTIVE = Health(state="active", input_topic="/image", ledger=ledger())


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({}, OK, "segmenting"),
        ({"ledger": Ledger()}, OK, "waiting for the first image"),
        ({"state": "inactive"}, OK, "inactive: waiting for a lifecycle transition"),
        ({"state": "finalized"}, ERROR, "finalized: shut down for good; start the process again"),
        ({"state": "unconfigured", "loading": "loading model x"}, OK, "unconfigured: loading model x"),
        ({"state": "unconfigured", "fault": "configuring failed: no model"}, ERROR, "configuring failed: no model"),
        ({"input_silence_s": 3.5}, ERROR, "no image on /image for 3.5 s"),
        ({"input_silence_s": 3.5, "input_qos_problem": "bad QoS"}, ERROR, "no image on /image for 3.5 s (bad QoS)"),
        ({"recent": Counter(failed=2), "ledger": ledger("no memory")}, ERROR, "fails on every frame: no memory"),
        ({"recent": Counter(failed=1, segmented=9), "ledger": ledger("x")}, WARN, "engine failed on 1 frames: x"),
        ({"recent": Counter(rejected=3), "ledger": ledger("step")}, WARN, "3 unusable images: step"),
        ({"budget_problem": "budget missed"}, WARN, "budget missed"),
        ({"budget_problem": "budget missed", "throttling": "too hot"}, WARN, "budget missed; too hot"),
        ({"budget_problem": "x", "input_silence_s": 3.5}, ERROR, "no image on /image"),
        ({"recent": Counter(failed=1, late=9), "ledger": ledger("x")}, WARN, "engine failed on 1 frames: x"),
        ({"ledger": ledger(outcome="late")}, OK, "segmenting"),
        ({"ledger": ledger(arrival_age_ms=4000.0)}, WARN, "images are 4.0 s old when they arrive"),
        ({"ledger": ledger(arrival_age_ms=-4000.0)}, WARN, "images are 4.0 s from the future"),
        ({"ledger": ledger(arrival_age_ms=2900.0)}, OK, "segmenting"),
        ({"ledger": ledger(stamped=False)}, WARN, "without a time stamp"),
        ({"input_qos_problem": "bad QoS"}, WARN, "bad QoS"),
        ({"recent": Counter(unwatched=9)}, OK, "nobody subscribes to an output: 9 frames counted, not segmented"),
        ({"recent": Counter(unwatched=9), "budget_problem": "of old"}, OK, "nobody subscribes"),
        ({"recent": Counter(unwatched=9), "output_qos_problem": "bad QoS"}, WARN, "bad QoS"),
        ({"recent": Counter(unwatched=9), "input_silence_s": 3.5}, ERROR, "no image on /image"),
        ({"recent": Counter(unwatched=9, segmented=1)}, OK, "segmenting"),
        ({"recent": Counter(points_unmatched=1, points_published=9), "ledger": NO_CLOUD}, OK, "segmenting"),
        ({"recent": Counter(points_unmatched=9), "ledger": NO_CLOUD}, WARN, "no labelled points: no cloud"),
        ({"recent": Counter(points_refused=1, points_published=9), "ledger": NO_CLOUD}, WARN, "no labelled points"),
    ],
)
def test_the_worst_thing_decides(change: dict[str, object], level: int, text: str) -> None:
    got_level, sentence = judge(dataclasses.replace(ACTIVE, **change))  # type: ignore[arg-type]
    assert got_level == level
    assert text in sentence


def test_every_frame_is_counted_once_and_told_once() -> None:
    found = ledger("bad")
    found.add(FrameRecord(outcome="unwatched"))
    for arrival_s in (1.0, 1.5, 2.5):
        found.receive(arrival_s, 10.0)
    found.drop()
    found.drop(over_rate=True)
    assert found.counts() == {
        "received": 3, "segmented": 1, "dropped": 1, "over_rate": 1, "filled": 0, "late": 0, "unwatched": 1,
        "rejected": 1, "failed": 1,
    }  # fmt: skip
    assert found.take_recent()["rejected"] == 1
    assert not any(found.take_recent().values())
    pairs = found.window_pairs()
    assert (pairs["input_period_p50_ms"], pairs["input_period_max_ms"], pairs["input_age_p95_ms"]) == (
        "500.00", "1000.00", "10.00",
    )  # fmt: skip
    assert pairs["engine_p50_ms"] == "20.00"
    assert found.count_pairs()["frames_dropped"] == "1"
    assert not [name for name in found.count_pairs() if name.startswith("points")], "nobody wanted any"
    found.add_points("published", "")
    assert (found.count_pairs()["points_published"], found.take_recent()["points_published"]) == ("1", 1)


def test_a_record_says_what_was_done_and_labels_never_depend_on_the_clock() -> None:
    record = FrameRecord(stats=STATS, mask_size=(4, 6), age_ms=12.0, plan={"budget_state": "off"})
    pairs = record.as_pairs()
    assert (pairs["mask_size"], pairs["age_ms"], pairs["published"], pairs["budget_state"]) == (
        "4x6", "12.000", "true", "off",
    )  # fmt: skip
    assert record.label_pairs().items() <= pairs.items()
    assert not [name for name in record.label_pairs() if name.endswith("_ms")]


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=400), st.sampled_from((0.5, 0.95, 0.99, 1.0)))
def test_percentiles_are_latencies_that_occurred(values, share):
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6


def test_one_definition_of_percentile():
    # The same 20 samples once had p95 of 100 and of 110 in one status, and a p99 that no frame took.
    window = LatencyWindow()
    for value in (*range(10, 200, 10), 300):
        window.add(float(value))
    assert window.as_pairs("age") == {"age_p50_ms": "100.00", "age_p95_ms": "190.00", "age_p99_ms": "300.00"}
    assert window.as_pairs("age", {"max": 1.0}) == {"age_max_ms": "300.00"}


def test_a_percentile_of_an_array_goes_into_json():
    assert type(percentile(np.array([1.0, 2.0]), 0.5)) is float


def test_the_oldest_are_forgotten_and_nonsense_is_left_out():
    window = LatencyWindow(2)
    assert window.as_pairs("age") == {}
    for value in (9.0, 1.0, math.nan, math.inf, 2.0):
        window.add(value)
    assert window.as_pairs("age", {"p50": 0.5, "max": 1.0}) == {"age_p50_ms": "1.00", "age_max_ms": "2.00"}
    with pytest.raises(ConfigError, match="percentile: got no value"):
        percentile([], 0.5)


@given(st.dictionaries(st.integers(1, 5000), st.floats(0.01, 1e4), min_size=1, max_size=12))
def test_table_never_falls(latency_ms):
    table = LatencyTable({0: {(5000, kept): value for kept, value in latency_ms.items()}})
    values = [value for _, _, value in table.items()]
    assert values == sorted(values)
    assert sum(values) == pytest.approx(sum(latency_ms.values()))


def test_table_interpolates_between_rungs_and_holds_beyond():
    table = LatencyTable({0: {(800, 100): 10.0, (800, 200): 20.0}})
    assert [table[OperatingPoint(1.0, c, 800)] for c in (1, 100, 150, 200, 800)] == [10.0, 10.0, 15.0, 20.0, 20.0]


def test_table_interpolates_sizes_at_the_same_share_of_tokens():
    table = LatencyTable({0: {(100, 50): 5.0, (100, 100): 10.0, (400, 200): 25.0, (400, 400): 40.0}})
    assert table[OperatingPoint(0.75, 250, 250)] == pytest.approx(25.0)
    assert table[OperatingPoint(0.75, 125, 250)] == pytest.approx(15.0)
    assert table[OperatingPoint(0.3, 50, 50)] == 10.0 and table[OperatingPoint(1.0, 900, 900)] == 40.0
    assert table.covers([OperatingPoint(0.75, 1, 250)]) and not table.covers([OperatingPoint(0.3, 50, 50)])


@pytest.mark.parametrize(
    "latency_ms", [{}, {(8, 0): 1.0}, {(8, 9): 1.0}, {(8, 8): 0.0}, {(8, 8): math.nan}, {(8, 8): math.inf}]
)
def test_unusable_tables_are_refused(latency_ms):
    with pytest.raises(ConfigError, match="latency table"):
        LatencyTable({0: latency_ms})


@pytest.mark.parametrize("period_ms", [33, 200])
@pytest.mark.parametrize("lost", [0.0, 0.3, 0.66])
def test_gaps_in_the_stamps_show_what_gets_lost(period_ms, lost):
    rng = np.random.default_rng(int(period_ms + 100 * lost))
    beats = np.flatnonzero(rng.random(4000) >= lost)[:41]
    stamps_ns = [int(1e18 + beat * period_ms * 1e6 + rng.normal(0, 0.02 * period_ms * 1e6)) for beat in beats]
    true_share = 1 - 40 / (beats[-1] - beats[0])
    assert lost_share(stamps_ns) == pytest.approx(true_share, abs=0.1)
    assert lost_share(stamps_ns[:40]) == 0.0  # too few to tell


@pytest.mark.parametrize(
    "steps_ms",
    [
        np.random.default_rng(1).uniform(20, 200, 40),  # no pace: triggered by events
        [33] * 20 + [3000] + [33] * 19,  # a pause
        [66] * 20 + [5000] + [200] * 19,  # another camera after it
        [0] * 40, [-33] * 40, [33, -33] * 20,
    ],
)  # fmt: skip
def test_cameras_without_a_pace_lose_nothing_that_can_be_told(steps_ms):
    stamps_ns = np.cumsum([10**18, *(int(step * 1e6) for step in steps_ms)]).tolist()
    assert lost_share(stamps_ns) == lost_share([0] * 41) == 0.0
