# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Official checkpoints through `import-checkpoint` and `load_segmenter`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from clustvit_ros.classes import ClassSet, class_set_names, load_class_set
from clustvit_ros.cli.main import main
from clustvit_ros.errors import ModelError
from clustvit_ros.networks import ViTConfig, build_network, load_config, load_segmenter, network_config
from clustvit_ros.networks.official import from_official, to_official
from clustvit_ros.training.initialisation import load_init, save_encoder

IMAGE_CASES = ("a_basic", "b_batch2", "c_nonsquare_k4_ip1", "e_empty_id2", "f_vit_baseline", "l_k1_last_layer", "m_ip0")


def import_(checkpoint, out, *options):
    return main(["import-checkpoint", "--checkpoint", str(checkpoint), "--out", str(out), *map(str, options)])


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_imported_model_equals_the_official_one(golden_dir, tmp_path, name):
    config = json.loads((golden_dir / "cases.json").read_text())[name]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert import_(golden_dir / config["weights"], tmp_path / "model", "--config", tmp_path / "config.json") == 0
    network = load_segmenter(tmp_path / "model")
    expected = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(golden_dir / f"{name}.npz").items()}
    with torch.no_grad():
        output = network(expected["input"])
        logits = network(expected["input"]).logits
        resized = F.interpolate(logits, size=expected["input"].shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.logits, expected["seg_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(resized, expected["seg_logits_resized"], rtol=0, atol=1e-4)
    if "cluster_ids" in expected:
        assert torch.equal(output.cluster_ids, expected["cluster_ids"])


def official_checkpoint(path, meta=None, **changes):
    torch.manual_seed(0)
    config = {
        "backbone": "clustvit", "image_size": (64, 64), "embed_dim": 128, "depth": 4, "num_heads": 2, "head_depth": 1,
    }  # fmt: skip
    network = build_network(ViTConfig(**{**config, "head_depth": 1, **changes}), 11)
    weights = to_official(network.state_dict())
    torch.save({"meta": meta or {}, "state_dict": weights}, path)
    return weights


def test_round_trip_is_bit_identical(tmp_path):
    weights = official_checkpoint(tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "model") == 0
    back = to_official(load_segmenter(tmp_path / "model").state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert from_official(back).keys() == load_segmenter(tmp_path / "model").state_dict().keys()


def test_without_hints_the_official_defaults_hold(tmp_path):
    official_checkpoint(tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "model") == 0
    config = load_config(tmp_path / "model")
    assert (config.network.injection_point, config.network.num_heads, config.network.image_size) == (3, 2, (64, 64))
    assert config.classes == load_class_set("camvid")  # eleven classes


def test_the_checkpoints_own_configuration_is_read_and_options_override_it(tmp_path):
    text = (
        "import os\nmodel = dict(type='X', decode_head=dict(num_heads=8, loss=f()),"
        " backbone=dict(num_heads=4, injection_points=[1], img_size=(32, 128), norm=None))\n"
    )
    official_checkpoint(tmp_path / "a.pth", meta={"cfg": text}, image_size=(32, 128))
    assert import_(tmp_path / "a.pth", tmp_path / "model") == 0
    network = load_config(tmp_path / "model").network
    assert (network.num_heads, network.injection_point, network.head_heads, network.image_size) == (4, 1, 8, (32, 128))
    assert import_(tmp_path / "a.pth", tmp_path / "model", "--injection-point", 2) == 0
    assert load_config(tmp_path / "model").network.injection_point == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image-size", "32x64"), "makes 8 patches, the checkpoint's position embedding has 16"),
        (("--image-size", "64"), "expected HEIGHTxWIDTH"),
        (("--injection-point", "9"), "injection_point: got 9 with 4 blocks"),
        (("--num-heads", "3"), "embed_dim 128 is not a multiple of num_heads 3"),
        (("--classes", "ade20k"), "ade20k has 150 classes, the checkpoint has 11"),
        (("--classes", "mars"), "expected one of ade20k, camvid"),
    ],
)
def test_contradictions_are_refused(tmp_path, capsys, options, message):
    official_checkpoint(tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "model", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_missing_unknown_and_misshaped_weights_are_listed(tmp_path, capsys):
    weights = official_checkpoint(tmp_path / "a.pth")
    del weights["decode_head.mask_norm.bias"]
    weights["backbone.extra"] = torch.zeros(1)
    weights["decode_head.dec_proj.weight"] = torch.zeros(3, 3)
    torch.save({"state_dict": weights}, tmp_path / "b.pth")
    assert import_(tmp_path / "b.pth", tmp_path / "model") == 2
    error = capsys.readouterr().err
    for part in ("missing: head.mask_norm.bias", "unknown: backbone.extra", "mis-shaped: head.dec_proj.weight (3, 3)"):
        assert part in error


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    assert import_(tmp_path / "bomb.pth", tmp_path / "model") == 2
    assert "cannot be read as weights of plain tensors" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_is_missing_or_damaged_says_so(tmp_path, capsys):
    assert import_(tmp_path / "none.pth", tmp_path / "model") == 2
    assert "none.pth: does not exist" in capsys.readouterr().err
    official_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"no checkpoint at all")
    assert import_(tmp_path / "a.pth", tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert "cannot be read as weights" in error and "weights_only" not in error
    with pytest.raises(ModelError, match="is a folder without model"):
        load_init(build_network(ViTConfig(image_size=(64, 64), depth=4), 3), tmp_path)


def test_a_convolutional_stem_has_no_official_name():
    network = build_network(ViTConfig(backbone="vit", image_size=(64, 64), depth=1, stem="conv"), 3)
    with pytest.raises(ModelError, match="convolutional stem"):
        to_official(network.state_dict())


def test_packaged_class_lists_are_usable():
    counts = {name: len(load_class_set(name)) for name in class_set_names()}
    assert counts == {
        "ade20k": 150, "camvid": 11, "cityscapes": 19, "labelmefacade": 8, "rumexweeds": 3, "sim": 10, "suim": 9,
        "ycor": 8,
    }  # fmt: skip
    assert len(set(ClassSet.numbered(300).colours[:20])) == 20


def timm_weights(**changes):
    """Random weights with timm's names for a ViT of two blocks and 4 x 4 patches, classifier included."""
    generator = torch.Generator().manual_seed(0)
    C, hidden = 64, 256
    shapes = {"cls_token": (1, 1, C), "pos_embed": (1, 17, C), "patch_embed.proj.weight": (C, 3, 16, 16)}
    shapes |= {
        "patch_embed.proj.bias": (C,), "norm.weight": (C,), "norm.bias": (C,), "head.weight": (9, C), "head.bias": (9,),
    }  # fmt: skip
    for i in range(2):
        block = {"norm1.weight": (C,), "norm1.bias": (C,), "norm2.weight": (C,), "norm2.bias": (C,)}
        block |= {"attn.qkv.weight": (3 * C, C), "attn.qkv.bias": (3 * C,), "attn.proj.weight": (C, C)}
        block |= {"attn.proj.bias": (C,), "mlp.fc1.weight": (hidden, C), "mlp.fc1.bias": (hidden,)}
        block |= {"mlp.fc2.weight": (C, hidden), "mlp.fc2.bias": (C,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= changes
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items() if shape}


def timm_tokens(weights, images):
    """What timm's ViT computes before its head, written from its documentation."""

    def layer(name, x):
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    x = torch.nn.functional.conv2d(images, kernel, bias, stride=16).flatten(2).transpose(1, 2)
    if weights["pos_embed"].shape[1] == x.shape[1]:  # DeiT III gives the class token no position
        x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x + weights["pos_embed"]], dim=1)
    else:
        x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], dim=1) + weights["pos_embed"]
    for i in range(2):
        q, k, v = (
            layer(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).unflatten(2, (3, 1, 64)).permute(2, 0, 3, 1, 4)
        )
        attended = torch.softmax(q @ k.transpose(2, 3) / 8.0, dim=3) @ v
        branch = layer(f"blocks.{i}.attn.proj", attended.transpose(1, 2).flatten(2))
        x = x + branch * weights.get(f"blocks.{i}.ls1.gamma", 1.0)
        hidden = torch.nn.functional.gelu(layer(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + layer(f"blocks.{i}.mlp.fc2", hidden) * weights.get(f"blocks.{i}.ls2.gamma", 1.0)
    return norm("norm", x)[:, 1:]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "timm.pth"),
        ({}, "timm.safetensors"),
        ({"pos_embed": (1, 16, 64), "blocks.0.ls1.gamma": (64,), "blocks.1.ls2.gamma": (64,)}, "deit3.pth"),
        ({"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 17, 32), "decoder_embed.bias": (32,)}, "mae.pth"),
    ],
)
def test_an_encoder_of_timm_gives_the_tokens_timm_computes(tmp_path, capsys, changes, kind):
    weights = timm_weights(**changes)
    if kind.endswith("safetensors"):
        save_file(weights, tmp_path / kind)
    else:
        torch.save({"model": weights}, tmp_path / kind)
    options = ("--classes", "camvid", "--normalisation", "imagenet")
    assert import_(tmp_path / kind, tmp_path / "model", *options) == 0
    printed = capsys.readouterr().out
    assert "head.bias, head.weight" in printed and "fresh, to be trained: head" in printed
    network = load_segmenter(tmp_path / "model").requires_grad_(False)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network.backbone(images).tokens, timm_tokens(weights, images), rtol=0, atol=1e-4)
    assert network(images).logits.shape == (2, 11, 4, 4)
    assert load_config(tmp_path / "model").input.mean == (123.675, 116.28, 103.53)


