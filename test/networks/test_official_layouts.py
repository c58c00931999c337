# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Checkpoints as the official code and configurations make them, random weights, against a plain rendering of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_uper_head import reference_head

from clustvit_ros.cli.main import main
from clustvit_ros.networks import load_config, load_segmenter

# Of the official configurations (DTU-PAS/clustvit, config/): what differs between them. Images are smaller here.
TINY = {"C": 192, "heads": 3, "layers": 12, "hidden": 774}
SMALL = {"C": 64, "heads": 2, "layers": 4, "hidden": 96}
CLUSTVIT = {"type": "ClustViT", "point": 3, "k": 3}
CTS = {"type": "CTSVisionTransformer", "shared": 4}
KINDS = {
    "clustvit_t": {**CLUSTVIT, **TINY},
    "vit_t": {**TINY, "type": "VisionTransformer"},
    "clustvit, one cluster": {**CLUSTVIT, **SMALL, "k": 1, "point": 0},
    "clustvit, wide images": {**CLUSTVIT, **SMALL, "size": (96, 160), "point": 2},
    "clustvit, upernet": {**CLUSTVIT, **SMALL, "out_indices": [0, 1, 2, 3], "point": 1},
    "vit, upernet": {**SMALL, "type": "VisionTransformer", "out_indices": [0, 1, 2, 3]},
    "cts": {**CTS, **SMALL},
    # config/_base_/models/segmenter_cts-b16_mask.py leaves this at mmsegmentation's default.
    "cts, no final norm": {**CTS, **SMALL, "final_norm": False},
    "vit, upernet, no final norm": {
        **SMALL,
        "type": "VisionTransformer",
        "out_indices": [0, 1, 2, 3],
        "final_norm": False,
    },
    "cts, upernet": {**CTS, **SMALL, "out_indices": [0, 1, 2, 3]},
    "clustvit_s": {**CLUSTVIT, **TINY, "C": 384, "heads": 6, "hidden": 1548},
    "clustvit_b": {**CLUSTVIT, **TINY, "C": 768, "heads": 12, "hidden": 3096},
    "clustvit_l": {**CLUSTVIT, **TINY, "C": 1024, "heads": 16, "layers": 24, "hidden": 4128},
    "vit_b": {**TINY, "type": "VisionTransformer", "C": 768, "heads": 12},
}
PUBLISHED_SIZES = ("clustvit_s", "clustvit_b", "clustvit_l", "vit_b")
# EfficientNet-Lite0, as timm names it: blocks, kernel, stride, widening, channels of each stage.
POLICY = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip
CLASSES = 9


