# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Files that are no checkpoint, or one that nobody trained: one line, and no model."""

from __future__ import annotations

import pytest
import torch

from clustvit_ros.cli.main import main
from clustvit_ros.networks import ViTConfig, build_network
from clustvit_ros.networks.official import to_official


def import_(checkpoint, out):
    return main(["import-checkpoint", "--checkpoint", str(checkpoint), "--out", str(out)])


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
    for number in (1_000_000_000_000, 10**400, 7):
        yield f"block {str(number)[:20]}", {**weights, block.replace("1", str(number), 1): weights[block]}
    yield "meta is text", {"meta": "x", "state_dict": weights | {"a": "text"}}
    meta = {"cfg": "model = dict(backbone=3, decode_head=[1])"}
    yield "odd hints", {"meta": meta, "state_dict": {"a": torch.ones(1)}}


def test_hostile_checkpoints_are_one_line(tmp_path, capsys):
    for kind, content in hostile_checkpoints():
        torch.save(content, tmp_path / "a.pth")
        assert import_(tmp_path / "a.pth", tmp_path / "m") == 2, kind
        assert capsys.readouterr().err.startswith("clustvit-ros: error: "), kind


@pytest.mark.parametrize(
    "content", [b"", b"text\n", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), b"\x80\x05N.", b"g1\n."]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoint_are_one_line(tmp_path, capsys, content, suffix):
    (tmp_path / f"a{suffix}").write_bytes(content)
    assert import_(tmp_path / f"a{suffix}", tmp_path / "m") == 2
    assert capsys.readouterr().err.startswith("clustvit-ros: error: ")
