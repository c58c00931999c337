# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Weights from elsewhere: key layouts, position embeddings, and what is said about the rest."""

from __future__ import annotations

import dataclasses
import math
import shutil
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toys import CLASSES

from clustvit_ros.errors import ModelError
from clustvit_ros.networks import build_network, load_config, load_segmenter, network_config, save_model
from clustvit_ros.networks.official import to_official
from clustvit_ros.paths import find_recipe
from clustvit_ros.training.initialisation import known_classes, load_init, save_encoder
from clustvit_ros.training.recipe import read_recipe
from clustvit_ros.training.trainer import Trainer

SMALL = {"image_size": [64, 64], "embed_dim": 48, "depth": 2, "head_depth": 1}


def network(architecture="vit_t", seed=0, **overrides):
    torch.manual_seed(seed)
    config = network_config(architecture, {**SMALL, **overrides})
    built = build_network(config, 3)
    with torch.no_grad():
        built.backbone.pos_embed.normal_()
    return built


def to_timm(backbone, bias):
    """A ViT's weights as timm names them: with a bias of the patch projection, and a classifier."""
    weights = {name.replace("patch_embed.projection", "patch_embed.proj"): v.clone() for name, v in backbone.items()}
    weights["patch_embed.proj.bias"] = bias
    weights["pos_embed"][:, 1:] -= bias
    weights["head.weight"], weights["head.bias"] = torch.randn(1000, 48), torch.randn(1000)
    return weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_weights_give_the_same_encoder(tmp_path, suffix):
    source, target = network(seed=1), network("clustvit_t", seed=2, injection_point=1)
    weights = to_timm(source.backbone.state_dict(), torch.randn(48))
    path = tmp_path / f"vit{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"model": weights}, path)
    report = load_init(target, path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = source.eval().backbone(images), target.eval().backbone(images, merge_threshold=1.0)
    torch.testing.assert_close(got.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    assert report.unknown == ["head.bias", "head.weight"]
    assert "backbone.clusterer.fc1.weight" in report.missing and "head.class_embed" in report.missing
    assert not report.resized and not report.mismatched
    assert "left random: " in str(report) and "not used: head.bias, head.weight" in str(report)


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_openmmlab_weights_give_the_same_encoder(tmp_path, prefix):
    source, target = network(seed=1), network(seed=2)
    official = to_official(source.state_dict())
    if not prefix:  # as mmpretrain's converters write backbones alone
        official = {k.removeprefix("backbone."): v for k, v in official.items() if k.startswith("backbone.")}
    torch.save({"state_dict": official, "meta": {}}, tmp_path / "mmseg.pth")
    report = load_init(target, tmp_path / "mmseg.pth")
    for name, tensor in source.backbone.state_dict().items():
        assert torch.equal(target.backbone.state_dict()[name], tensor), name
    assert bool(report.missing) == (not prefix) and not report.unknown


def test_position_embeddings_are_resized_to_the_grid(tmp_path):
    source, target = network(seed=1), network(seed=2, image_size=[96, 160])
    with torch.no_grad():  # a ramp along x stays one
        ramp = torch.linspace(0, 1, 4).repeat(4)[:, None].expand(16, 48)
        source.backbone.pos_embed[:, 1:] = ramp
    torch.save(to_timm(source.backbone.state_dict(), torch.zeros(48)), tmp_path / "vit.pth")
    report = load_init(target, tmp_path / "vit.pth")
    assert report.resized == ["backbone.pos_embed"] and "resized: backbone.pos_embed" in str(report)
    grid = target.backbone.pos_embed[0, 1:, 0].view(6, 10)
    assert torch.equal(target.backbone.pos_embed[:, 0], source.backbone.pos_embed[:, 0])
    torch.testing.assert_close(grid, grid[:1].expand(6, 10))
    assert (grid[0].diff() >= -0.05).all() and grid[0, -1] > 0.9 > 0.1 > grid[0, 0]


def test_an_encoder_of_another_shape_knows_its_grid(tmp_path):
    source, target = network(seed=1, image_size=[32, 128]), network(seed=2, image_size=[64, 256])
    save_encoder(tmp_path / "encoder.safetensors", source.backbone)
    report = load_init(target, tmp_path / "encoder.safetensors")
    assert report.resized == ["backbone.pos_embed"] and not report.mismatched
    expected = source.backbone.resized_pos_embed((4, 16))
    torch.testing.assert_close(target.backbone.pos_embed.detach(), expected.detach())


def test_a_model_folder_of_other_classes_leaves_the_head_random(tmp_path, write_recipe):
    config = read_recipe(write_recipe()).model_config()
    source = build_network(config.network, 3)
    save_model(tmp_path / "model", config, source)
    target = build_network(config.network, 5)
    report = load_init(target, tmp_path / "model")
    assert torch.equal(target.backbone.blocks[0].attn.qkv.weight, source.backbone.blocks[0].attn.qkv.weight)
    assert any("head.class_embed (1, 3, 48) instead of (1, 5, 48)" in text for text in report.mismatched)
    assert "head.class_embed" in report.missing


WIDTHS = {"embed_dim": 64, "num_heads": 2}
HEADS = {
    "segmenter": {}, "linear": {"head": "linear"}, "detail": {"head": "detail", "stem": "conv", "stem_blocks": 1},
    "two points": {"injection_points": [0, 1], "stem": "conv"},
}  # fmt: skip


def write_narrow(folder, write_recipe, **overrides):
    """A model whose norms, biases and embeddings are anything but their initial values."""
    recipe = read_recipe(write_recipe(architecture="clustvit_t", network={**SMALL, **WIDTHS, **overrides}))
    config = recipe.model_config()
    torch.manual_seed(1)
    built = build_network(config.network, len(config.classes))
    with torch.no_grad():
        for tensor in built.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn_like(tensor))  # variances stay positive: they start at 1
    save_model(folder, config, built)
    return config, load_segmenter(folder)


@pytest.mark.parametrize("head", ["linear", "detail"])
def test_a_joint_network_starts_with_its_own_classifier(tmp_path, write_recipe, head):
    """Rows of the model's own classes are kept; those of the other data sets, which stand behind them, stay random."""
    recipe = read_recipe(write_recipe(network={"head": head}))
    config = dataclasses.replace(recipe.model_config().network, stem="conv")
    source, joint = build_network(config, 3), build_network(config, 5)
    save_model(tmp_path / "model", recipe.model_config(), source)
    random = joint.head.classify.weight[3:].clone()
    report = load_init(joint, tmp_path / "model", recipe.model_config().classes.names)
    assert not report.mismatched and not report.missing
    assert torch.equal(joint.head.classify.weight[3:], random)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, got = source.eval()(images).logits, joint.eval()(images).logits[:, :3]
    torch.testing.assert_close(got, expected)
    (tmp_path / "model/model.yaml").unlink()
    file = tmp_path / "model/model.safetensors"
    assert load_init(build_network(config, 5), file, ("a", "b")).mismatched
    assert not load_init(build_network(config, 5), file, ("a", "b", "c")).mismatched


@pytest.mark.parametrize("head", ["segmenter", "linear", "detail"])
def test_each_class_starts_as_the_one_of_its_name(tmp_path, write_recipe, head):
    """As many classes in another order, or others of the same number, are not the same ones."""
    config, source = write_narrow(tmp_path / "model", write_recipe, **HEADS[head])
    assert config.classes.names == ("sky", "road", "car")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = source(images, merge_threshold=1.0).logits
    turned = build_network(config.network, 3).eval()
    report = load_init(turned, tmp_path / "model", ("car", "sky", "road"))
    assert not report.new_classes and not report.missing
    with torch.no_grad():
        logits = turned(images, merge_threshold=1.0).logits
    torch.testing.assert_close(logits, expected[:, [2, 0, 1]], rtol=1e-4, atol=1e-4)
    fewer = build_network(config.network, 2)
    assert not load_init(fewer, tmp_path / "model", ("road", "car")).mismatched
    more = build_network(config.network, 4)
    report = load_init(more, tmp_path / "model", ("dog", "sky", "car", "cat"))
    assert report.new_classes == ["dog", "cat"] and "classes that start random: dog, cat" in str(report)
    if head != "segmenter":
        weights = source.head.classify.weight
        assert torch.equal(fewer.head.classify.weight, weights[1:])
        assert torch.equal(more.head.classify.weight[1:3], weights[[0, 2]])
    others = build_network(config.network, 3)
    random = {name: value.clone() for name, value in others.state_dict().items()}
    report = load_init(others, tmp_path / "model", ("cat", "dog", "cow"))
    rows = [name for name in random if name.startswith(("head.classify.", "head.class_embed", "head.mask_norm."))]
    assert rows and set(report.missing) == set(rows) and report.new_classes == ["cat", "dog", "cow"]
    assert all(torch.equal(others.state_dict()[name], random[name]) for name in rows)


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("head", HEADS)
def test_a_wider_network_starts_as_the_narrow_one(tmp_path, write_recipe, head, times):
    config, source = write_narrow(tmp_path / "narrow", write_recipe, **HEADS[head])
    wide = dataclasses.replace(config.network, embed_dim=64 * times, num_heads=2 * times)
    target = build_network(wide, len(config.classes)).eval()
    report = load_init(target, tmp_path / "narrow")
    assert report.widened == times and f"widened {times} times" in str(report)
    assert not report.missing and not report.mismatched
    images = torch.randn(2, 3, 64, 64)
    for setting in ({"merge_threshold": 1.0}, {"token_capacity": 5}):
        with torch.no_grad():
            expected, got = source(images, **setting), target(images, **setting)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.cluster_logits, expected.cluster_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_a_deeper_network_starts_as_the_shallow_one_and_learns_on(tmp_path, write_recipe, head):
    config, source = write_narrow(tmp_path / "shallow", write_recipe, **HEADS[head])
    deep = dataclasses.replace(config.network, depth=config.network.depth + 3)
    target = build_network(deep, len(config.classes)).eval()
    report = load_init(target, tmp_path / "shallow")
    assert report.deepened == 3 and "3 further blocks start as the identity" in str(report)
    assert not report.mismatched and not report.missing
    images = torch.randn(2, 3, 64, 64)
    for setting in ({"merge_threshold": 1.0}, {"token_capacity": 5}):
        with torch.no_grad():
            expected, got = source(images, **setting), target(images, **setting)
        torch.testing.assert_close(got.logits, expected.logits)
    target(images).logits.square().sum().backward()
    assert float(target.backbone.blocks[-1].mlp.fc2.weight.grad.abs().sum()) > 0
    fresh = load_init(build_network(config.network, len(config.classes)), tmp_path / "shallow")
    assert fresh.deepened == 0


@pytest.mark.parametrize("head", ["segmenter", "linear", "detail"])
def test_other_classes_clusters_and_positions_are_not_copied(tmp_path, write_recipe, head):
    config, source = write_narrow(tmp_path / "narrow", write_recipe, num_clusters=1, **HEADS[head])
    wide = dataclasses.replace(config.network, embed_dim=128, num_heads=4, num_clusters=3, image_size=(64, 128))
    classes = len(config.classes)
    target = build_network(wide, 2 * classes)
    random = {name: value.clone() for name, value in target.state_dict().items()}
    report = load_init(target, tmp_path / "narrow")
    expected = {"backbone.clusterer.fc2.weight", "backbone.clusterer.fc2.bias"}
    expected |= {name for name in random if name.startswith(("head.classify.", "head.class_embed", "head.mask_norm."))}
    assert set(report.missing) == expected
    assert all(torch.equal(target.state_dict()[name], random[name]) for name in expected)
    positions = source.backbone.resized_pos_embed(target.backbone.grid_size)
    torch.testing.assert_close(target.backbone.pos_embed.detach(), positions.detach().repeat(1, 1, 2))


def test_copied_channels_learn_different_things(tmp_path, write_recipe):
    config, _ = write_narrow(tmp_path / "narrow", write_recipe)
    wide = dataclasses.replace(config.network, embed_dim=128, num_heads=4)
    target = build_network(wide, len(config.classes))
    load_init(target, tmp_path / "narrow")
    images = torch.randn(2, 3, 64, 64)
    logits = target(images, token_capacity=5).logits
    torch.nn.functional.cross_entropy(logits, torch.randint(logits.shape[1], (2, *logits.shape[2:]))).backward()
    for name in ("attn.proj.weight", "mlp.fc1.weight"):
        gradient = target.backbone.blocks[0].get_parameter(name).grad
        first, second = gradient.chunk(2)
        assert (first - second).abs().max() > 0.1 * gradient.abs().max(), name


def test_a_width_that_is_no_multiple_is_refused(tmp_path, write_recipe):
    config, _ = write_narrow(tmp_path / "narrow", write_recipe)
    target = build_network(dataclasses.replace(config.network, embed_dim=96, num_heads=3), len(config.classes))
    with pytest.raises(ModelError, match="expected a ViT of width 96 or a whole part of it"):
        load_init(target, tmp_path / "narrow")


def test_what_cannot_be_used_is_said(tmp_path):
    target = network()
    with pytest.raises(ModelError, match="does not exist"):
        load_init(target, tmp_path / "nothing.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        load_init(target, tmp_path / "broken.safetensors")
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="none of its 1 tensors fits the network; expected a ViT of width 48 "):
        load_init(target, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="no tensors by name"):
        load_init(target, tmp_path / "list.pth")


def test_a_model_that_the_user_got_is_found_by_its_name(toy_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    shutil.copytree(toy_run / "model", tmp_path / "clustvit_ros/models/got")
    config, trained = load_config("got"), load_segmenter("got")
    network = build_network(config.network, len(config.classes))
    report = load_init(network, "got", config.classes.names)
    assert report.source == str(tmp_path / "clustvit_ros/models/got/model.safetensors") and not report.missing
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in trained.state_dict().items())
    recipe = read_recipe(find_recipe("add_merging"), "got")
    assert (recipe.init, recipe.architecture) == ("got", "clustvit_t") and known_classes(recipe.init) == CLASSES


def test_pickled_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        load_init(network(), tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_images_that_are_learnt_and_scored_are_told(train, write_recipe, scenes, tmp_path, capsys):
    recipe = write_recipe(schedule={"epochs": 1, "validate_every": 1})
    assert train(recipe, tmp_path / "clean") == 0
    assert "learnt as well" not in capsys.readouterr().err
    shutil.copytree(scenes, tmp_path / "data")
    for kind in ("images", "labels"):
        shutil.copy(scenes / "train" / kind / "003.png", tmp_path / "data/val" / kind / "again.png")
    assert train(recipe, tmp_path / "run", data=tmp_path / "data") == 0
    assert "1 of 4 images of val are learnt as well (again.png)" in capsys.readouterr().err


def interrupted_after(epochs):
    """Stands for `_train_epoch`: Ctrl-C comes in a later one."""
    original = Trainer._train_epoch

    def train_epoch(self, epoch):
        if epoch == epochs:
            raise KeyboardInterrupt
        return original(self, epoch)

    return train_epoch


def test_a_class_that_the_start_knows_may_be_absent(train, write_recipe, toy_run, scenes, tmp_path, capsys):
    """A robot's own pictures need not show everything that the model can tell."""
    shutil.copytree(scenes, tmp_path / "data")
    for path in (tmp_path / "data/train/labels").glob("*.png"):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(labels == 2, 1, labels))
    start = str(toy_run / "model")
    assert train(write_recipe(), tmp_path / "run", "--init", start, data=tmp_path / "data") == 0
    assert "no pixel of car in the training labels: what the start knows of it fades" in capsys.readouterr().err
    config = load_config(tmp_path / "run/model")
    assert config.classes.names == CLASSES and math.isfinite(config.scores["per_class_iou"]["car"])
    gone = tmp_path / "gone"  # a run goes on without what it started from
    shutil.copytree(start, gone)
    with mock.patch("clustvit_ros.training.trainer.Trainer._train_epoch", interrupted_after(1)):
        assert train(write_recipe(), tmp_path / "on", "--init", str(gone), data=tmp_path / "data") == 130
    shutil.rmtree(gone)
    assert train(write_recipe(), tmp_path / "on", "--init", str(gone), data=tmp_path / "data") == 0
    other = [{"name": name, "colour": [index, 0, 0]} for index, name in enumerate(("sky", "road", "cow"))]
    assert train(write_recipe(classes=other), tmp_path / "cow", "--init", start, data=tmp_path / "data") == 2
    assert "no pixel of cow in the training labels; check" in capsys.readouterr().err
    schedule = {"teacher": "init", "distillation_weight": 1.0}
    taught = write_recipe(classes=other, schedule=schedule)
    assert train(taught, tmp_path / "taught", "--init", start) == 2
    assert "teacher is 'init', which knows no cow" in capsys.readouterr().err
