# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What `auto` is on a CPU: measured by a command, kept for model and machine, looked up when an engine is made."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from clustvit_ros.engine import ScriptedEngine, create_engine
from clustvit_ros.engine.choice import CANDIDATES, EngineRow, fastest, load, measure, store
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks import load_config
from clustvit_ros.networks.model_folder import save_config

FLOAT32 = EngineRow("torch", "float32", 60.0, 1.0, 1.0)
BFLOAT16 = EngineRow("torch", "bfloat16", 44.0, 0.73, 0.9986)
INT8 = EngineRow("torch", "int8", 40.0, 0.67, 0.9977)
ONNX = EngineRow("onnxruntime", "float32", 49.0, 0.82, 1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clustvit_ros" / "engines"


@pytest.mark.parametrize(
    ("rows", "asked", "expected"),
    [
        ([FLOAT32, BFLOAT16, INT8, ONNX], ("auto", "auto"), INT8),
        ([FLOAT32, BFLOAT16, dataclasses.replace(INT8, equal=0.994), ONNX], ("auto", "auto"), BFLOAT16),
        ([FLOAT32, BFLOAT16, INT8, ONNX], ("auto", "float32"), ONNX),
        ([FLOAT32, BFLOAT16, INT8, ONNX], ("torch", "auto"), INT8),
        ([FLOAT32, ONNX], ("torch", "auto"), None),
        ([FLOAT32, dataclasses.replace(BFLOAT16, share=1.5)], ("auto", "auto"), None),
        ([FLOAT32, dataclasses.replace(ONNX, share=0.95)], ("auto", "auto"), None),  # its threads give way to nobody
        ([], ("auto", "auto"), None),
    ],
)
def test_the_fastest_is_one_that_keeps_its_pixels_and_is_worth_it(rows, asked, expected):
    assert fastest(rows, *asked) == expected


def test_candidates_are_measured_in_turns_against_the_first():
    calls, busy_s = [], iter((10.0, 10.0 + 1e6))

    def make(engine, precision):
        if precision == "int8":
            raise ConfigError("no VNNI")

        def latency_ms(call, kept, total):
            calls.append((engine, precision))
            return {"bfloat16": 10.0, "float32": 20.0}[precision]

        return ScriptedEngine(latency_ms)

    images = [np.full((32, 48, 3), value, np.uint8) for value in (0, 90, 200)]
    rows, problems, cores = measure(make, images, lambda: next(busy_s))
    assert len(rows) == 3 and problems == {"torch in int8": "no VNNI"} and cores > 100
    assert [row.equal for row in rows] == [1.0] * 3
    assert rows[0].share == 1.0 and rows[1].share < rows[2].share
    working = [each for each in CANDIDATES if each[1] != "int8"]
    assert calls[-9:] == working * 3


def test_what_was_measured_is_what_auto_takes_and_why_is_told(toy_model, cache, caplog, tmp_path):
    model = str(toy_model)
    before = create_engine(model, "auto", "cpu", precision="auto")
    assert before.info.precision == "float32" and "tune --engines" in before.info.device_reason
    store(model, 0, [FLOAT32, BFLOAT16])
    assert load(model, 0) == [FLOAT32, BFLOAT16] and load(model, 1) == []
    other = tmp_path / "other"  # the same weights, merged in another way
    shutil.copytree(model, other)
    save_config(other, dataclasses.replace(config := load_config(other), temperature=2 * config.temperature))
    assert load(str(other), 0) == []
    info = create_engine(model, "auto", "cpu", precision="auto").info
    assert (info.engine, info.precision) == ("torch", "bfloat16")
    assert info.device_reason == "torch in bfloat16 took 0.73 of float32's time here, 99.9 % of the pixels the same"
    # What is asked for by name is what runs.
    assert create_engine(model, "torch", "cpu", precision="float32").info.precision == "float32"
    assert create_engine(model, "auto", "cpu", precision="float32").info.precision == "float32"
    # What was the fastest and cannot be had any more does not keep a node from its start.
    store(model, 0, [FLOAT32, dataclasses.replace(BFLOAT16, precision="float8")])
    assert create_engine(model, "auto", "cpu", precision="auto").info.precision == "float32"
    assert "cannot be had now" in caplog.text
    next(cache.glob("*.json")).write_text("[{]")
    assert create_engine(model, "auto", "cpu", precision="auto").info.precision == "float32"
    assert "measures again" in caplog.text
