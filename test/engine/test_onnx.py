# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Exported files against the network they come from, and the engine that runs them."""

from __future__ import annotations

import builtins
import dataclasses
import json
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clustvit_ros import __version__
from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import Settings, create_engine, onnx_engine, onnx_session
from clustvit_ros.engine.ladder import choose_capacity, default_ladder
from clustvit_ros.engine.onnx_engine import OnnxEngine
from clustvit_ros.engine.onnx_export import export_onnx
from clustvit_ros.engine.onnx_session import describe_providers, open_session, read_metadata
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import ConfigError, EngineError, ModelError
from clustvit_ros.networks import build_network, load_config, load_segmenter, save_model
from clustvit_ros.networks.clustering import count_kept, merge_scores
from clustvit_ros.networks.model_folder import hash_weights
from clustvit_ros.paths import find_model

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")
onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra 'onnx'")

CPU = torch.device("cpu")
TOKENS = 48


@pytest.fixture(scope="module")
def exported(toy_model, tmp_path_factory):
    return export_onnx(toy_model, tmp_path_factory.mktemp("onnx") / "toy.onnx")


@pytest.fixture(scope="module")
def session(exported):
    return onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def network(toy_model):
    return load_segmenter(toy_model).requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 96, 128, generator=torch.Generator().manual_seed(5))


def call(session, images, merge_threshold, token_capacity):
    feed = {
        "images": images.numpy(),
        "merge_threshold": np.array(merge_threshold, np.float32),
        "token_capacity": np.array(token_capacity, np.int64),
    }
    return [torch.from_numpy(np.asarray(output)) for output in session.run(None, feed)]


@pytest.fixture
def variant(toy_model, tmp_path):
    """Makes a model folder with other hyper-parameters or weights than the toy's."""

    def make(name="variant", perturb=0.0, **network):
        config = load_config(toy_model)
        config = dataclasses.replace(
            config, network=dataclasses.replace(config.network, **network), overrides={**config.overrides, **network}
        )
        torch.manual_seed(3)
        segmenter = build_network(config.network, len(config.classes)).eval()
        with torch.no_grad():
            for parameter in segmenter.parameters():
                parameter.add_(perturb * torch.randn_like(parameter))
        save_model(tmp_path / name, config, segmenter)
        return tmp_path / name

    return make


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("merge_threshold", "token_capacity"),
    [(0.5, 0), (0.5, 7), (0.0, 0), (0.2, 0), (0.8, 0), (0.8, 20), (1.0, 1), (1.0, 47), (1.0, 1000), (0.0, 3)],
)
def test_one_file_does_every_threshold_capacity_and_batch(
    session, network, images, merge_threshold, token_capacity, batch
):
    images = images[:batch]
    logits, ids, capacity = call(session, images, merge_threshold, token_capacity)
    scores = merge_scores(network(images).cluster_logits)
    kept = int(count_kept(scores, merge_threshold).max())
    assert int(capacity) == choose_capacity(default_ladder(TOKENS), kept, token_capacity)
    expected = network(images, token_capacity=int(capacity))
    assert torch.equal(ids, expected.cluster_ids)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)


def test_threshold_one_is_plain_vit(session, network, images):
    logits, ids, capacity = call(session, images, 1.0, 0)
    assert int(capacity) == TOKENS and not ids.any()
    torch.testing.assert_close(logits, network(images, merge_threshold=1.0).logits, rtol=0, atol=1e-4)


def test_equal_scores_are_kept_in_the_order_of_their_positions(variant, tmp_path):
    model = variant()
    network = load_segmenter(model)
    with torch.no_grad():
        for parameter in network.backbone.clusterer.parameters():
            parameter.zero_()
    save_model(model, load_config(model), network)
    export = export_onnx(model, tmp_path / "tied.onnx")
    session = onnxruntime.InferenceSession(str(export.path), providers=["CPUExecutionProvider"])
    _, ids, _ = call(session, torch.randn(1, 3, 96, 128), 1.0, 10)
    assert (ids[0, :10] == 0).all() and (ids[0, 10:] == 1).all()


@pytest.mark.parametrize(
    "network", [{"backbone": "vit"}, {"stem": "conv"}, {"num_clusters": 1, "injection_point": 0}],
    ids=lambda network: "-".join(map(str, network.values())),
)  # fmt: skip
def test_every_kind_of_network_exports(variant, network, tmp_path):
    model = variant(perturb=0.1, **network)
    export = export_onnx(model, tmp_path / "model.onnx", size=(72, 88), batch=2)
    assert export.max_difference < 1e-4
    session, _ = open_session(export.path, CPU)
    logits, ids, capacity = call(session, torch.zeros(2, 3, 72, 88), 1.0, 4)
    assert logits.shape == (2, 7, 5, 6) and ids.shape == (2, 30)
    assert int(capacity) == (30 if network.get("backbone") == "vit" else 4)


