"""Age and period of messages."""

from __future__ import annotations

from clustvit_ros.policy import TopicStatistics


def test_period_and_age_are_those_of_the_arrivals() -> None:
    statistics = TopicStatistics()
    assert statistics.as_pairs("input") == {}
    for index in range(11):
        statistics.add(100.0 + 0.05 * index, 20.0 + index)
    pairs = statistics.as_pairs("input")
    assert pairs["input_period_p50_ms"] == "50.00"
    assert (pairs["input_age_p50_ms"], pairs["input_age_max_ms"]) == ("25.00", "30.00")


def test_messages_without_a_stamp_have_a_period_but_no_age() -> None:
    statistics = TopicStatistics()
    statistics.add(1.0, None)
    statistics.add(1.5, None)
    assert statistics.as_pairs("x") == {
        "x_period_p50_ms": "500.00",
        "x_period_p95_ms": "500.00",
        "x_period_max_ms": "500.00",
    }
