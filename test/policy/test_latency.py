"""Latency windows and tables."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustvit_ros.errors import ConfigError
from clustvit_ros.policy import Distribution, LatencyTable, LatencyWindow


def test_percentiles_are_latencies_that_occurred():
    window = LatencyWindow(100)
    assert window.distribution() == Distribution()
    for value in range(1, 101):
        window.add(float(value))
    assert window.distribution() == Distribution(100, 50.0, 95.0, 99.0, 100.0)


def test_the_oldest_are_forgotten_and_nonsense_is_left_out():
    window = LatencyWindow(2)
    for value in (9.0, 1.0, math.nan, math.inf, 2.0):
        window.add(value)
    assert window.distribution() == Distribution(2, 1.0, 2.0, 2.0, 2.0)
    window.clear()
    assert window.distribution().count == 0


@given(st.dictionaries(st.integers(1, 5000), st.floats(0.01, 1e4), min_size=1, max_size=12))
def test_table_never_falls(latency_ms):
    table = LatencyTable(latency_ms)
    values = [value for _, value in table.items()]
    assert values == sorted(values)
    assert table.fastest_ms == values[0] and table.slowest_ms == values[-1]
    assert sum(values) == pytest.approx(sum(latency_ms.values()))


def test_table_interpolates_between_rungs_and_holds_beyond():
    table = LatencyTable({100: 10.0, 200: 20.0})
    assert [table[c] for c in (1, 100, 150, 200, 999)] == [10.0, 10.0, 15.0, 20.0, 20.0]


@pytest.mark.parametrize("latency_ms", [{}, {0: 1.0}, {10: 0.0}, {10: math.nan}, {10: math.inf}])
def test_unusable_tables_are_refused(latency_ms):
    with pytest.raises(ConfigError, match="latency table"):
        LatencyTable(latency_ms)
