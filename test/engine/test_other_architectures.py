# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Other families than ViT in the same exporter, engines and benchmark."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import Settings, create_engine, onnx_session
from clustvit_ros.engine.onnx_export import export_onnx
from clustvit_ros.errors import ConfigError, EngineError
from clustvit_ros.measure.flops import attention_share, count_cost
from clustvit_ros.networks import ModelConfig, build_network, load_segmenter, network_config, save_model
from clustvit_ros.networks.model_folder import InputConfig

SMALL = {
    "clustr_b1": {
        "embed_dims": [32, 48, 64, 96], "num_heads": [1, 2, 2, 3], "depths": [1, 2, 2, 1], "head_dim": 32,
        "window_tokens": 256,
    },
    "cast_t": {"embed_dim": 48, "depth": 2, "head_depth": 1, "num_clusters": 4, "cluster_size": 10},
}  # fmt: skip


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    def make(architecture, **overrides):
        overrides = {"image_size": [96, 128], **SMALL[architecture], **overrides}
        config = ModelConfig(
            name=architecture, architecture=architecture, network=network_config(architecture, overrides),
            classes=ClassSet.numbered(7), input=InputConfig(size=(96, 128)), overrides=overrides,
        )  # fmt: skip
        torch.manual_seed(0)
        network = build_network(config.network, 7)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("models") / architecture
        save_model(folder, config, network)
        return folder

    return make


@pytest.fixture(scope="module", params=SMALL)
def model(request, make_model):
    return make_model(request.param)


def test_export_matches_for_any_batch(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")
    pytest.importorskip("onnx", reason="needs onnx, of the extra 'onnx'")
    export = export_onnx(model, tmp_path / "model.onnx")
    assert export.max_difference < 1e-3
    session = onnxruntime.InferenceSession(str(export.path), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    feed = {"merge_threshold": np.array(0.5, np.float32), "token_capacity": np.array(0, np.int64)}
    (logits, ids, _) = session.run(None, {"images": images.numpy(), **feed})
    network = load_segmenter(model).requires_grad_(False)
    difference = (torch.from_numpy(logits) - network(images).logits).abs()
    assert difference.quantile(0.9) < 1e-4
    assert not ids.any()
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.mul_(torch.linspace(0.2, 2.0, len(parameter)).view(-1, *[1] * (parameter.ndim - 1)))
    with pytest.raises(EngineError, match="logits differ"):
        onnx_session.check_against_torch(export.path, network, (96, 128), None)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_engines_segment_with_it(model, engine, onnx_cache):
    if engine == "onnxruntime":
        for package in ("onnx", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs {package}, of the extra 'onnx'")
    runs = create_engine(str(model), engine, "cpu")
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    prediction = runs.segment(image, Settings(merge_threshold=0.2, token_capacity=5, clusters=True))
    assert prediction.mask.shape == (1, 120, 160) and prediction.cluster_map is None
    assert prediction.stats.tokens_kept == prediction.stats.tokens_total
    assert len(runs.capacities((120, 160))) == 1
    reference = create_engine(str(model), "torch", "cpu")
    assert (reference.segment(image).mask == prediction.mask).mean() > 0.99
    for input_scale in (0.75, 0.5) if engine == "torch" else (0.75,):
        smaller = runs.segment(image, Settings(input_scale=input_scale))
        assert smaller.mask.shape == (1, 120, 160)
        assert smaller.stats.input_size == runs.input_size((120, 160), input_scale)
        assert smaller.stats.tokens_total < prediction.stats.tokens_total
        expected = reference.segment(image, Settings(input_scale=input_scale)).mask
        assert (expected == smaller.mask).mean() > 0.99


def test_single_assignment_runs_and_says_that_it_cannot_be_exported(make_model, tmp_path):
    model = make_model("cast_t", assignment="single")
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    assert create_engine(str(model), "torch", "cpu").segment(image).mask.shape == (1, 96, 128)
    pytest.importorskip("onnx", reason="needs onnx, of the extra 'onnx'")
    with pytest.raises(ConfigError, match=r"assignment is 'single'.*use the torch engine"):
        export_onnx(model, tmp_path / "model.onnx")
    assert count_cost(network_config("cast_t", {"assignment": "single"}), 7, (128, 128)).flops > 0


def test_attention_alone_bounds_what_attention_alone_can_save():
    assert attention_share(768, 12, 1024) == pytest.approx(0.18, abs=0.005)
    assert 1 / (1 - attention_share(768, 12, 1024)) == pytest.approx(1.22, abs=0.005)
    assert attention_share(768, 12, 4096) == pytest.approx(0.47, abs=0.005)


def test_cast_grows_linearly_where_vit_grows_faster():
    def gflops(architecture, side):
        return count_cost(network_config(architecture, {}), 11, (side, side)).flops

    growth = {name: gflops(name, 2048) / gflops(name, 1024) for name in ("vit_t", "cast_t")}
    assert growth["vit_t"] > 8 and growth["cast_t"] < growth["vit_t"]
