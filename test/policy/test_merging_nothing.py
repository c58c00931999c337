# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A budget of a network that merges nothing: the size of its input is all that there is to trade."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_policy import Bench, Engine

from clustvit_ros.errors import ConfigError


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripted engine keep all tokens at every size."""
    capacities = Engine.capacities
    monkeypatch.setattr(Engine, "capacities", lambda *arguments, **options: capacities(*arguments, **options)[-1:])


@pytest.mark.usefixtures("whole")
def test_a_bound_of_what_is_kept_bounds_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, min_input_scale=0.5).calibrated()
    with pytest.raises(ConfigError, match=r"but 16 of 16 tokens at 0\.5\d* of the input's sides, the fastest allowed"):
        bench.set(token_capacity=10, latency_budget_ms=1)
    bench.set(token_capacity=10, latency_budget_ms=20)
    point = bench.frame().decision.point
    assert point.input_scale < 1 and point.capacity == point.tokens_total
