# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Levels and sentences of the node's diagnostics."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from clustvit_ros.engine import Stats
from clustvit_ros.engine.engine import FrameRecord
from clustvit_ros.policy.ledger import ERROR, OK, WARN, Health, Ledger, judge

STATS = Stats(tokens_total=9, tokens_kept=4.0, token_capacity=5, merge_threshold=0.5, total_ms=20.0)


def ledger(*problems: str, outcome: str = "segmented", **values: object) -> Ledger:
    """A ledger with one segmented frame, and one failed and rejected frame for each problem."""
    found = Ledger()
    found.add(FrameRecord(outcome=outcome, stats=STATS, **values))  # type: ignore[arg-type]
    for problem in problems:
        found.add(FrameRecord(outcome="rejected", problem=problem))
        found.add(FrameRecord(outcome="failed", problem=problem))
    return found


ACTIVE = Health(state="active", input_topic="/image", ledger=ledger())


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({}, OK, "segmenting"),
        ({"ledger": Ledger()}, OK, "waiting for the first image"),
        ({"state": "inactive"}, OK, "inactive: waiting for a lifecycle transition"),
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
    ],
)
def test_the_worst_thing_decides(change: dict[str, object], level: int, text: str) -> None:
    got_level, sentence = judge(dataclasses.replace(ACTIVE, **change))  # type: ignore[arg-type]
    assert got_level == level
    assert text in sentence


def test_every_frame_is_counted_once_and_told_once() -> None:
    found = ledger("bad")
    for arrival_s in (1.0, 1.5, 2.5):
        found.receive(arrival_s, 10.0)
    found.dropped += 1
    assert found.counts() == {"received": 3, "segmented": 1, "dropped": 1, "late": 0, "rejected": 1, "failed": 1}
    assert found.take_recent()["rejected"] == 1
    assert not any(found.take_recent().values())
    pairs = found.window_pairs()
    assert (pairs["input_period_p50_ms"], pairs["input_period_max_ms"], pairs["input_age_p95_ms"]) == (
        "500.00", "1000.00", "10.00",
    )  # fmt: skip
    assert pairs["engine_p50_ms"] == "20.00"
    assert found.count_pairs()["frames_dropped"] == "1"


def test_a_record_says_what_was_done_and_labels_never_depend_on_the_clock() -> None:
    record = FrameRecord(stats=STATS, mask_size=(4, 6), age_ms=12.0, plan={"budget_state": "off"})
    pairs = record.as_pairs()
    assert (pairs["mask_size"], pairs["age_ms"], pairs["published"], pairs["budget_state"]) == (
        "4x6", "12.000", "true", "off",
    )  # fmt: skip
    assert record.label_pairs().items() <= pairs.items()
    assert not [name for name in record.label_pairs() if name.endswith("_ms")]