def test_small_layer_scales_of_half_precision_are_folded_in_float32(tmp_path):
    weights = {name: tensor.half() for name, tensor in timm_weights(**{"blocks.0.ls1.gamma": (64,)}).items()}
    weights["blocks.0.ls1.gamma"] = torch.full((64,), 1e-4).half()
    torch.save(weights, tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "model", "--classes", "camvid") == 0
    folded = load_segmenter(tmp_path / "model").backbone.blocks[0].attn.proj.weight
    expected = weights["blocks.0.attn.proj.weight"].float() * weights["blocks.0.ls1.gamma"].float()[:, None]
    torch.testing.assert_close(folded, expected, rtol=1e-6, atol=0)


def test_an_encoder_goes_into_a_clustvit_of_another_size(tmp_path, capsys):
    torch.save(timm_weights(), tmp_path / "a.pth")
    options = ("--classes", "camvid", "--arch", "clustvit_t", "--head", "linear", "--image-size", "96x128")
    assert import_(tmp_path / "a.pth", tmp_path / "model", *options, "--injection-point", 1) == 0
    fresh = "fresh, to be trained: backbone.clusterer, backbone.regenerator, head"
    assert fresh in capsys.readouterr().out
    config = load_config(tmp_path / "model").network
    assert (config.embed_dim, config.depth, config.num_heads, config.head) == (64, 2, 1, "linear")
    assert config.image_size == (96, 128) and config.merges
    assert load_segmenter(tmp_path / "model").backbone.pos_embed.shape == (1, 49, 64)