def shapes_of(C, layers, size=(128, 128), out_indices=None, type="", final_norm=True, hidden=0, k=3, **_):
    """Official parameter names, in the official order, to shapes."""

    def pair(name, *shape):
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    def norm(name, width):
        return {**pair(name, width), f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}

    def blocks(room, count):
        for i in range(count):
            at = f"{room}.layers.{i}"
            yield from {
                **pair(f"{at}.ln1", C), f"{at}.attn.attn.in_proj_weight": (3 * C, C),
                f"{at}.attn.attn.in_proj_bias": (3 * C,), **pair(f"{at}.attn.attn.out_proj", C, C),
                **pair(f"{at}.ln2", C), **pair(f"{at}.ffn.layers.0.0", 4 * C, C),
                **pair(f"{at}.ffn.layers.1", C, 4 * C),
            }.items()  # fmt: skip

    tokens = size[0] // 16 * (size[1] // 16)
    shapes = {"backbone.cls_token": (1, 1, C), "backbone.pos_embed": (1, 1 + tokens, C)}
    shapes |= {"backbone.patch_embed.projection.weight": (C, 3, 16, 16), **dict(blocks("backbone", layers))}
    shapes |= pair("backbone.ln1", C) if final_norm else {}
    if type == "ClustViT":
        shapes |= {**pair("backbone.clusterer.net.0", hidden, C), **pair("backbone.clusterer.net.2", k + 1, hidden)}
        shapes |= {**pair("backbone.expand_mlp.0", C, 2 * C), **pair("backbone.expand_mlp.2", C, C)}
    if type == "CTSVisionTransformer":
        net, dim = "backbone.policy_net.backbone", 32
        shapes |= {f"{net}.conv_stem.weight": (32, 3, 3, 3), **norm(f"{net}.bn1", 32)}
        for stage, (count, kernel, _stride, widening, out) in enumerate(POLICY):
            for block in range(count):
                at, wide = f"{net}.blocks.{stage}.{block}", dim * widening
                if widening > 1:
                    shapes |= {f"{at}.conv_pw.weight": (wide, dim, 1, 1), **norm(f"{at}.bn1", wide)}
                first, last = ("bn2", "conv_pwl") if widening > 1 else ("bn1", "conv_pw")
                shapes |= {f"{at}.conv_dw.weight": (wide, 1, kernel, kernel), **norm(f"{at}.{first}", wide)}
                shapes |= {f"{at}.{last}.weight": (out, wide, 1, 1), **norm(f"{at}.bn{3 if widening > 1 else 2}", out)}
                dim = out
        shapes |= pair("backbone.policy_net.head", 2, 320, 1, 1)
    if not out_indices:
        shapes |= {"decode_head.cls_emb": (1, CLASSES, C), **pair("decode_head.dec_proj", C, C)}
        shapes |= {**dict(blocks("decode_head", 2)), **pair("decode_head.decoder_norm", C)}
        shapes |= {"decode_head.patch_proj.weight": (C, C), "decode_head.classes_proj.weight": (C, C)}
        return {**shapes, **pair("decode_head.mask_norm", CLASSES)}
    convolutions = {f"psp_modules.{i}.1": (C, 1) for i in range(4)} | {"bottleneck": (5 * C, 3)}
    convolutions |= {f"lateral_convs.{i}": (C, 1) for i in range(3)} | {f"fpn_convs.{i}": (C, 3) for i in range(3)}
    for name, (inputs, kernel) in {**convolutions, "fpn_bottleneck": (4 * C, 3)}.items():
        at = f"decode_head.{name}"
        shapes |= {f"{at}.conv.weight": (C, inputs, kernel, kernel), **norm(f"{at}.bn", C)}
    return {**shapes, **pair("decode_head.conv_seg", CLASSES, C, 1, 1)}


