# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Checkpoints as trainings leave them, and files that are none: a model, or one line and no model."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clustvit_ros.classes import ClassSet
from clustvit_ros.cli.main import main
from clustvit_ros.errors import ModelError
from clustvit_ros.networks import ViTConfig, build_network, load_config, load_segmenter
from clustvit_ros.networks.checkpoint import read_checkpoint
from clustvit_ros.networks.official import to_official


def import_(checkpoint, out, *options):
    return main(["import-checkpoint", "--checkpoint", str(checkpoint), "--out", str(out), *options])


@pytest.fixture(scope="module")
def official():
    torch.manual_seed(0)
    config = ViTConfig(image_size=(32, 32), embed_dim=64, depth=4, num_heads=1, injection_point=1, head_depth=1)
    return to_official(build_network(config, 3).state_dict())


CONFIG = (
    "img = dict(mean=[1])\nmodel = dict(backbone=dict(num_heads=2, injection_points=[1], type='ClustViT'), decode_head="
    "dict(num_heads=1), data_preprocessor=dict(mean=[1.0, 2, 3], std=[4, 5, 6], bgr_to_rgb=True))\n"
)


@pytest.fixture
def training(monkeypatch):
    """What a training of MMEngine keeps beside its weights, objects of its own among them."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def mean(self):
            raise AssertionError("nothing of a checkpoint runs")

        def __setstate__(self, state):
            raise AssertionError("nothing of a checkpoint runs")

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = module.__name__
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    buffer = HistoryBuffer()
    buffer.history, buffer.methods = np.arange(9.0), {"mean": HistoryBuffer.mean}
    return {
        "meta": {"cfg": CONFIG, "iter": 7, "dataset_meta": {
            "classes": ("road ", "tree", "sky"), "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "label_map": None,
        }},
        "message_hub": {"log_scalars": {"loss": buffer}, "lr": np.float64(0.1)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    }  # fmt: skip


def test_a_training_file_of_mmengine_gives_its_model_names_and_normalisation(tmp_path, official, training, capsys):
    torch.save({**training, "state_dict": official}, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError):  # so it is: PyTorch alone refuses it
        torch.load(tmp_path / "a.pth", weights_only=True)
    assert import_(tmp_path / "a.pth", tmp_path / "m") == 0
    config = load_config(tmp_path / "m")
    assert config.classes.names == ("road", "tree", "sky") and config.classes.colours[1] == (4, 5, 6)
    assert (config.input.mean, config.input.std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert (config.network.num_heads, config.network.injection_point, config.network.head_heads) == (2, 1, 1)
    assert "assumed" not in capsys.readouterr().err
    loaded = to_official(load_segmenter(tmp_path / "m").state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in official.items())
    with pytest.raises(pickle.UnpicklingError):  # and nothing stays allowed
        torch.load(tmp_path / "a.pth", weights_only=True)


@pytest.mark.parametrize(
    ("meta", "names", "first"),
    [
        ({"CLASSES": ["a", "b", "c"], "PALETTE": [[9, 9, 9]] * 3}, ("a", "b", "c"), (9, 9, 9)),
        ({"dataset_meta": {"CLASSES": ("a", "b", "c")}}, ("a", "b", "c"), None),
        # Names that are there are never those of another data set.
        ({"CLASSES": ["a", "b"]}, ("class_0", "class_1", "class_2"), None),
        ({"CLASSES": ["a", "a", "a"]}, ("a", "a_1", "a_2"), None),
        ({"CLASSES": ["a\n", None, ""]}, ("a", "class_1", "class_2"), None),
        ({"CLASSES": torch.ones(3), "PALETTE": torch.ones(3, 3)}, ("class_0", "class_1", "class_2"), None),
        ({"CLASSES": 7, "PALETTE": "x", "cfg": "model = dict(" * 2000}, ("class_0", "class_1", "class_2"), None),
        (None, ("background",), None),
    ],
)
def test_class_names_of_every_age_are_read(tmp_path, official, meta, names, first):
    torch.save({"meta": meta, "state_dict": official}, tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "m") == 0
    classes = load_config(tmp_path / "m").classes
    assert classes.names[: len(names)] == names and (first is None or classes.colours[0] == first)


@torch.no_grad()
def test_a_network_that_was_trained_on_bgr_takes_rgb(tmp_path, official):
    for name, rgb in (("rgb", "True"), ("bgr", "False")):
        text = CONFIG.replace("bgr_to_rgb=True", f"bgr_to_rgb={rgb}")
        torch.save({"meta": {"cfg": text}, "state_dict": official}, tmp_path / "a.pth")
        assert import_(tmp_path / "a.pth", tmp_path / name) == 0
    images = torch.randn(1, 3, 32, 32)
    logits = load_segmenter(tmp_path / "rgb")(images).logits
    torch.testing.assert_close(load_segmenter(tmp_path / "bgr")(images.flip(1)).logits, logits, rtol=0, atol=1e-5)
    assert load_config(tmp_path / "bgr").input.mean == (3.0, 2.0, 1.0)


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def zeros(weights):
    return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}


AUXILIARY = {"auxiliary_head.0.conv_seg.weight": torch.ones(3), "data_preprocessor.mean": torch.ones(3)}
WAYS = {
    "several GPUs": lambda w: {"state_dict": prefixed(w, "module.")},
    "twice wrapped": lambda w: {"model": {"state_dict": prefixed(w, "module._orig_mod.")}},
    "Lightning": lambda w: {"state_dict": prefixed(w, "model."), "epoch": 3},
    "auxiliary heads": lambda w: {"state_dict": {**w, **AUXILIARY}},
    "MMEngine's average": lambda w: {
        "state_dict": w, "ema_state_dict": {"steps": torch.tensor(3), **prefixed(zeros(w), "module.")},
    },
    "the average alone": lambda w: {"ema_state_dict": {"steps": torch.tensor(3), **prefixed(w, "module.")}},
    "OpenMMLab 1.x's average": lambda w: {
        "state_dict": {**w, **{"ema_" + name.replace(".", "_"): tensor for name, tensor in zeros(w).items()}},
    },
    "a second copy": lambda w: {**prefixed(zeros(w), "ema_model.module."), **prefixed(w, "model.")},
    "a marked copy alone": lambda w: prefixed(w, "ema_"),
    "timm's training": lambda w: {"state_dict": w, "state_dict_ema": zeros(w)},
    "DINO": lambda w: {"student": prefixed(zeros(w), "module."), "teacher": w, "epoch": 3},
    "no wrapper at all": lambda w: w,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_found_however_they_are_wrapped(tmp_path, official, way):
    torch.save(WAYS[way](official), tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "m") == 0
    loaded = to_official(load_segmenter(tmp_path / "m").state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in official.items())


def test_another_entry_is_taken_when_asked_for_and_told_in_any_case(tmp_path, official, capsys):
    torch.save({"state_dict": zeros(official), "ema_state_dict": prefixed(official, "module.")}, tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "m") == 0
    assert "took state_dict; the file holds weights below ema_state_dict as well (--entry" in capsys.readouterr().out
    assert import_(tmp_path / "a.pth", tmp_path / "m", "--entry", "ema_state_dict") == 0
    loaded = to_official(load_segmenter(tmp_path / "m").state_dict())
    assert torch.equal(loaded["backbone.cls_token"], official["backbone.cls_token"])
    assert import_(tmp_path / "a.pth", tmp_path / "m", "--entry", "model") == 2
    assert "holds no weights below 'model', expected one of state_dict, ema_state_dict" in capsys.readouterr().err


SHARING = "model = dict(backbone=dict(type='CTSVisionTransformer', num_heads=1, policy_schedule=(48, 4)))"


@pytest.fixture(scope="module")
def sharing():
    """A CTS network in the official layout, whose class token has a position that its code leaves out."""
    torch.manual_seed(0)
    config = ViTConfig(backbone="vit", image_size=(128, 128), embed_dim=64, depth=2, num_heads=1, head_depth=1,
                       merging="cts", share_corner=True, shared_windows=4)  # fmt: skip
    network = build_network(config, 3).eval()
    with torch.no_grad():
        network.backbone.pos_embed[:, 0] = 0
    weights = to_official(network.state_dict())
    positions = weights["backbone.pos_embed"].clone()
    positions[:, 0] = 7.0
    return network, {**weights, "backbone.pos_embed": positions}


@torch.no_grad()
def test_a_cts_checkpoint_shares_as_many_windows_as_its_schedule_says(tmp_path, sharing, capsys):
    network, weights = sharing
    torch.save({"meta": {"cfg": SHARING}, "state_dict": prefixed(weights, "module.")}, tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "m") == 0
    config, loaded = load_config(tmp_path / "m").network, load_segmenter(tmp_path / "m")
    assert (config.merge_method, config.share_corner, config.shared_windows) == ("cts", True, 4)
    images = torch.randn(2, 3, 128, 128)
    output = loaded(images)
    assert ((output.cluster_ids == 0).sum(dim=1) == 64 - 3 * 4).all()
    torch.testing.assert_close(output.logits, network(images, token_capacity=52).logits, rtol=0, atol=1e-5)
    assert (loaded(torch.randn(1, 3, 64, 128)).cluster_ids > 0).sum() == 3 * 2  # half of the image, half of them
    assert (loaded(images, merge_threshold=1.0).cluster_ids == 0).all()
    assert "windows that share" not in capsys.readouterr().err
    torch.save({"state_dict": weights}, tmp_path / "b.pth")
    assert import_(tmp_path / "b.pth", tmp_path / "n") == 0
    assert "6 windows that share a token (shared_windows in its model.yaml)" in capsys.readouterr().err


def test_a_cts_checkpoint_without_its_policy_network_is_told_or_given_one(tmp_path, sharing, capsys):
    policy = {name: tensor for name, tensor in sharing[1].items() if ".policy_net." in name}
    rest = {name: tensor for name, tensor in sharing[1].items() if name not in policy}
    torch.save({"meta": {"cfg": SHARING}, "state_dict": rest}, tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "m") == 2
    assert "is a CTS network by its own configuration, but holds no policy network" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    alone = {name.removeprefix("backbone.policy_net."): tensor for name, tensor in policy.items()}
    for index, content in enumerate((alone, {"state_dict": sharing[1]})):  # or all of another CTS
        torch.save(content, tmp_path / "policynet.pth")
        assert import_(tmp_path / "a.pth", tmp_path / f"m{index}", "--policy-net", str(tmp_path / "policynet.pth")) == 0
        assert load_config(tmp_path / f"m{index}").network.merge_method == "cts"
    assert "gives way" not in capsys.readouterr().out
    torch.save({"meta": {"cfg": SHARING}, "state_dict": sharing[1]}, tmp_path / "b.pth")
    assert import_(tmp_path / "b.pth", tmp_path / "n", "--policy-net", str(tmp_path / "policynet.pth")) == 0
    assert "its own policy network gives way to that of" in capsys.readouterr().out


def test_a_file_that_holds_itself_ends(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="holds no tensors by name"):
        read_checkpoint(tmp_path / "a.pth")


KINDS = {
    "no number": lambda tensor: tensor * float("nan"), "infinite as float32": lambda tensor: tensor.double() + 1e300,
    "complex": lambda tensor: tensor.to(torch.complex64), "whole": lambda tensor: tensor.to(torch.int8),
    "sparse": lambda tensor: tensor.to_sparse(), "hollow": lambda tensor: tensor.to("meta"),
}  # fmt: skip


def hostile_checkpoints():
    weights = to_official(build_network(ViTConfig(image_size=(32, 32), embed_dim=64, depth=2, num_heads=1,
                                                  injection_point=1, head_depth=1), 3).state_dict())  # fmt: skip
    block = "backbone.layers.1.ln1.weight"
    for name in ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.projection.weight",
                 "decode_head.cls_emb", "backbone.layers.0.ffn.layers.0.0.weight",
                 "backbone.clusterer.net.0.weight"):  # fmt: skip
        yield f"{name} is a number", {**weights, name: torch.tensor(1.0)}
        yield f"{name} is flat", {**weights, name: torch.ones(3)}
        yield f"{name} is empty", {**weights, name: torch.zeros(0, 0, 0)}
        for kind, change in KINDS.items():
            yield f"{name} is {kind}", {**weights, name: change(weights[name])}
    for number in (1_000_000_000_000, 10**400, 7):
        yield f"block {str(number)[:20]}", {**weights, block.replace("1", str(number), 1): weights[block]}
    yield "meta is text", {"meta": "x", "state_dict": weights | {"a": "text"}}
    meta = {"cfg": "model = dict(backbone=3, decode_head=[1])"}
    yield "odd hints", {"meta": meta, "state_dict": {"a": torch.ones(1)}}


def test_hostile_checkpoints_are_one_line(tmp_path, capsys):
    for kind, content in hostile_checkpoints():
        torch.save(content, tmp_path / "a.pth")
        assert import_(tmp_path / "a.pth", tmp_path / "m", "--injection-point", "1") == 2, kind
        error = capsys.readouterr().err
        assert error.startswith("clustvit-ros: error: "), kind
        assert kind.partition(" is ")[2] not in KINDS or "infinite or no numbers in" in error, (kind, error)


@pytest.mark.parametrize(
    "content", [b"", b"text\n", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), b"\x80\x05N.", b"g1\n."]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoint_are_one_line(tmp_path, capsys, content, suffix):
    (tmp_path / f"a{suffix}").write_bytes(content)
    assert import_(tmp_path / f"a{suffix}", tmp_path / "m") == 2
    assert capsys.readouterr().err.startswith("clustvit-ros: error: ")


def test_what_is_no_regular_file_or_damaged_inside_is_one_line(tmp_path, official, capsys):
    os.mkfifo(tmp_path / "pipe.pth")
    torch.save({"state_dict": official}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(1 << 20))
    for name, problem in (
        ("pipe.pth", "is no regular file"), ("zero", "is no regular file"),
        ("flipped.pth", "fails its checksum; fetch or save it again"), ("bomb.pth", "is compressed"),
    ):  # fmt: skip
        path = "/dev/zero" if "zero" in name else tmp_path / name
        assert import_(path, tmp_path / "m") == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clustvit-ros: error: ")]
        assert len(lines) == 1 and problem in lines[0] and not (tmp_path / "m").exists()


def test_weights_without_checksums_are_taken(tmp_path, official):
    """PyTorch can be told to compute none."""
    torch.save({"state_dict": official}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        for entry in archive.infolist():
            data = data.replace(entry.CRC.to_bytes(4, "little"), bytes(4))
    (tmp_path / "b.pth").write_bytes(data)
    assert import_(tmp_path / "b.pth", tmp_path / "m") == 0


def test_a_trained_model_in_that_place_is_kept(official, make_toy_model, tmp_path, capsys):
    torch.save(official, tmp_path / "a.pth")
    shutil.copytree(make_toy_model(ClassSet.numbered(3)), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert import_(tmp_path / "a.pth", tmp_path / "model") == 2
    assert "model is there and not empty; expected a new or empty folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_names_that_repeat_are_told_apart(official, tmp_path, capsys):
    names = ["road", "sky", "road"]
    torch.save({"state_dict": official, "meta": {"dataset_meta": {"classes": names}}}, tmp_path / "b.pth")
    assert import_(tmp_path / "b.pth", tmp_path / "model") == 0
    told = "class names of the file that cannot be used as they are: 'road' is 'road_2'"
    assert told in capsys.readouterr().out
    assert load_config(tmp_path / "model").classes.names == ("road", "sky", "road_2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backbone=dict(num_layers=5)", "backbone.num_layers 5, found 4"),
        ("backbone=dict(num_clusters=9)", "backbone.num_clusters 9, found 3"),
        ("decode_head=dict(num_layers=2)", "decode_head.num_layers 2, found 1"),
        ("backbone=dict(act_cfg=dict(type='ReLU'))", "backbone.act_cfg.type 'ReLU', found 'GELU'"),
        ("backbone=dict(norm_cfg=dict(type='LN', eps=1e-3))", "backbone.norm_cfg.eps 0.001, found 1e-06"),
        ("data_preprocessor=dict(mean=[1, 2, 3], std=[0, 0, 0])", "say what holds with --normalisation"),
    ],
)
def test_weights_that_are_not_what_they_say_are_refused(official, text, message, tmp_path, capsys):
    torch.save({"state_dict": official, "meta": {"cfg": f"model = dict({text})\n"}}, tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "model", "--injection-point", "1") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_images_that_were_not_normalised_are_not(official, tmp_path):
    text = "model = dict(data_preprocessor=dict(mean=None, std=None))\n"
    torch.save({"state_dict": official, "meta": {"cfg": text}}, tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "model") == 0
    images = load_config(tmp_path / "model").input
    assert (images.mean, images.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_integers_are_no_weights(official, tmp_path, capsys):
    name = "backbone.ln1.weight"
    torch.save({"state_dict": {**official, name: official[name].long()}}, tmp_path / "b.pth")
    assert import_(tmp_path / "b.pth", tmp_path / "model") == 2
    assert "infinite or no numbers in backbone.norm.weight (int64, expected float32)" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("size", ["64", "(64,)", "[64, 64]"])
def test_an_image_size_may_be_one_side_of_a_square(size, tmp_path):
    config = ViTConfig(image_size=(64, 64), embed_dim=64, depth=4, num_heads=1)
    text = f"model = dict(backbone=dict(img_size={size}))"
    weights = to_official(build_network(config, 3).state_dict())
    torch.save({"state_dict": weights, "meta": {"cfg": text}}, tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "model") == 0
    assert load_config(tmp_path / "model").network.image_size == (64, 64)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("backbone.patch_embed.projection.bias", torch.zeros(3), "holds no network of a known layout"),
        ("backbone.pos_embed", torch.zeros(1, 1, 64).expand(1, 1 + 3000 * 3000, 64), "stands for 2304000256 bytes"),
    ],
)
def test_weights_of_absurd_sizes_end_in_one_line(official, name, tensor, message, tmp_path, capsys):
    torch.save({**official, name: tensor}, tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "model") == 2
    assert message in capsys.readouterr().err


def test_safetensors_are_known_by_their_content(official, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in official.items()}, tmp_path / "a.bin")
    assert import_(tmp_path / "a.bin", tmp_path / "model") == 0