def test_openmmlabs_encoders_are_read_with_and_without_prefix(tmp_path):
    official = official_checkpoint(tmp_path / "full.pth", backbone="vit")
    encoder = {name: value for name, value in official.items() if name.startswith("backbone.")}
    torch.save({"state_dict": encoder}, tmp_path / "a.pth")
    torch.save({name.removeprefix("backbone."): value for name, value in encoder.items()}, tmp_path / "b.pth")
    for name in ("a", "b"):
        assert import_(tmp_path / f"{name}.pth", tmp_path / name, "--classes", "camvid") == 0
        loaded = to_official(load_segmenter(tmp_path / name).state_dict())
        assert all(torch.equal(loaded[key], value) for key, value in encoder.items())


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, (), "is an encoder without a head; name the classes with --classes"),
        ({}, ("--classes", "camvid", "--arch", "resnet"), "--arch: got 'resnet', expected one of vit_t"),
        ({"norm.bias": None}, ("--classes", "camvid"), "missing: backbone.norm.bias"),
        ({"reg_token": (1, 4, 64)}, ("--classes", "camvid"), "unknown: backbone.reg_token"),
        ({"blocks.0.mlp.fc2.bias": (3,)}, ("--classes", "camvid"), "mis-shaped: backbone.blocks.0.mlp.fc2.bias (3,)"),
        ({"pos_embed": (1, 12, 64)}, ("--classes", "camvid"), "position embedding: got 12 entries"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(tmp_path, capsys, changes, options, message):
    torch.save(timm_weights(**changes), tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "model", *options) == 2
    assert message in capsys.readouterr().err


def test_a_clustr_classifiers_encoder_gets_a_fresh_head(golden_dir, tmp_path, capsys):
    checkpoint = golden_dir / "clustr" / "network_small.pth"
    (tmp_path / "heads.json").write_text('{"num_heads": [1, 2, 5, 8]}')
    options = ["import-checkpoint", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "model")]
    assert main(options) == 2
    assert "is a ClusTR classifier; name the classes to segment with --classes" in capsys.readouterr().err
    assert main([*options, "--classes", "camvid", "--arch", "vit_t"]) == 2
    assert "expected one of clustr_b1, clustr_b2, clustr_b3" in capsys.readouterr().err
    assert main([*options, "--classes", "camvid", "--config", str(tmp_path / "heads.json")]) == 0
    assert "fresh, to be trained: head" in capsys.readouterr().out
    network = load_segmenter(tmp_path / "model")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(network.backbone.stages[2].blocks[1].attn.kv2.weight, weights["block3.1.attn.kv2.weight"])
    assert network.backbone.stages[2].blocks[0].attn.num_heads == 5