def draw(shapes):
    """Values that no term of the network can lack without showing."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            centre = 0.0 if name.endswith(("bias", "running_mean")) else 1.0
            weights[name] = centre + 0.1 * values
        else:
            weights[name] = values * (0.2 if "token" in name or "emb" in name else math.prod(shape[1:]) ** -0.5)
    return weights


def configuration(C, heads, layers, size=(128, 128), out_indices=None, type="", point=3, k=3, shared=0, **_):
    """What MMEngine writes into `meta`: the resolved configuration as Python text."""
    own = {
        "ClustViT": f"num_clusters={k}, injection_points=[{point}], cluster_mlp_size=774, ",
        "CTSVisionTransformer": "policy_method='policy_net', policynet_ckpt='weights/policynet.pth', "
        f"policy_schedule=({math.prod(size) // 256 - 4 * shared}, {shared}), ",
    }.get(type, "")
    head = f"dict(type='SegmenterMaskTransformerHead', num_heads={heads}, num_layers=2, embed_dims={C})"
    if out_indices:
        own += f"out_indices={out_indices}, "
        head = f"dict(type='UPerHead', channels={C}, in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6))"
    return (
        "auto_scale_lr = dict(base_batch_size=16, enable=False)\nbackbone_norm_cfg = dict(eps=1e-06, type='LN')\n"
        f"model = dict(\n    auxiliary_head=None,\n    backbone=dict({own}type={type!r}, img_size={size}, "
        f"num_heads={heads}, num_layers={layers}, norm_cfg=dict(eps=1e-06, requires_grad=True, type='LN')),\n"
        "    data_preprocessor=dict(bgr_to_rgb=True, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),\n"
        f"    decode_head={head},\n    test_cfg=dict(crop_size={size}, mode='slide', stride=(480, 480)))\n"
    )


def norm_of(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def run_block(w, name, x, heads, eps):
    """One pre-norm block over (L, C) tokens."""
    attention, width = f"{name}.attn.attn", x.shape[1] // heads
    projected = F.linear(
        norm_of(w, f"{name}.ln1", x, eps), w[f"{attention}.in_proj_weight"], w[f"{attention}.in_proj_bias"]
    )
    q, k, v = (part.unflatten(1, (heads, width)).transpose(0, 1) for part in projected.chunk(3, dim=1))
    attended = (q @ k.transpose(1, 2) / width**0.5).softmax(dim=2) @ v
    x = x + linear(w, f"{attention}.out_proj", attended.transpose(0, 1).flatten(1))
    hidden = F.gelu(linear(w, f"{name}.ffn.layers.0.0", norm_of(w, f"{name}.ln2", x, eps)))
    return x + linear(w, f"{name}.ffn.layers.1", hidden)


def policy_scores(w, image):
    """Margins of the 32 px windows of an image (1, 3, H, W), row by row."""
    net = "backbone.policy_net.backbone"

    def conv(name, bn, x, **options):
        weight = w[f"{net}.{name}.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2, **options)
        statistics = (w[f"{net}.{bn}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics, eps=1e-5)

    x = F.relu6(conv("conv_stem", "bn1", image, stride=2))
    for stage, (count, _kernel, stride, widening, _out) in enumerate(POLICY):
        for block in range(count):
            at, before = f"blocks.{stage}.{block}", x
            names = ("bn2", "conv_pwl", "bn3") if widening > 1 else ("bn1", "conv_pw", "bn2")
            if widening > 1:
                x = F.relu6(conv(f"{at}.conv_pw", f"{at}.bn1", x))
            step = stride if block == 0 else 1
            x = F.relu6(conv(f"{at}.conv_dw", f"{at}.{names[0]}", x, stride=step, groups=x.shape[1]))
            x = conv(f"{at}.{names[1]}", f"{at}.{names[2]}", x)
            x = x + before if block > 0 else x
    logits = F.conv2d(x, w["backbone.policy_net.head.weight"], w["backbone.policy_net.head.bias"])[0]
    return (logits[1] - logits[0]).flatten()


def official_maps(w, image, heads, layers, type="", point=3, k=3, shared=0, out_indices=None, **_):
    """What the official backbone hands out for one image (1, 3, H, W): maps (1, C, h, w)."""
    kernel, C = w["backbone.patch_embed.projection.weight"], w["backbone.cls_token"].shape[2]
    rows, columns = image.shape[2] // 16, image.shape[3] // 16
    cls, positions = w["backbone.cls_token"][0], w["backbone.pos_embed"][0]
    tokens = F.conv2d(image, kernel, stride=16)[0].flatten(1).T + positions[1:]
    places = list(range(rows * columns))  # where a row goes in a map that is zero elsewhere
    x = torch.cat([cls + positions[:1], tokens])
    if type == "CTSVisionTransformer":  # whose class token has no position
        half = F.conv2d(F.interpolate(image, scale_factor=0.5, mode="bilinear"), kernel, stride=16)[0].flatten(1).T
        windows = policy_scores(w, image).argsort(descending=True)[:shared].sort().values.tolist()
        corners = [2 * columns * (window // (columns // 2)) + 2 * (window % (columns // 2)) for window in windows]
        gone = {corner + step for corner in corners for step in (0, 1, columns, columns + 1)}
        places = [place for place in places if place not in gone]
        seen = torch.stack(
            [half[window] + positions[1 + corner] for window, corner in zip(windows, corners, strict=True)]
        )
        x, places = torch.cat([cls, tokens[places], seen]), places + corners
    maps, before, ids = [], None, None
    for index in range(layers):
        if type == "ClustViT" and index == point:
            logits = linear(w, "backbone.clusterer.net.2", linear(w, "backbone.clusterer.net.0", x[1:]).relu())
            before, ids = x, logits.argmax(dim=1)
            assert len(ids.unique()) > 1
            means = [x[1:][ids == j].mean(dim=0) if (ids == j).any() else x.new_zeros(C) for j in range(1, k + 1)]
            x = torch.cat([x[:1], x[1:][ids == 0], torch.stack(means)])
        x = run_block(w, f"backbone.layers.{index}", x, heads, 1e-6)
        full = x
        if before is not None:
            full = torch.cat([x[:1], before[1:]])
            full[1:][ids == 0] = x[1 : len(x) - k]
            for j in range(1, k + 1):
                own = before[1:][ids == j]
                both = torch.cat([own, x[len(x) - k + j - 1].expand_as(own)], dim=1)
                full[1:][ids == j] = linear(
                    w, "backbone.expand_mlp.2", F.gelu(linear(w, "backbone.expand_mlp.0", both))
                )
        if index == layers - 1 and "backbone.ln1.weight" in w:
            full = norm_of(w, "backbone.ln1", full, 1e-6)
        if index in (out_indices or [layers - 1]):
            grid = full.new_zeros(rows * columns, C)
            grid[places] = full[1:]
            maps.append(grid.T.unflatten(1, (rows, columns))[None])
    return maps


def official_logits(w, image, heads, out_indices=None, **kind):
    maps = official_maps(w, image, heads, out_indices=out_indices, **kind)
    if out_indices:
        return reference_head(w, maps)
    x = torch.cat([linear(w, "decode_head.dec_proj", maps[0][0].flatten(1).T), w["decode_head.cls_emb"][0]])
    for index in range(2):
        x = run_block(w, f"decode_head.layers.{index}", x, heads, 1e-5)
    x = norm_of(w, "decode_head.decoder_norm", x, 1e-5)
    patches = F.normalize(linear(w, "decode_head.patch_proj", x[:-CLASSES]), dim=1)
    classes = F.normalize(linear(w, "decode_head.classes_proj", x[-CLASSES:]), dim=1)
    scores = norm_of(w, "decode_head.mask_norm", patches @ classes.T, 1e-5)
    return scores.T.unflatten(1, maps[0].shape[2:])[None]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in PUBLISHED_SIZES else name for name in KINDS]
)
def test_official_checkpoints_give_the_official_logits(name, tmp_path, capsys):
    kind = KINDS[name]
    weights = draw(shapes_of(**kind))
    extra = {} if kind.get("out_indices") else {"auxiliary_head.conv_seg.weight": torch.zeros(1)}
    meta = {"cfg": configuration(**kind), "mmengine_version": "0.10.7", "epoch": 3, "iter": 160000}
    torch.save({"meta": meta, "state_dict": {**weights, **extra}}, tmp_path / "iter_160000.pth")
    arguments = ["import-checkpoint", "--checkpoint", str(tmp_path / "iter_160000.pth"), "--out", str(tmp_path / "m")]
    assert main(arguments) == 0
    assert "assumed" not in capsys.readouterr().err
    config, network = load_config(tmp_path / "m"), load_segmenter(tmp_path / "m")
    assert name not in ("clustvit_t", "vit_t", *PUBLISHED_SIZES) or config.architecture == name
    image = torch.randn(1, 3, *kind.get("size", (128, 128)), generator=torch.Generator().manual_seed(7))
    expected, output = official_logits(weights, image, **kind), network(image)
    assert output.logits.shape == expected.shape and expected.std() > 0.1
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-4)
    if kind["type"] != "VisionTransformer":
        assert 0 < int((output.cluster_ids > 0).sum()) < output.cluster_ids.numel()


@torch.no_grad()
@pytest.mark.parametrize("name", ["clustvit, wide images", "cts", "cts, no final norm", "vit, upernet, no final norm"])
@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_an_official_encoder_alone_keeps_its_way_to_merge(name, prefix, tmp_path, capsys):
    """As the official tools/split_weights.py saves it; only a head is to be trained."""
    kind = {**KINDS[name], "out_indices": None}
    weights = draw(shapes_of(**kind))
    encoder = {prefix + key[9:]: value for key, value in weights.items() if key.startswith("backbone.")}
    torch.save({"state_dict": encoder, "meta": {"cfg": configuration(**kind)}}, tmp_path / "backbone.pth")
    arguments = ["import-checkpoint", "--checkpoint", str(tmp_path / "backbone.pth"), "--out", str(tmp_path / "m")]
    size = "x".join(map(str, kind.get("size", (128, 128))))
    assert main([*arguments, "--classes", "camvid", "--head", "linear", "--image-size", size]) == 0
    assert "fresh, to be trained: head\n" in capsys.readouterr().out
    network, architecture = load_segmenter(tmp_path / "m"), load_config(tmp_path / "m").architecture
    assert architecture == ("clustvit_t" if "clustvit" in name else "vit_t")
    image = torch.randn(1, 3, *kind.get("size", (128, 128)), generator=torch.Generator().manual_seed(7))
    tokens = network.backbone(image).tokens[0]
    expected = official_maps(weights, image, **kind)[0][0].flatten(1).T
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-4)
