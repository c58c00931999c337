# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The engine of recorded graphs, whose every step but the capture itself runs on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.engine.graph_engine import GraphEngine
from clustvit_ros.engine.recorded_graph import CalledAgain, EagerRecorder
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import EngineError
from clustvit_ros.policy import Policy
from clustvit_ros.policy.calibration import CalibrationCache
from clustvit_ros.policy.parameter_spec import build
from clustvit_ros.policy.parameters import SegmentationParameters

MODELS = sorted(path.parent for path in (Path(__file__).resolve().parents[2] / "models").glob("*/model.yaml"))


class CountingRecorder(EagerRecorder):
    """Counts what is recorded, and fails from the `fails_at`-th recording on."""

    def __init__(self, fails_at=None):
        self.recorded, self.fails_at = [], fails_at

    def record(self, work):
        if self.fails_at is not None and len(self.recorded) >= self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.recorded.append(work)
        return super().record(work)


@pytest.fixture
def images():
    generator = np.random.default_rng(3)
    # The network's own size: resizing on a GPU and on a CPU differ in their rounding.
    return [generator.integers(0, 256, (96, 128, 3), np.uint8) for _ in range(3)]


@pytest.fixture
def engine(toy_model):
    engine = GraphEngine.from_model(toy_model, "cpu", recorder=CountingRecorder())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def eager(toy_model):
    return TorchEngine.from_model(toy_model, "cpu")


@pytest.mark.parametrize(
    "settings",
    [
        Settings(clusters=True),
        Settings(merge_threshold=1.0),
        Settings(merge_threshold=0.0, token_capacity=12, clusters=True),
        Settings(merge_threshold=0.3, confidence=False),
        Settings(confidence_threshold=0.3, confidence=False, output_size=(50, 61)),
    ],
)
def test_replayed_graphs_equal_eager_frames(engine, eager, images, settings):
    for image in images:
        ours, reference = engine.segment(image, settings), eager.segment(image, settings)
        assert (ours.mask == reference.mask).mean() > 0.999
        assert (ours.confidence is None) == (reference.confidence is None)
        if settings.confidence:
            assert np.abs(ours.confidence.astype(int) - reference.confidence).max() <= 1
        if settings.clusters:
            assert np.array_equal(ours.cluster_map, reference.cluster_map)
        assert ours.stats.token_capacity == reference.stats.token_capacity
        assert ours.stats.tokens_kept == reference.stats.tokens_kept


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_shipped_models_are_replayed(model):
    eager, engine = TorchEngine.from_model(model, "cpu"), GraphEngine.from_model(model, "cpu", recorder=EagerRecorder())
    image = np.random.default_rng(5).integers(0, 256, (*engine.info.input_size, 3), np.uint8)
    few = engine.capacities(engine.info.input_size)[0]
    for settings in (Settings(clusters=True), Settings(token_capacity=few, confidence=False, output_size=(50, 61))):
        ours, reference = engine.segment(image, settings), eager.segment(image, settings)
        assert (ours.mask == reference.mask).mean() > 0.999
        assert (ours.cluster_map is None) == (reference.cluster_map is None)
        if settings.clusters:
            assert np.array_equal(ours.cluster_map, reference.cluster_map)
    engine.close()


@pytest.mark.parametrize("decode", ["grouped", "compact"])
def test_every_way_to_decode_is_replayed(make_toy_variant, images, decode):
    model = make_toy_variant(decode=decode)
    eager, engine = TorchEngine.from_model(model, "cpu"), GraphEngine.from_model(model, "cpu", recorder=EagerRecorder())
    for image in images:
        for settings in (Settings(merge_threshold=1.0, token_capacity=12), Settings(merge_threshold=1.0)):
            assert (engine.segment(image, settings).mask == eager.segment(image, settings).mask).mean() > 0.999
    engine.close()


def test_predictions_are_the_callers_own(engine, images):
    first = engine.segment(images[0], Settings(clusters=True))
    copies = [first.mask.copy(), first.confidence.copy(), first.cluster_map.copy()]
    engine.segment(images[1], Settings(merge_threshold=0.1, clusters=True))
    for kept, copy in zip((first.mask, first.confidence, first.cluster_map), copies, strict=True):
        assert np.array_equal(kept, copy)


def test_warm_engine_records_nothing_more(engine, images):
    engine.warmup((96, 128))
    recorded = len(engine._recorder.recorded)
    ladder = engine.capacities((96, 128))
    # Stage A, a stage B for each capacity, and label maps with and without confidence.
    assert recorded == 1 + len(ladder) + 2
    for image in images:
        for capacity in ladder:
            for threshold in (0.2, 0.5, 1.0):
                engine.segment(image, Settings(merge_threshold=threshold, token_capacity=capacity))
    assert len(engine._recorder.recorded) == recorded


