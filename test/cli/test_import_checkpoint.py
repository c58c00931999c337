"""Official checkpoints through `import-checkpoint` and `load_segmenter`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from clustvit_ros.classes import ClassSet, class_set_names, load_class_set
from clustvit_ros.cli.main import main
from clustvit_ros.errors import ModelError
from clustvit_ros.modeling import ViTConfig, build_network, load_config, load_segmenter
from clustvit_ros.modeling.official import from_official, to_official
from clustvit_ros.modeling.sliding_window import whole_logits

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
        resized = whole_logits(network, expected["input"])
    torch.testing.assert_close(output.logits, expected["seg_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(resized, expected["seg_logits_resized"], rtol=0, atol=1e-4)
    if "cluster_ids" in expected:
        assert torch.equal(output.cluster_ids, expected["cluster_ids"])


def official_checkpoint(path, meta=None, **changes):
    torch.manual_seed(0)
    config = {
        "backbone": "clustvit",
        "image_size": (64, 64),
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 2,
        "head_depth": 1,
    }
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
    assert "cannot be read as a checkpoint of plain tensors" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


def test_a_convolutional_stem_has_no_official_name():
    network = build_network(ViTConfig(backbone="vit", image_size=(64, 64), depth=1, stem="conv"), 3)
    with pytest.raises(ModelError, match="convolutional stem"):
        to_official(network.state_dict())


def test_packaged_class_lists_are_usable():
    counts = {name: len(load_class_set(name)) for name in class_set_names()}
    assert counts == {"ade20k": 150, "camvid": 11, "cityscapes": 19, "rumexweeds": 3, "suim": 9}
    assert len(set(ClassSet.numbered(300).colours[:20])) == 20
