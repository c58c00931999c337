# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Half precision: close to float32 where it may differ, float32 where it decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clustvit_ros.classes import IGNORE_INDEX, ClassSet
from clustvit_ros.engine import PRECISIONS, Settings, create_engine
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks import build_network, load_segmenter, network_config
from clustvit_ros.networks.clustering import representatives
from clustvit_ros.networks.inference import for_inference
from clustvit_ros.networks.model_folder import InputConfig, ModelConfig

HALVES = [name for name in PRECISIONS if name.endswith("float16")]


@pytest.fixture
def image():
    # Smooth, as images are: in noise every pixel is a borderline case.
    rows, columns = np.mgrid[0:120, 0:160]
    waves = [np.sin(rows / 25 + shift) + np.cos(columns / 20 - shift) for shift in (0, 1, 2)]
    return ((np.stack(waves, axis=-1) + 2) * 63).astype(np.uint8)


@pytest.mark.parametrize("engine", ["torch", "cuda_graph"])
@pytest.mark.parametrize("precision", HALVES)
def test_masks_agree_with_float32(toy_model, image, engine, precision):
    half = create_engine(str(toy_model), engine, "cpu", precision=precision)
    assert half.info.precision == precision
    full = create_engine(str(toy_model), engine, "cpu")
    for threshold in (0.5, 1.0):
        settings = Settings(merge_threshold=threshold)
        agreement = (half.segment(image, settings).mask == full.segment(image, settings).mask).mean()
        assert agreement >= (0.995 if precision == "float16" else 0.95), f"{precision} at {threshold}: {agreement:.4f}"


@pytest.mark.parametrize("model", ["camvid_tiny", "camvid_clustr"])
@pytest.mark.parametrize("precision", [*HALVES, "int8"])
def test_a_trained_model_agrees_on_camera_images(camvid_dir, precision, model, request):
    import cv2

    if precision == "int8":
        request.getfixturevalue("vnni")

    engines = [create_engine(model, "torch", "cpu", precision=name) for name in ("float32", precision)]
    paths = sorted((camvid_dir / "val" / "images").glob("*.jpg"))[::60]
    images = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in paths]
    masks = [np.stack([engine.segment(image).mask for image in images]) for engine in engines]
    assert (masks[0] == masks[1]).mean() >= 0.995


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_decides_stays_in_float32(toy_model, dtype):
    network = for_inference(load_segmenter(toy_model), dtype)
    norms = {name: module.weight.dtype for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
    # PyTorch's own kernels sum in float32, whatever they read and write.
    assert norms.pop("head.mask_norm") == torch.float32 and set(norms.values()) == {dtype}
    assert all(parameter.dtype == torch.float32 for parameter in network.backbone.clusterer.parameters())
    assert network.backbone.blocks[0].mlp.fc1.weight.dtype == dtype
    state = network.backbone.encode(torch.zeros(1, 3, 96, 128, dtype=dtype))
    assert state.x.dtype == dtype and state.cluster_logits.dtype == torch.float32


def test_the_given_network_stays_as_it_is(toy_model):
    network = load_segmenter(toy_model)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for_inference(network, torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert next(network.parameters()).requires_grad


def test_folded_batch_norms_compute_the_same():
    torch.manual_seed(1)
    network = build_network(
        network_config("clustvit_t", {"image_size": [64, 96], "stem": "conv", "depth": 4}), 5
    ).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.2, 2.0)
    folded = for_inference(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(folded(images).logits, network(images).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_halves_sum_in_float32(dtype):
    norm = nn.LayerNorm(2048).to(dtype)
    x = (torch.randn(3, 2048, generator=torch.Generator().manual_seed(0)) + 100.0).to(dtype)  # their sum overflows
    torch.testing.assert_close(norm(x).float(), nn.LayerNorm(2048)(x.float()), rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_representatives_of_many_large_tokens_neither_overflow_nor_lose_count(dtype):
    tokens = torch.full((1, 900, 4), 200.0, dtype=dtype)  # their sum is beyond float16, their number beyond bfloat16
    means = representatives(tokens, torch.ones(1, 900, dtype=torch.int64), 2)
    assert means.dtype == dtype
    torch.testing.assert_close(means[0, 0].float(), torch.full((4,), 200.0), rtol=5e-3, atol=0)
    assert not means[0, 1].any()


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("way", ["clusters", "algm", "algm+clusters", "tome", "kmeans", "stvit"])
def test_every_way_to_merge_bears_large_channels_and_hundreds_of_tokens_in_a_group(way, precision):
    image = np.full((320, 480, 3), 120, np.uint8)
    image[100:200, 100:300] = np.random.default_rng(0).integers(0, 255, (100, 200, 3))
    torch.manual_seed(0)
    network = {"image_size": [320, 480], "embed_dim": 64, "depth": 6, "num_heads": 2, "injection_point": 2}
    config = network_config("clustvit_t" if "clusters" in way else "vit_t", {**network, "merging": way})
    model = build_network(config, 5).eval()
    with torch.no_grad():
        model.backbone.pos_embed[:, :, 3] += 300.0  # as large transformers have them
    about = ModelConfig("m", "vit_t", config, ClassSet.numbered(5), InputConfig((320, 480)))
    engines = [TorchEngine(model, about, "cpu", 1, precision=name) for name in ("float32", precision)]
    masks = [engine.segment(image, Settings(merge_threshold=0.5)).mask for engine in engines]
    assert (masks[0] == masks[1]).mean() > (0.8 if precision == "float16" else 0.4)
    assert not (masks[1] == IGNORE_INDEX).any()


def test_an_unknown_precision_is_refused(toy_model):
    for engine in ("torch", "cuda_graph", "onnxruntime", "scripted"):
        with pytest.raises(ConfigError, match="got 'int4', expected one of auto, float32, float16, bfloat16, int8"):
            create_engine(str(toy_model), engine, "cpu", precision="int4")


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_onnxruntime_has_one_precision_on_a_cpu(toy_model, precision):
    with pytest.raises(ConfigError, match="expected float32 with the engine onnxruntime"):
        create_engine(str(toy_model), "onnxruntime", "cpu", precision=precision)


def test_the_position_embedding_is_resized_once_per_grid(toy_model):
    backbone = load_segmenter(toy_model).backbone
    with torch.inference_mode():
        first = backbone.resized_pos_embed((5, 9))
        assert backbone.resized_pos_embed((5, 9)) is first
        with_gradient_off = backbone.resized_pos_embed((7, 9))
        for width in range(20, 40):
            backbone.resized_pos_embed((3, width))
        assert len(backbone._resized) <= 8
    # A training step changes it, and gradients flow.
    with torch.no_grad():
        backbone.pos_embed += 1.0
        assert not torch.equal(backbone.resized_pos_embed((7, 9)), with_gradient_off)
    assert backbone.resized_pos_embed((5, 9)).requires_grad


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(toy_model, image):
    compiled = TorchEngine.from_model(toy_model, "cpu", compiled=True)
    reference = TorchEngine.from_model(toy_model, "cpu")
    for settings in (Settings(), Settings(merge_threshold=1.0), Settings(token_capacity=7)):
        assert (compiled.segment(image, settings).mask == reference.segment(image, settings).mask).mean() > 0.999