def test_a_live_budget_records_nothing_more_once_every_point_is_warm(toy_model, tmp_path, monkeypatch):
    engine = GraphEngine.from_model(toy_model, "cpu", recorder=CountingRecorder())
    segment = engine.segment

    def timed(images, *settings):
        """What so small a network takes is overhead, alike at every size: here it follows from the tokens."""
        result = segment(images, *settings)
        total_ms = 0.5 + 0.05 * (result.stats.tokens_total + result.stats.tokens_kept)
        return replace(result, stats=replace(result.stats, total_ms=total_ms))

    monkeypatch.setattr(engine, "segment", timed)
    now_s = [0.0]
    policy = Policy(engine, MagicMock(), CalibrationCache(tmp_path), lambda: now_s[0], lambda: 0.0)
    parameters = build(SegmentationParameters, {"latency_budget_ms": 60_000.0})
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)

    def frame(load=1.0, **values):
        plan = policy.plan([image], replace(parameters, **values), confidence=True)
        result = engine.segment(image, plan.settings)
        slowed = replace(result, stats=replace(result.stats, total_ms=result.stats.total_ms * load))
        policy.learn(plan, slowed, [slowed.stats.total_ms])
        policy.use_idle_time(lambda: True)
        return plan.settings.input_scale

    for _ in range(3):
        frame()
    recorded, scales = len(engine._recorder.recorded), set()
    for budget_ms in (60_000.0, 3.0, 1.0, 2.0, 60_000.0, 5.0):
        for threshold in (1.0, 0.4):
            for load in (1.0, 3.0, 1.0):
                for _ in range(8):
                    scales.add(frame(load, latency_budget_ms=budget_ms, merge_threshold=threshold))
    assert len(scales) > 1, "the budget moved over sizes"
    assert len(engine._recorder.recorded) == recorded
    engine.close()


def test_static_buffers_stay_where_they_are(engine, images):
    engine.warmup((96, 128))

    def addresses():
        plan = engine._plan
        return [tensor.data_ptr() for tensor in (plan.x, plan.logits, plan.cluster_ids, plan.stage_a.outputs[1].x)]

    before = addresses()
    for image in images:
        engine.segment(image, Settings(merge_threshold=0.4))
    assert addresses() == before


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_a_device_that_cannot_capture_runs_eagerly_and_says_why(toy_model, eager, images, fails_at):
    engine = GraphEngine.from_model(toy_model, "cpu", recorder=CountingRecorder(fails_at))
    assert engine.info.engine == "cuda_graph"
    capacities = 0, 6, 12
    masks = [engine.segment(i, Settings(token_capacity=c)).mask for i, c in zip(images, capacities, strict=True)]
    assert engine.info.engine == "torch"
    assert "cannot capture CUDA graphs (operation not permitted when stream is capturing)" in engine.info.device_reason
    assert engine.info.device_reason.endswith("frames run without graphs")
    for image, mask, capacity in zip(images, masks, capacities, strict=True):
        assert (mask == eager.segment(image, Settings(token_capacity=capacity)).mask).mean() > 0.999


def test_a_cpu_runs_without_graphs_and_says_so(toy_model):
    info = create_engine(str(toy_model), "cuda_graph", "cpu").info
    assert info.engine == "torch" and info.device_reason == "CUDA graphs need a CUDA GPU: frames run without graphs"


def test_auto_takes_the_eager_engine_on_a_cpu(toy_model):
    engine = create_engine(str(toy_model), "auto", "cpu")
    assert type(engine) is TorchEngine and engine.info.device_reason == ""


def test_a_capacity_off_the_ladder_is_rounded_to_what_it_allows(engine, images):
    ladder = engine.capacities((96, 128))
    for asked, run in ((ladder[0] - 1, ladder[0]), (ladder[2] + 1, ladder[2]), (ladder[-1] + 5, ladder[-1])):
        settings = Settings(merge_threshold=1.0, token_capacity=asked)
        assert engine.segment(images[0], settings).stats.token_capacity == run


def test_what_belongs_to_an_earlier_call_is_refused(engine, images):
    with torch.inference_mode():
        x = engine.preprocess(np.stack(images[:1]), (96, 128))
        output = engine.infer(x, Settings())
        other = engine.preprocess(np.stack(images[:1]), (64, 64))
        with pytest.raises(EngineError, match="expected what the latest preprocess"):
            engine.infer(x, Settings())
        engine.infer(other, Settings())
        with pytest.raises(EngineError, match="expected that of the latest infer"):
            engine.postprocess(output, (96, 128), Settings())


def test_called_again_overwrites_its_first_results():
    source = torch.zeros(3)
    graph = CalledAgain(lambda: (source + 1, ("text", source.view(1, 3))))
    outputs = graph.outputs
    assert outputs[0].tolist() == [1, 1, 1]
    source.fill_(5)
    assert outputs[1][1].tolist() == [[0, 0, 0]]  # nothing changes before the replay, not even what shared memory
    graph.replay()
    assert outputs[0].tolist() == [6, 6, 6] and outputs[1] == ("text", graph.outputs[1][1])
    assert outputs[1][1].tolist() == [[5, 5, 5]]


def test_a_plain_vit_needs_no_count(make_toy_variant, images):
    engine = GraphEngine.from_model(make_toy_variant(backbone="vit"), "cpu", recorder=CountingRecorder())
    prediction = engine.segment(images[0], Settings(token_capacity=3, clusters=True))
    assert prediction.cluster_map is None and prediction.stats.tokens_kept == prediction.stats.tokens_total
