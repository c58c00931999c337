# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Frame after frame, no memory is added."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from clustvit_ros.engine import Settings, check_model, create_engine, network_engine
from clustvit_ros.engine.graph_engine import GraphEngine
from clustvit_ros.engine.recorded_graph import EagerRecorder
from clustvit_ros.errors import ConfigError


def resident_mb():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    pytest.skip("needs /proc/self/status")


def make_engine(name, model, request):
    if name == "onnxruntime":
        for package in ("onnx", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs {package}, of the extra 'onnx'")
    if name == "cuda_graph":
        return GraphEngine.from_model(model, "cpu", recorder=EagerRecorder())
    if name == "torch int8":
        request.getfixturevalue("vnni")
        return create_engine(str(model), "torch", "cpu", precision="int8")
    return create_engine(str(model), name, "cpu")


@pytest.mark.parametrize("name", ["torch", "torch int8", "cuda_graph", "onnxruntime"])
@pytest.mark.parametrize(
    ("calls", "allowed_mb"), [(120, 8), pytest.param(10_000, 8, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_memory_is_constant_in_steady_state(toy_model, onnx_cache, request, name, calls, allowed_mb):
    engine = make_engine(name, toy_model, request)
    engine.warmup((64, 64))
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    ladder = engine.capacities((64, 64))
    mask = None

    def run(count):
        nonlocal mask
        for call in range(count):
            settings = Settings(
                merge_threshold=(0.2, 0.5, 1.0)[call % 3], token_capacity=(0, *ladder)[call % (1 + len(ladder))],
                confidence=call % 2 == 0, clusters=call % 5 == 0, previous_mask=mask,
                merge_exempt_classes=(call % 7,), merge_exempt_region=((0.9, 0.0, 1.0, 1.0),) if call % 4 == 0 else (),
            )  # fmt: skip
            mask = engine.segment(images[call % 4], settings).mask[0]

    run(150)  # every combination of settings has been seen, and caches are full
    gc.collect()
    before_mb = resident_mb()
    run(calls)
    gc.collect()
    assert resident_mb() - before_mb < allowed_mb


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_an_input_that_does_not_fit_is_refused_before_it_is_made(toy_model, onnx_cache, tmp_path, monkeypatch, name):
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")
    shutil.copytree(toy_model, tmp_path / "huge")
    content = yaml.safe_load((toy_model / "model.yaml").read_text()) | {"input": {"size": [4096, 4096]}}
    (tmp_path / "huge" / "model.yaml").write_text(yaml.safe_dump(content))
    _, needed = check_model(str(tmp_path / "huge"))
    assert 2.4e9 < needed < 2.5e9
    before_mb = resident_mb()
    monkeypatch.setattr(network_engine, "available_bytes", lambda: 1_000_000_000)
    message = r"huge: a frame at its input of 4096x4096 px takes about 2416 MB of memory, 1000 MB are free; state"
    with pytest.raises(ConfigError, match=message):
        create_engine(str(tmp_path / "huge"), name, "cpu")
    assert resident_mb() - before_mb < 100
    monkeypatch.setattr(network_engine, "available_bytes", lambda: 0)
    create_engine(str(toy_model), name, "cpu")  # what is small is tried