@pytest.mark.parametrize("architecture", ["clustr_b1", "cast_t"])
def test_other_families_have_no_official_name_to_go_back_to(architecture):
    with torch.device("meta"):
        network = build_network(network_config(architecture, {}), 3)
    with pytest.raises(ModelError, match="only ViT and ClustViT have one"):
        to_official(network.state_dict())


def layouts(tmp_path, golden_dir):
    """Checkpoints of every layout: name -> (weights, options of the import)."""
    scales = {f"blocks.{block}.{name}": (64,) for block in range(2) for name in ("ls1.gamma", "ls2.gamma")}
    first_deit3 = {f"blocks.{block}.{name}": (64,) for block in range(2) for name in ("gamma_1", "gamma_2")}
    distilled = {
        "dist_token": (1, 1, 64), "pos_embed": (1, 18, 64), "head_dist.weight": (7, 64), "head_dist.bias": (7,)
    }  # fmt: skip
    official = official_checkpoint(tmp_path / "full.pth", backbone="vit")
    encoder = {name: value for name, value in official.items() if name.startswith("backbone.")}
    clustr = torch.load(golden_dir / "clustr" / "network_small.pth", weights_only=True)["state_dict"]
    headless = ("--classes", "camvid")
    wide = (*headless, "--image-size", "32x128")  # as many patches as 64 x 64
    return {
        "timm": (timm_weights(), headless),
        "augreg": (timm_weights(**{"patch_embed.proj.bias": (64,)}), headless),
        "deit distilled": (timm_weights(**distilled), headless),
        "deit III": (timm_weights(pos_embed=(1, 16, 64), **scales), headless),
        "deit III, first names": (timm_weights(pos_embed=(1, 16, 64), **first_deit3), headless),
        "official segmenter": (official, ()),
        "openmmlab encoder": ({name.removeprefix("backbone."): value for name, value in encoder.items()}, headless),
        "clustr": (clustr, headless),
        "clustr, module.": ({f"module.{name}": value for name, value in clustr.items()}, headless),
        "official segmenter, module.": ({f"module.{name}": value for name, value in official.items()}, ()),
        "deit distilled, another size": (timm_weights(**distilled), (*headless, "--image-size", "96x128")),
        "timm, another shape": (timm_weights(), wide),
        "openmmlab encoder, another shape": (encoder, wide),
    }