def test_metadata_says_what_the_file_needs_and_is(exported, toy_model):
    metadata = read_metadata(exported.path)
    assert metadata == exported.metadata
    assert metadata["format"] == "1" and metadata["model"] == "toy" and metadata["exporter_version"] == __version__
    assert metadata["weights_sha256"] == hash_weights(toy_model) and len(metadata["weights_sha256"]) == 64
    assert json.loads(metadata["classes"])[3] == {"name": "class_3", "colour": list(ClassSet.numbered(7).colours[3])}
    assert json.loads(metadata["normalisation"])["mean"] == [127.5, 127.5, 127.5]
    assert json.loads(metadata["input_size"]) == [96, 128] and json.loads(metadata["patch_size"]) == 16
    assert json.loads(metadata["capacity_ladder"])[-1] == TOKENS


def test_numbers_that_differ_leave_no_file(toy_model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_session, "LOGIT_TOLERANCE", 0.0)
    with pytest.raises(EngineError, match=r"logits differ from PyTorch's by .* the file was removed"):
        export_onnx(toy_model, tmp_path / "out" / "toy.onnx")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_export_leaves_an_older_file_as_it_was(toy_model, tmp_path, monkeypatch):
    (tmp_path / "toy.onnx").write_bytes(b"older")
    monkeypatch.setattr(onnx_session, "LOGIT_TOLERANCE", 0.0)
    with pytest.raises(EngineError):
        export_onnx(toy_model, tmp_path / "toy.onnx")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]


@pytest.mark.parametrize(
    ("part", "message"),
    [("head.dec_proj", "logits differ"), ("backbone.clusterer.fc2", "kept"), ("backbone.regenerator.fc2", "logits")],
)
def test_the_check_finds_weights_that_are_not_the_files(exported, toy_model, part, message):
    other = load_segmenter(toy_model)
    with torch.no_grad():
        other.get_submodule(part).bias += torch.linspace(0, 3, len(other.get_submodule(part).bias))
    with pytest.raises(EngineError, match=message):
        onnx_session.check_against_torch(exported.path, other, (96, 128), None)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "merging"), [("camvid_tiny", "tome"), ("sim_tiny", "algm")])
def test_pairs_that_swap_by_rounding_do_not_stop_an_export(model, merging, tmp_path):
    """At some settings PyTorch's own result changes with the last bit of its input; at the others the file is exact."""
    shutil.copytree(find_model(model), tmp_path / "model")
    text = (tmp_path / "model" / "model.yaml").read_text()
    (tmp_path / "model" / "model.yaml").write_text(f"merging: {merging}\n{text}")
    assert export_onnx(tmp_path / "model", tmp_path / "model.onnx").max_difference < 1e-2


@pytest.mark.parametrize("merging", ["tome", "algm"])
def test_the_check_finds_other_weights_where_pairs_are_merged(merging, variant, tmp_path):
    model = variant(perturb=0.1, merging=merging)
    export = export_onnx(model, tmp_path / "model.onnx")
    other = load_segmenter(model)
    with torch.no_grad():
        bias = other.backbone.blocks[1].mlp.fc2.bias
        bias += torch.linspace(0, 3, len(bias))
    with pytest.raises(EngineError, match="differ"):
        onnx_session.check_against_torch(export.path, other, load_config(model).input.size, None)


def test_sizes_that_are_none_are_refused(toy_model, tmp_path):
    for arguments in ({"size": (0, 4)}, {"batch": 0}):
        with pytest.raises(ConfigError, match="expected positive numbers"):
            export_onnx(toy_model, tmp_path / "toy.onnx", **arguments)


@pytest.mark.parametrize("settings", [Settings(), Settings(token_capacity=9), Settings(merge_threshold=1.0)])
def test_engines_agree(toy_model, onnx_cache, settings):
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    settings = dataclasses.replace(settings, clusters=True)
    ours = create_engine(str(toy_model), "onnxruntime", "cpu").segment([image, image[::-1]], settings)
    reference = TorchEngine.from_model(toy_model, "cpu").segment([image, image[::-1]], settings)
    assert (ours.mask == reference.mask).mean() > 0.999
    assert np.array_equal(ours.cluster_map, reference.cluster_map)
    assert np.abs(ours.confidence.astype(int) - reference.confidence).max() <= 1
    assert ours.stats.token_capacity == reference.stats.token_capacity
    assert ours.stats.tokens_kept == reference.stats.tokens_kept


