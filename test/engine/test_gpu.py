# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What only a GPU can show: captured graphs, half precision at full size, memory that stays. `scripts/gpu_check.sh`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.engine.graph_engine import GraphEngine
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SETTINGS = (
    Settings(clusters=True), Settings(merge_threshold=1.0),
    Settings(merge_threshold=0.0, token_capacity=9, clusters=True), Settings(merge_threshold=0.3, confidence=False),
    Settings(confidence_threshold=0.3, output_size=(50, 61)),
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (6, 120, 160, 3), np.uint8))


@pytest.fixture(scope="module", params=["float32", "float16"])
def engines(request, toy_model):
    graphs = GraphEngine.from_model(toy_model, "cuda", precision=request.param)
    graphs.warmup((120, 160))
    assert graphs.info.engine == "cuda_graph", graphs.info.device_reason
    yield graphs, TorchEngine.from_model(toy_model, "cuda", precision=request.param)
    graphs.close()


@pytest.mark.parametrize("settings", SETTINGS)
def test_graphs_equal_eager_frames(engines, images, settings):
    graphs, eager = engines
    for image in images:
        ours, reference = graphs.segment(image, settings), eager.segment(image, settings)
        # A library may choose another kernel, with other rounding, while it is captured.
        assert (ours.mask == reference.mask).mean() > 0.999
        assert (ours.confidence is None) == (reference.confidence is None)
        assert ours.cluster_map is None or np.array_equal(ours.cluster_map, reference.cluster_map)
        assert ours.stats.token_capacity == reference.stats.token_capacity
        assert ours.stats.tokens_kept == reference.stats.tokens_kept


def test_a_gpu_agrees_with_the_cpu(engines, images, toy_model):
    graphs, _ = engines
    cpu = TorchEngine.from_model(toy_model, "cpu")
    # The network's own size: resizing on a GPU and on a CPU differ in their rounding.
    image = np.ascontiguousarray(images[0][:96, :128])
    for capacity in (0, 12):
        settings = Settings(merge_threshold=1.0, token_capacity=capacity)
        assert (graphs.segment(image, settings).mask == cpu.segment(image, settings).mask).mean() > 0.98


def test_steady_state_allocates_nothing_on_the_device(engines, images):
    graphs, _ = engines
    ladder = graphs.capacities((120, 160))

    def frames():
        for image in images:
            for capacity in ladder:
                graphs.segment(image, Settings(token_capacity=capacity))

    frames()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.memory_reserved()
    frames()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.memory_reserved()) == before


def test_auto_captures_graphs_and_says_on_what(toy_model):
    engine = create_engine(str(toy_model), "auto", "auto")
    engine.warmup()
    assert engine.info.engine == "cuda_graph" and engine.info.device.startswith("cuda:0 (")


def test_exempt_tokens_are_kept_by_graphs_as_by_eager_frames(engines, images):
    graphs, eager = engines
    settings = Settings(merge_threshold=0.0, merge_exempt_region=((0.5, 0.0, 1.0, 1.0),), clusters=True)
    for image in images[:2]:
        ours, reference = graphs.segment(image, settings), eager.segment(image, settings)
        assert np.array_equal(ours.cluster_map, reference.cluster_map) and not ours.cluster_map[0, 64:].any()
    assert graphs.segment(images[0], Settings(merge_threshold=0.0, clusters=True)).cluster_map[0, 64:].any()


@pytest.mark.parametrize(
    "name", ["camvid_tiny", "camvid_small", "camvid_clustr", "cwfid_tiny", "offroad_tiny", "sim_tiny"]
)
def test_shipped_models_are_captured_and_agree(name):
    graphs = create_engine(name, "auto", "auto")
    eager = TorchEngine.from_model(name, "cuda")
    rows, columns = np.mgrid[0:360, 0:480]
    waves = [np.sin(rows / 25 + shift) + np.cos(columns / 20 - shift) for shift in (0, 1, 2)]
    image = ((np.stack(waves, axis=-1) + 2) * 63).astype(np.uint8)
    for settings in (Settings(clusters=True), Settings(token_capacity=82, confidence=False)):
        assert (graphs.segment(image, settings).mask == eager.segment(image, settings).mask).mean() > 0.995
    assert graphs.info.engine == "cuda_graph", graphs.info.device_reason
    graphs.close()


def test_int8_is_for_a_cpu(toy_model):
    with pytest.raises(ConfigError, match=r"got int8 on cuda:0 .*use float16 on a GPU"):
        create_engine(str(toy_model), "torch", "cuda", precision="int8")
