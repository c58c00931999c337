# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""UPerNet against an independent rendering of mmsegmentation's, which reads official parameter names."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from clustvit_ros.cli.main import main
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks import ViTConfig, build_network, load_config, load_segmenter
from clustvit_ros.networks.official import from_official, to_official
from clustvit_ros.networks.segmenter import Features

SMALL = {
    "image_size": (64, 96), "embed_dim": 24, "depth": 4, "num_heads": 2, "injection_point": 1, "head": "upernet",
    "head_channels": 20, "head_blocks": (0, 1, 2, 3), "cluster_mlp_dim": 96,
}  # fmt: skip


def upernet(**changes):
    torch.manual_seed(0)
    network = build_network(ViTConfig(**{**SMALL, **changes}), 5)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def reference_head(weights, maps):
    """UPerHead of mmsegmentation 1.2 in evaluation mode: official names, adaptive pooling, BN eps 1e-5, ReLU."""

    def conv(name, x):
        head = f"decode_head.{name}"
        kernel = weights[f"{head}.conv.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[2] // 2)
        statistics = (weights[f"{head}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *statistics, eps=1e-5))

    def resize(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    if "neck.convs.0.conv.weight" in weights:
        scaled = []
        for i, scale in enumerate((4, 2, 1, 0.5)):
            names = [f"{kind}.{i}.conv.{p}" for kind in ("lateral_convs", "convs") for p in ("weight", "bias")]
            part = [weights[f"neck.{name}"] for name in names]
            x = F.conv2d(maps[i], part[0], part[1])
            x = F.interpolate(x, scale_factor=scale, mode="bilinear")
            scaled.append(F.conv2d(x, part[2], part[3], padding=1))
        maps = scaled
    pooled = [
        resize(conv(f"psp_modules.{i}.1", F.adaptive_avg_pool2d(maps[3], cells)), maps[3])
        for i, cells in enumerate((1, 2, 3, 6))
    ]
    laterals = [conv(f"lateral_convs.{i}", maps[i]) for i in range(3)]
    laterals.append(conv("bottleneck", torch.cat([maps[3], *pooled], dim=1)))
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + resize(laterals[i], laterals[i - 1])
    outputs = [conv(f"fpn_convs.{i}", laterals[i]) for i in range(3)] + [laterals[3]]
    fused = conv("fpn_bottleneck", torch.cat([resize(x, outputs[0]) for x in outputs], dim=1))
    return F.conv2d(fused, weights["decode_head.conv_seg.weight"], weights["decode_head.conv_seg.bias"])


def reference_levels(network, images):
    """The official backbone's four outputs: each is regenerated from the blocks' state at that level."""
    backbone = network.backbone
    x, (rows, columns) = backbone.embed(images)
    outputs, before, ids = [], None, None
    for index, block in enumerate(backbone.blocks):
        if index == 1:
            before = x
            ids = backbone.clusterer(x[:, 1:]).argmax(2)
            assert images.shape[0] == 1 and len(ids.unique()) > 1
            means = [x[0, 1:][ids[0] == j].mean(0) if (ids == j).any() else x.new_zeros(x.shape[2]) for j in (1, 2, 3)]
            x = torch.cat([x[:, :1], x[:, 1:][ids == 0][None], torch.stack(means)[None]], dim=1)
        x = block(x)
        full = x
        if before is not None:
            full = before.clone()
            full[0, 0] = x[0, 0]
            full[0, 1:][ids[0] == 0] = x[0, 1:-3]
            for j in (1, 2, 3):
                own = before[0, 1:][ids[0] == j]
                both = torch.cat([own, x[0, j - 4].expand_as(own)], dim=1)
                regenerator = backbone.regenerator
                full[0, 1:][ids[0] == j] = regenerator.fc2(F.gelu(regenerator.fc1(both)))
        if index == 3:
            full = backbone.norm(full)
        outputs.append(full[:, 1:].transpose(1, 2).unflatten(2, (rows, columns)))
    return outputs


@pytest.mark.parametrize("neck", [False, True])
def test_network_equals_the_reference(images, neck):
    network = upernet(neck=neck)
    for image in images.split(1):
        expected = reference_head(to_official(network.state_dict()), reference_levels(network, image))
        logits = network(image).logits
        assert logits.shape == expected.shape == (1, 5, *((16, 24) if neck else (4, 6)))
        scale = float(expected.abs().max())
        torch.testing.assert_close(logits / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (112, 80), (16, 16)])
def test_head_equals_the_reference_on_every_grid(size):
    network = upernet(neck=True)
    grid = size[0] // 16, size[1] // 16
    levels = torch.randn(4, 1, grid[0] * grid[1], 24, generator=torch.Generator().manual_seed(2))
    if min(grid) == 1:
        network = upernet()
    expected = reference_head(to_official(network.state_dict()), [x.transpose(1, 2).unflatten(2, grid) for x in levels])
    found = network.head(Features(levels[3], grid, levels=tuple(levels)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("capacity", [5, 17, 24])
def test_levels_keep_what_was_kept_and_a_batch_equals_its_images(images, capacity):
    network = upernet()
    both = network(images, token_capacity=capacity)
    for index in range(2):
        alone = network(images[index : index + 1], token_capacity=capacity)
        torch.testing.assert_close(alone.logits[0], both.logits[index], rtol=1e-4, atol=1e-3)
    features = network.backbone(images, token_capacity=capacity)
    assert [level.shape for level in features.levels] == [(2, 24, 24)] * 4
    assert torch.equal(features.levels[3], features.tokens)


@pytest.mark.parametrize("neck", [False, True])
def test_weights_are_imported_and_exported_bit_for_bit(images, tmp_path, neck):
    network = upernet(neck=neck)
    weights = to_official(network.state_dict())
    text = "model = dict(backbone=dict(num_heads=2, injection_points=[1], img_size=(64, 96), out_indices=[0, 1, 2, 3]),"
    text += " decode_head=dict(type='UPerHead'))"
    training_only = {"auxiliary_head.conv_seg.weight": torch.zeros(5, 20, 1, 1)}
    torch.save({"meta": {"cfg": text}, "state_dict": {**weights, **training_only}}, tmp_path / "a.pth")
    arguments = ["import-checkpoint", "--checkpoint", str(tmp_path / "a.pth"), "--out", str(tmp_path / "m")]
    assert main(arguments) == 0
    config = load_config(tmp_path / "m").network
    assert (config.head, config.head_channels, config.neck) == ("upernet", 20, neck)
    assert config.head_blocks == (0, 1, 2, 3) and config.cluster_mlp_dim == 96
    loaded = load_segmenter(tmp_path / "m").requires_grad_(False)
    back = to_official(loaded.state_dict())
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    torch.testing.assert_close(loaded(images).logits, network(images).logits, rtol=1e-5, atol=1e-3)


def test_a_linear_head_is_a_1x1_convolution(images, tmp_path):
    network = upernet(head="linear", head_channels=0, head_blocks=())
    weights = to_official(network.state_dict())
    assert weights["decode_head.conv_seg.weight"].shape == (5, 24, 1, 1)
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    config = {"num_heads": 2, "injection_point": 1, "img_size": [64, 96]}
    (tmp_path / "c.json").write_text(json.dumps(config))
    arguments = ["--checkpoint", tmp_path / "a.pth", "--out", tmp_path / "m", "--config", tmp_path / "c.json"]
    assert main(["import-checkpoint", *map(str, arguments)]) == 0
    back = to_official(load_segmenter(tmp_path / "m").state_dict())
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    features = network.backbone(images)
    maps = features.tokens.transpose(1, 2).unflatten(2, (4, 6))
    expected = F.conv2d(maps, weights["decode_head.conv_seg.weight"], weights["decode_head.conv_seg.bias"])
    torch.testing.assert_close(network(images).logits, expected, rtol=0, atol=1e-5)


def test_a_patch_bias_of_older_versions_moves_into_the_positions(images):
    network = upernet()
    weights = to_official(network.state_dict())
    bias = torch.randn(24)
    loaded = upernet()
    loaded.load_state_dict(from_official({**weights, "backbone.patch_embed.projection.bias": bias}))
    x, _ = loaded.backbone.embed(images)
    expected, _ = network.backbone.embed(images)
    torch.testing.assert_close(x[:, 1:], expected[:, 1:] + bias, rtol=0, atol=1e-5)


def test_what_a_head_cannot_do_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="UPerNet's convolutions cannot"):
        ViTConfig(**{**SMALL, "decode": "compact"})
    with pytest.raises(ConfigError, match=r"head_blocks is \[0, 1, 2, 4\], expected 4 ascending"):
        ViTConfig(**{**SMALL, "head_blocks": (0, 1, 2, 4)})
    with pytest.raises(ConfigError, match="neck is for head 'upernet'"):
        ViTConfig(neck=True)
    weights = to_official(upernet().state_dict())
    other = {name: value for name, value in weights.items() if not name.startswith("decode_head.psp")}
    torch.save({"state_dict": other}, tmp_path / "a.pth")
    arguments = ["--checkpoint", str(tmp_path / "a.pth"), "--out", str(tmp_path / "m"), "--image-size", "64x96"]
    assert main(["import-checkpoint", *arguments]) == 2
    assert "decode_head holds bottleneck, conv_seg" in capsys.readouterr().err


def test_published_blocks_are_the_default():
    assert ViTConfig(head="upernet").level_blocks == (3, 5, 7, 11)