def test_a_plain_vit_has_no_cluster_map(variant, onnx_cache):
    engine = create_engine(str(variant(backbone="vit")), "onnxruntime", "cpu")
    prediction = engine.segment(np.zeros((96, 128, 3), np.uint8), Settings(token_capacity=5, clusters=True))
    assert prediction.cluster_map is None
    assert prediction.stats.tokens_kept == prediction.stats.token_capacity == TOKENS


def test_the_cache_is_filled_once_per_size_and_weights(variant, tmp_path, monkeypatch):
    exports = []

    def counted(model, path, size):
        exports.append(size)
        return export_onnx(model, path, size)

    monkeypatch.setattr(onnx_engine, "export_onnx", counted)
    model, cache = variant(), tmp_path / "cache"
    for _ in range(2):
        engine = OnnxEngine(model, "cpu", cache_dir=cache)
        for size in ((96, 128), (128, 96)):
            engine.segment(np.zeros((*size, 3), np.uint8))
    assert exports == [(96, 128), (128, 96)]
    variant(perturb=0.1)
    OnnxEngine(model, "cpu", cache_dir=cache)
    assert len(exports) == len(list(cache.iterdir())) == 3


def test_a_cache_without_room_is_done_without(toy_model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_engine, "temporary_cache_dir", lambda: tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # what a disk does that fills up while it writes
    try:
        with pytest.raises(EngineError, match=r"no place for its exported file .*File too large\); set XDG_CACHE"):
            OnnxEngine(toy_model, "cpu", cache_dir=tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for _ in range(2):
        engine = OnnxEngine(toy_model, "cpu", cache_dir=Path("/dev/null/cache"))
        assert engine.segment(np.zeros((96, 128, 3), np.uint8)).mask.shape == (1, 96, 128)
    assert len(list(tmp_path.rglob("*.onnx"))) == 1


def test_a_models_own_file_is_used_and_a_stale_one_refused(variant, tmp_path):
    model, cache = variant(), tmp_path / "cache"
    export_onnx(model, model / "model.onnx")
    OnnxEngine(model, "cpu", cache_dir=cache)
    assert not cache.exists()
    variant(perturb=0.1)
    with pytest.raises(ModelError, match=r"its weights_sha256 differs from the model's.*clustvit-ros export"):
        OnnxEngine(model, "cpu", cache_dir=cache)


def test_odd_metadata_is_used_or_refused_in_a_sentence(variant, tmp_path):
    model, rng = variant(), np.random.default_rng(0)
    export_onnx(model, model / "model.onnx")
    made = onnx.load(model / "model.onnx")
    odd = ("", "{", "null", "[1]", "[-1, 1e99]", "\u0000", "9" * 5000, "\x1b[2J")
    decisive = ("format", "weights_sha256", "network", "input_size", "batch", "logits_size")
    others = [entry.key for entry in made.metadata_props if entry.key not in (*decisive, "temperature")]
    for keys in (others, *([key] for key in decisive)):
        changed = onnx.ModelProto()
        changed.CopyFrom(made)
        for entry in [entry for entry in changed.metadata_props if entry.key in keys]:
            entry.value = str(rng.choice(odd))
            if keys != others or rng.integers(2):
                changed.metadata_props.remove(entry)
        onnx.save(changed, model / "model.onnx")
        if keys == others:
            engine = OnnxEngine(model, "cpu", cache_dir=tmp_path / "cache")
            assert engine.segment(np.zeros((96, 128, 3), np.uint8)).mask.shape == (1, 96, 128)
        else:
            problem = "its logits are .* metadata's" if keys == ["logits_size"] else f"its {keys[0]} differs from the"
            with pytest.raises(ModelError, match=f"{problem}.*make it again with 'clustvit-ros export"):
                OnnxEngine(model, "cpu", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_file_of_another_graph_is_refused(variant, tmp_path):
    model = variant()
    export_onnx(model, model / "model.onnx")
    made = onnx.load(model / "model.onnx")
    made.graph.output[0].name = made.graph.node[-1].output[0] = "scores"
    onnx.save(made, model / "model.onnx")
    with pytest.raises((ModelError, EngineError), match=r"model\.onnx: "):
        OnnxEngine(model, "cpu", cache_dir=tmp_path / "cache")


def test_a_missing_package_names_the_extra(toy_model, onnx_cache, monkeypatch):
    real = builtins.__import__

    def without_onnxruntime(name, *arguments, **options):
        if name == "onnxruntime":
            raise ImportError("no such package")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    with pytest.raises(EngineError, match="install clustvit_ros with its 'onnx' extra"):
        create_engine(str(toy_model), "onnxruntime", "cpu")


def test_providers_are_told_with_what_they_took(toy_model, onnx_cache):
    engine = create_engine(str(toy_model), "onnxruntime", "cpu")
    assert engine.info.execution_providers == "CPUExecutionProvider 100 %"
    assert engine.info.engine_told == "onnxruntime (CPUExecutionProvider 100 %)"
    assert TorchEngine.from_model(toy_model, "cpu").info.engine_told == "torch"

    def took(provider, nodes):
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: [None] * nodes)

    kernels = [took("CPUExecutionProvider", 1), *[took("CUDAExecutionProvider", 1)] * 6]
    session = SimpleNamespace(
        get_provider_graph_assignment_info=lambda: [*kernels, took("TensorrtExecutionProvider", 13)]
    )
    expected = "TensorrtExecutionProvider 65 %, CUDAExecutionProvider 30 %, CPUExecutionProvider 5 %"
    assert describe_providers(session) == expected
    old = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert describe_providers(old).startswith("CUDAExecutionProvider, CPUExecutionProvider (")


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU that PyTorch believes in and this ONNX Runtime has no provider for."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is built for CUDA")
    monkeypatch.setattr(onnx_engine, "select_device", lambda name: (torch.device("cuda:0"), "a CUDA kernel ran"))


def test_a_provider_that_falls_back_is_an_error_on_a_named_device(toy_model, onnx_cache, pretended_gpu):
    expected = "device 'cuda:0' cannot be used: .* runs on CPUExecutionProvider instead of CUDAExecutionProvider"
    with pytest.raises(EngineError, match=expected):
        create_engine(str(toy_model), "onnxruntime", "cuda:0")


def test_a_provider_that_falls_back_is_reported_on_auto(toy_model, onnx_cache, pretended_gpu):
    engine = create_engine(str(toy_model), "onnxruntime", "auto")
    assert engine.info.device.startswith("cpu")
    assert "runs on CPUExecutionProvider instead of CUDAExecutionProvider" in engine.info.device_reason
    assert engine.segment(np.zeros((96, 128, 3), np.uint8)).mask.shape == (1, 96, 128)


def test_providers_that_do_not_fit_the_device_are_refused(exported):
    for provider in ("tensorrt", "cuda", "directml"):
        with pytest.raises(ConfigError, match=re.escape(f"got {provider!r} for device cpu, expected cpu on a CPU")):
            open_session(exported.path, CPU, execution_provider=provider)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no such thing")
    with pytest.raises(EngineError, match=r"broken\.onnx: ONNX Runtime .* cannot open it"):
        open_session(tmp_path / "broken.onnx", CPU)


@pytest.mark.parametrize(
    "network",
    [
        {"injection_points": (1, 2), "decode": "compact"},
        {"decode": "grouped"},
        pytest.param({"merging": "cts", "depth": 4, "share_corner": True, "shared_windows": 2}, marks=pytest.mark.slow),
        {"head": "upernet", "head_blocks": (0, 1, 2, 3), "depth": 4, "neck": True, "injection_points": (0, 2)},
        {"head": "detail", "stem": "conv", "decode": "compact"},
    ],
    ids=lambda network: "-".join(map(str, network.values())),
)
def test_the_whole_family_runs_through_every_engine(variant, onnx_cache, network):
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in network.items()}
    model = variant(perturb=0.1, **listed)
    images = list(np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), np.uint8))
    torch_engine = TorchEngine.from_model(model, "cpu")
    onnx_engine = create_engine(str(model), "onnxruntime", "cpu")
    for settings in (Settings(token_capacity=9, clusters=True), Settings(merge_threshold=1.0, clusters=True)):
        reference, ours = torch_engine.segment(images, settings), onnx_engine.segment(images, settings)
        assert (ours.mask == reference.mask).mean() > 0.99
        assert (ours.cluster_map == reference.cluster_map).mean() > 0.99
        assert ours.stats.token_capacity == reference.stats.token_capacity
        assert ours.stats.tokens_kept == reference.stats.tokens_kept