@pytest.mark.parametrize(
    "layout",
    ["timm", "augreg", "deit distilled", "deit III", "deit III, first names", "official segmenter",
     "openmmlab encoder", "clustr", "clustr, module.", "official segmenter, module.", "deit distilled, another size",
     "timm, another shape", "openmmlab encoder, another shape"],
)  # fmt: skip
@torch.no_grad()
def test_training_starts_from_what_an_import_gives(layout, tmp_path, golden_dir):
    """`train --init` and `import-checkpoint` are one importer: the features of every layout are equal."""
    weights, options = layouts(tmp_path, golden_dir)[layout]
    torch.save({"model": weights}, tmp_path / "a.pth")
    if "clustr" in layout:
        (tmp_path / "heads.json").write_text('{"num_heads": [1, 2, 5, 8]}')
        options = (*options, "--config", str(tmp_path / "heads.json"))
    assert import_(tmp_path / "a.pth", tmp_path / "model", *options) == 0
    imported = load_segmenter(tmp_path / "model")
    torch.manual_seed(1)
    config = load_config(tmp_path / "model")
    network = build_network(config.network, len(config.classes)).eval()
    images = torch.randn(1, 3, *config.network.image_size)
    before = network.backbone(images).tokens
    load_init(network, tmp_path / "a.pth")
    features = network.backbone(images).tokens
    assert (features - before).abs().max() > 0.1, "something was loaded"
    torch.testing.assert_close(features, imported.backbone(images).tokens, rtol=0, atol=1e-5)


@torch.no_grad()
def test_our_own_encoder_of_a_wide_grid_says_so_itself(tmp_path):
    """A file of `pretrain` carries its grid: as many patches in another shape are resized, by both ways alike."""
    changes = {"image_size": [32, 128], "embed_dim": 64, "num_heads": 1, "depth": 2, "head_depth": 1}
    trained = build_network(network_config("vit_t", changes), 11).eval()
    save_encoder(tmp_path / "encoder.safetensors", trained.backbone)
    for size in ("32x128", "64x64"):
        options = ("--classes", "camvid", "--image-size", size)
        assert import_(tmp_path / "encoder.safetensors", tmp_path / size, *options) == 0
        imported = load_segmenter(tmp_path / size)
        network = build_network(load_config(tmp_path / size).network, 11).eval()
        load_init(network, tmp_path / "encoder.safetensors")
        images = torch.randn(1, 3, *load_config(tmp_path / size).network.image_size)
        tokens = imported.backbone(images).tokens
        torch.testing.assert_close(network.backbone(images).tokens, tokens, rtol=0, atol=1e-5)
        same = torch.equal(imported.backbone.pos_embed, trained.backbone.pos_embed)
        assert same == (size == "32x128")


def test_what_was_assumed_is_said_and_what_was_told_is_not(tmp_path, capsys):
    official_checkpoint(tmp_path / "a.pth")
    assert import_(tmp_path / "a.pth", tmp_path / "m") == 0
    told = capsys.readouterr().err
    assert "assumed" in told and "2 heads (--num-heads)" in told and "after block 3 (--injection-point)" in told
    assert import_(tmp_path / "a.pth", tmp_path / "m", "--num-heads", 2, "--injection-point", 2, "--head-heads", 2) == 0
    assert "assumed" not in capsys.readouterr().err
    meta = {"cfg": "model = dict(backbone=dict(num_heads=2, injection_points=[2]), decode_head=dict(num_heads=2))"}
    official_checkpoint(tmp_path / "b.pth", meta=meta)
    assert import_(tmp_path / "b.pth", tmp_path / "m") == 0
    assert "assumed" not in capsys.readouterr().err


def test_an_architecture_of_another_size_is_refused(tmp_path, capsys):
    network = build_network(ViTConfig(backbone="vit", image_size=(64, 64), head="linear"), 3)
    torch.save(network.backbone.state_dict(prefix="backbone."), tmp_path / "e.pth")
    assert import_(tmp_path / "e.pth", tmp_path / "m", "--arch", "clustvit_b", "--classes", "camvid") == 2
    assert "clustvit_b has embed_dim 768, depth 12, but the weights have embed_dim 192" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
