# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The engine of compiled files, on a scripted TensorRT: what every engine promises, and what is while it compiles."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import sys
import threading

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs onnx, of the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")

import fake_tensorrt
from test_engine_contract import *  # noqa  # its tests, with the engine below
from test_graph_engine import CountingRecorder

from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.engine.tensorrt_engine import TensorRtEngine, compile_model, import_tensorrt
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import EngineError
from clustvit_ros.networks import load_config
from clustvit_ros.networks.model_folder import save_config

# Tests that make engines of their own run where they stand.
for name, value in list(globals().items()):
    if name.startswith("test_") and "engine" not in inspect.signature(value).parameters:
        del globals()[name]


def compile_here(model, size, precision, folder):
    return compile_model(model, size, precision, folder, fake_tensorrt)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorrt")


@pytest.fixture
def make(toy_model, cache):
    def make(compile_model=compile_here, folder=cache):
        return TensorRtEngine.from_model(
            toy_model, "cpu", recorder=CountingRecorder(), tensorrt=fake_tensorrt, compile_model=compile_model,
            cache_dir=folder,
        )  # fmt: skip

    fake_tensorrt.broken.clear()
    yield make
    fake_tensorrt.broken.clear()


def wait_for(condition):
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail("not in time")


@pytest.fixture
def engine(make):
    engine = make()
    engine.warmup((120, 160))
    wait_for(lambda: engine._ready or engine.fault)
    engine.segment(np.zeros((120, 160, 3), np.uint8))
    assert engine.info.engine == "tensorrt", engine.fault
    yield engine
    engine.close()


def test_compiled_files_compute_what_eager_frames_do(engine, toy_model):
    eager, images = TorchEngine.from_model(toy_model, "cpu"), np.random.default_rng(3).integers(0, 256, (3, 96, 128, 3))
    for image in images.astype(np.uint8):
        exempt = Settings(0.0, merge_exempt_region=((0, 0, 0.5, 1),))
        for settings in (Settings(clusters=True), Settings(0.3, 12), exempt):
            ours, reference = engine.segment(image, settings), eager.segment(image, settings)
            assert (ours.mask == reference.mask).mean() > 0.999
            assert ours.stats.tokens_kept == reference.stats.tokens_kept
            assert ours.stats.token_capacity == reference.stats.token_capacity
    together = engine.segment(images.astype(np.uint8), Settings(1.0))
    assert together.mask.shape == (3, 96, 128), "a batch is the graph engine's"


def test_masks_flow_while_it_compiles_and_nothing_is_compiled_twice(make, tmp_path, caplog):
    caplog.set_level("INFO")
    may_end, image = threading.Event(), np.zeros((96, 128, 3), np.uint8)

    def slowly(*arguments):
        yield from compile_here(*arguments)
        may_end.wait(60)

    engine = make(slowly, tmp_path)
    engine.warmup((96, 128))
    assert engine.segment(image).mask.shape == (1, 96, 128) and engine.info.engine == "cuda_graph"
    wait_for(lambda: "stage_b_48 compiled, 9 of 9" in caplog.text)
    before = engine.segment(image).mask
    may_end.set()
    wait_for(lambda: engine._ready)
    assert engine.info.engine == "cuda_graph", "what runs now"
    assert (engine.segment(image).mask == before).mean() > 0.999 and engine.info.engine == "tensorrt"
    engine.close()
    again = make(lambda *_: pytest.fail("it was compiled already"), tmp_path)
    again.warmup((96, 128))
    wait_for(lambda: again._ready)
    again.segment(image)
    assert again.info.engine == "tensorrt"
    recorded = len(again._recorder.recorded)
    again.warmup((96, 128))
    for capacity in again.capacities((96, 128)):
        again.segment(image, Settings(1.0, capacity))
    steady = len(again._recorder.recorded)
    for capacity in again.capacities((96, 128)):
        again.segment(image, Settings(1.0, capacity))
    assert len(again._recorder.recorded) == steady > recorded


def test_files_of_the_same_weights_in_another_network_are_not_taken(make, toy_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(toy_model, other)
    config = load_config(other)
    save_config(other, dataclasses.replace(config, temperature=2.0))
    engines = [make(folder=tmp_path)]
    engines.append(
        TensorRtEngine.from_model(
            other, "cpu", recorder=CountingRecorder(), tensorrt=fake_tensorrt, compile_model=compile_here,
            cache_dir=tmp_path,
        )
    )  # fmt: skip
    for engine in engines:
        engine.warmup((96, 128))
        wait_for(lambda engine=engine: engine._ready)
        engine.close()
    assert len(list(tmp_path.glob("*-96x128-*"))) == 2


@pytest.mark.parametrize(
    ("what", "said"),
    [("parse", "cannot read it: no such operator"), ("build", "cannot compile it"), ("read", "delete its folder")],
)
def test_what_cannot_be_compiled_is_told_and_frames_go_on(make, tmp_path, what, said):
    fake_tensorrt.broken.add(what)
    engine, image = make(folder=tmp_path), np.zeros((96, 128, 3), np.uint8)
    engine.warmup((96, 128))
    wait_for(lambda: engine._ready or engine.fault)
    assert engine.segment(image).mask.shape == (1, 96, 128)
    assert engine.info.engine == "cuda_graph" and said in engine.fault and "frames run as cuda_graph" in engine.fault


def test_a_plain_network_is_one_file(make_toy_variant, tmp_path):
    model = make_toy_variant(backbone="vit")
    engine = TensorRtEngine.from_model(
        model, "cpu", recorder=CountingRecorder(), tensorrt=fake_tensorrt, compile_model=compile_here,
        cache_dir=tmp_path,
    )  # fmt: skip
    engine.warmup((96, 128))
    wait_for(lambda: engine._ready)
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    mask = engine.segment(image).mask
    assert engine.info.engine == "tensorrt"
    assert (mask == TorchEngine.from_model(model, "cpu").segment(image).mask).mean() > 0.999


def test_where_tensorrt_is_not_installed_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"python3-libnvinfer by apt, .* or set engine to cuda_graph"):
        import_tensorrt()


def test_a_cpu_needs_no_tensorrt(toy_model):
    info = create_engine(str(toy_model), "tensorrt", "cpu").info
    assert info.engine == "torch" and "need a CUDA GPU" in info.device_reason
