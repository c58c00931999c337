# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Files of static shapes: the network in two steps, for compilers that want to know every shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs onnx, of the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")

import onnx
import onnxruntime

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import onnx_export, onnx_session
from clustvit_ros.engine.ladder import default_ladder
from clustvit_ros.engine.onnx_export import export_static
from clustvit_ros.errors import ConfigError, EngineError
from clustvit_ros.networks import build_network, load_segmenter, network_config, save_model
from clustvit_ros.networks.model_folder import InputConfig, ModelConfig

MODELS = sorted(path.parent.name for path in (Path(__file__).resolve().parents[2] / "models").glob("*/model.yaml"))
# What makes a shape of a value, or a value of a shape.
_FOLLOWS_VALUES = ("Shape", "Size", "NonZero", "Range", "Loop", "If", "Scan", "Unique", "Compress", "ConstantOfShape")
# Where an input that is no constant would decide a shape: by operator, which inputs.
_SHAPING = {"Slice": (1, 2, 3, 4), "Reshape": (1,), "Expand": (1,), "TopK": (1,), "Tile": (1,), "Resize": (1, 2, 3),
            "Unsqueeze": (1,), "Squeeze": (1,), "Pad": (1,), "Split": (1,)}  # fmt: skip


def check_static(path):
    """No shape depends on what an image shows, and nothing is sorted that TensorRT cannot sort."""
    graph = onnx.load(str(path)).graph
    constants = {value.name: value for value in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        assert node.domain == "" and node.op_type not in _FOLLOWS_VALUES, (path.name, node.op_type)
        for index in _SHAPING.get(node.op_type, ()):
            if index < len(node.input) and node.input[index]:
                assert node.input[index] in constants, (path.name, node.op_type, node.input[index])
        if node.op_type == "TopK":
            assert int(onnx.numpy_helper.to_array(constants[node.input[1]]).item()) <= 3840
    for value in (*graph.input, *graph.output):
        assert all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim), (path.name, value.name)


def run(path, **feed):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = {value.name: feed[value.name] for value in session.get_inputs()}
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, wanted), strict=True))


def random_model(folder, arch, size, **overrides):
    overrides = {"image_size": list(size), **overrides}
    config = ModelConfig(
        name=folder.name, architecture=arch, network=network_config(arch, overrides, "arch"),
        classes=ClassSet.numbered(5), input=InputConfig(size=size), overrides=overrides,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(folder, config, build_network(config.network, 5))
    return folder


def test_both_steps_together_are_the_network(toy_model, tmp_path):
    export = export_static(toy_model, tmp_path)
    assert tuple(export.by_capacity) == default_ladder(48) and export.max_difference <= 1e-4
    for path in (export.first, *export.by_capacity.values()):
        check_static(path)
    images = np.random.default_rng(0).normal(size=(1, 3, 96, 128)).astype(np.float32)
    network = load_segmenter(toy_model)
    for exempt in (False, True):
        tokens = np.arange(48)[None] % 5 == 0 if exempt else np.zeros((1, 48), bool)
        state = run(export.first, images=images, merge_threshold=np.array(0.5, np.float32), exempt=tokens)
        kept = int(state.pop("kept"))
        with torch.inference_mode():
            backbone = network.backbone
            expected = backbone.exempt(backbone.encode(torch.from_numpy(images)), torch.from_numpy(tokens))
            assert kept == int(backbone.count_kept(expected, 0.5).max())
            for capacity, path in export.by_capacity.items():
                found = run(path, **state)
                features = backbone.finish(expected, token_capacity=capacity)
                wanted = network.decode(features).logits.numpy()
                assert np.array_equal(found["cluster_ids"], features.cluster_ids.numpy())
                np.testing.assert_allclose(found["logits"], wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("vit_t", {}), ("clustr_b1", {}), pytest.param("cast_t", {}, marks=pytest.mark.slow),
        *(
            pytest.param("clustvit_t", overrides, marks=pytest.mark.slow)
            for overrides in (
                {"decode": "grouped"}, {"merging": "algm"}, {"merging": "algm+clusters"}, {"merging": "cts"},
                {"merging": "tome"}, {"merging": "kmeans"}, {"merging": "stvit"}, {"injection_points": [2, 5]},
            )
        ),
    ],
)  # fmt: skip
def test_other_networks_have_no_shape_from_an_image_either(arch, overrides, tmp_path):
    export = export_static(random_model(tmp_path / "model", arch, (64, 96), **overrides), tmp_path / "files")
    assert bool(export.by_capacity) == (arch == "clustvit_t")
    for path in (export.first, *export.by_capacity.values()):
        check_static(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_shipped_models(name, tmp_path):
    export = export_static(name, tmp_path)
    for path in (export.first, *export.by_capacity.values()):
        check_static(path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["clustvit_t", "clustvit_s", "clustvit_b"])
def test_published_sizes(arch, tmp_path):
    export = export_static(random_model(tmp_path / "model", arch, (512, 512)), tmp_path / "files")
    for path in (export.first, *export.by_capacity.values()):
        check_static(path)


def test_more_tokens_than_can_be_sorted_are_refused(toy_model, tmp_path):
    with pytest.raises(ConfigError, match="has 4000 tokens, TensorRT sorts at most 3840"):
        export_static(toy_model, tmp_path, (16 * 50, 16 * 80))


def test_where_rounding_decides_other_weights_are_still_found(tmp_path, monkeypatch):
    def moved(module, example, path, *rest):
        # What is compared with is the network before this.
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.01)
        return as_it_is(module, example, path, *rest)

    as_it_is = onnx_export._export
    model = random_model(tmp_path / "model", "clustr_t", (64, 96))
    export_static(model, tmp_path / "files")
    monkeypatch.setattr(onnx_export, "_export", moved)
    with pytest.raises(EngineError, match=r"differs from PyTorch by .* the file was removed"):
        export_static(model, tmp_path / "others")


def test_a_file_that_differs_is_removed(toy_model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_session, "STATIC_TOLERANCE", -1.0)
    with pytest.raises(EngineError, match=r"differs from PyTorch by .* the file was removed"):
        export_static(toy_model, tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize("merging", ["algm", "tome", "kmeans"])
def test_a_single_patch_can_be_exported(merging, tmp_path):
    network = {"image_size": [32, 32], "embed_dim": 32, "depth": 3, "num_heads": 1, "merging": merging,
               "injection_point": 1}  # fmt: skip
    config = network_config("vit_t", network)
    model = ModelConfig("m", "vit_t", config, ClassSet.numbered(3), InputConfig((32, 32)), overrides=network)
    torch.manual_seed(0)
    save_model(tmp_path / "m", model, build_network(config, 3).eval())
    onnx_export.export_onnx(tmp_path / "m", tmp_path / "m.onnx", (16, 16))
    feed = {"images": np.zeros((1, 3, 16, 16), np.float32), "merge_threshold": np.array(0.5, np.float32),
            "token_capacity": np.array(0, np.int64)}  # fmt: skip
    assert run(tmp_path / "m.onnx", **feed)["logits"].shape == (1, 3, 1, 1)
