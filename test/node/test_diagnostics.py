"""Levels and sentences of the node's diagnostics."""

from __future__ import annotations

import dataclasses

import pytest

from clustvit_ros.node.diagnostics import ERROR, OK, WARN, FrameCounts, Health, LatencyWindow, judge

ACTIVE = Health(state="active", input_topic="/image", counts=FrameCounts(segmented=5))


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({}, OK, "segmenting"),
        ({"counts": FrameCounts()}, OK, "waiting for the first image"),
        ({"state": "inactive"}, OK, "inactive: waiting for a lifecycle transition"),
        ({"state": "unconfigured", "fault": "configuring failed: no model"}, ERROR, "configuring failed: no model"),
        ({"input_silence_s": 3.5}, ERROR, "no image on /image for 3.5 s"),
        ({"input_silence_s": 3.5, "qos_problem": "bad QoS"}, ERROR, "no image on /image for 3.5 s (bad QoS)"),
        ({"recent": FrameCounts(failed=2), "last_failure": "no memory"}, ERROR, "fails on every frame: no memory"),
        ({"recent": FrameCounts(failed=1, segmented=9), "last_failure": "x"}, WARN, "engine failed on 1 frames: x"),
        ({"recent": FrameCounts(rejected=3), "last_rejection": "step"}, WARN, "3 unusable images: step"),
        ({"budget_problem": "budget missed"}, WARN, "budget missed"),
        ({"budget_problem": "budget missed", "throttling": "too hot"}, WARN, "budget missed; too hot"),
        ({"budget_problem": "x", "input_silence_s": 3.5}, ERROR, "no image on /image"),
        ({"recent": FrameCounts(failed=1, late=9), "last_failure": "x"}, WARN, "engine failed on 1 frames: x"),
        ({"counts": FrameCounts(late=5)}, OK, "segmenting"),
        ({"input_age_s": 4.0}, WARN, "images are 4.0 s old when they arrive"),
        ({"input_age_s": -4.0}, WARN, "images are 4.0 s from the future"),
        ({"input_age_s": 2.9}, OK, "segmenting"),
        ({"unstamped": True}, WARN, "without a time stamp"),
        ({"qos_problem": "bad QoS"}, WARN, "bad QoS"),
    ],
)
def test_the_worst_thing_decides(change: dict[str, object], level: int, text: str) -> None:
    got_level, sentence = judge(dataclasses.replace(ACTIVE, **change))  # type: ignore[arg-type]
    assert got_level == level
    assert text in sentence


def test_counts_have_differences_and_pairs() -> None:
    now, before = FrameCounts(received=9, segmented=7, dropped=2), FrameCounts(received=4, segmented=3, dropped=1)
    assert now.since(before) == FrameCounts(received=5, segmented=4, dropped=1)
    assert now.as_pairs()["frames_dropped"] == "2"


def test_latency_window_forgets_old_samples() -> None:
    window = LatencyWindow()
    assert window.as_pairs("age") == {}
    window.samples.extend([1000.0] * 300 + [10.0] * 300)
    assert window.as_pairs("age") == {"age_p50_ms": "10.00", "age_p95_ms": "10.00", "age_p99_ms": "10.00"}


def test_array_carries_header_level_and_pairs() -> None:
    pytest.importorskip("diagnostic_msgs", reason="needs ROS 2 (diagnostic_msgs)")
    from std_msgs.msg import Header

    from clustvit_ros.node.diagnostics import diagnostic_array

    array = diagnostic_array(Header(frame_id="camera"), "segmentation: frame", "cpu", WARN, "careful", {"age_ms": "1"})
    status = array.status[0]
    assert array.header.frame_id == "camera"
    assert (status.level, status.message) == (b"\x01", "careful")
    assert (status.name, status.hardware_id) == ("segmentation: frame", "cpu")
    assert [(pair.key, pair.value) for pair in status.values] == [("age_ms", "1")]
