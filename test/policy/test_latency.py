# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Latency windows and tables."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustvit_ros.errors import ConfigError
from clustvit_ros.policy import LatencyTable, LatencyWindow, percentile


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
    table = LatencyTable(latency_ms)
    values = [value for _, value in table.items()]
    assert values == sorted(values)
    assert sum(values) == pytest.approx(sum(latency_ms.values()))


def test_table_interpolates_between_rungs_and_holds_beyond():
    table = LatencyTable({100: 10.0, 200: 20.0})
    assert [table[c] for c in (1, 100, 150, 200, 999)] == [10.0, 10.0, 15.0, 20.0, 20.0]


@pytest.mark.parametrize("latency_ms", [{}, {0: 1.0}, {10: 0.0}, {10: math.nan}, {10: math.inf}])
def test_unusable_tables_are_refused(latency_ms):
    with pytest.raises(ConfigError, match="latency table"):
        LatencyTable(latency_ms)
