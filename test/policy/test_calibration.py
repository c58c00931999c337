# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Timing the capacities, and keeping what was measured."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.policy.calibration import Calibration, CalibrationCache, CalibrationKey

SIZE = (128, 128)  # 64 tokens, a rung every 8
LATENCY_MS = {8: 4.0, 16: 8.5, 64: 30.25}


@pytest.fixture
def key():
    info = dataclasses.replace(ScriptedEngine().info, weights_sha256="1234")
    return CalibrationKey.of(info, 2, SIZE, tuple(LATENCY_MS))


def measured(engine, on_progress=lambda share: None):
    calibration = Calibration(engine, SIZE)
    while not calibration.done:
        calibration.step()
        on_progress(calibration.progress)
    return calibration.latency_ms()


def test_every_capacity_is_timed(scripted_engine):
    engine, _ = scripted_engine(lambda call, kept, total: 2.0 + kept)
    shares = []
    assert measured(engine, shares.append) == pytest.approx({c: 2.0 + c for c in range(8, 65, 8)})
    assert shares == sorted(shares) and shares[-1] == 1.0


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
    assert calibration.latency_ms() == pytest.approx({c: 60.0 * c for c in range(8, 65, 8)}, rel=0.3)
    assert calibration.latency_ms()[64] == pytest.approx(60.0 * 64)


def test_what_was_stored_is_found_again(key, tmp_path):
    cache = CalibrationCache(tmp_path / "not yet there")
    assert cache.load(key) is None
    cache.store(key, LATENCY_MS)
    assert cache.load(key) == LATENCY_MS
    assert [path.suffix for path in cache.path(key).parent.iterdir()] == [".json"]
    assert cache.path(key).name.startswith("scripted-128x128-")


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "5678"}, {"engine": "torch"}, {"precision": "float16"}, {"device": "cuda:0 (Orin)"},
        {"threads": 1}, {"image_size": (64, 64)}, {"capacities": (8, 64)}, {"machine": "another"},
        {"power_mode": "pmode:0001"}, {"version": "9"},
    ],
)  # fmt: skip
def test_another_key_is_another_calibration(change, key, tmp_path):
    cache = CalibrationCache(tmp_path)
    cache.store(key, LATENCY_MS)
    assert cache.load(dataclasses.replace(key, **change)) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:20],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00\xff",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"1234"', '"4321"'),
        lambda text: text.replace("8.5", '"slow"'),
        lambda text: text.replace("8.5", "-8.5"),
        lambda text: text.replace("8.5", "NaN"),
        lambda text: text.replace('"16"', '"17"'),
        lambda text: text.replace('"latency_ms"', '"latency"'),
    ],
)
def test_a_damaged_file_is_none_and_is_overwritten(damage, key, tmp_path):
    cache = CalibrationCache(tmp_path)
    cache.store(key, LATENCY_MS)
    text = cache.path(key).read_text()
    cache.path(key).write_text(damage(text))
    assert cache.load(key) is None
    cache.store(key, LATENCY_MS)
    assert cache.load(key) == LATENCY_MS
    assert cache.path(key).read_text() == text


def test_engines_without_weights_are_not_kept(key, tmp_path):
    cache = CalibrationCache(tmp_path)
    anonymous = dataclasses.replace(key, weights_sha256="")
    cache.store(anonymous, LATENCY_MS)
    assert cache.load(anonymous) is None and not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(key, tmp_path, monkeypatch):
    cache = CalibrationCache(tmp_path)
    cache.store(key, LATENCY_MS)

    def fail(*_paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.store(key, {8: 1.0, 16: 2.0, 64: 3.0})
    assert cache.load(key) == LATENCY_MS
    assert len(list(tmp_path.iterdir())) == 1


def test_the_users_cache_is_the_default(key, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    CalibrationCache().store(key, LATENCY_MS)
    (path,) = (tmp_path / "clustvit_ros" / "calibration").iterdir()
    assert json.loads(path.read_text())["key"]["weights_sha256"] == "1234"
