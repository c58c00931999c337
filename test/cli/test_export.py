# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros export`, from the command line to the file."""

from __future__ import annotations

import pytest
import torch

from clustvit_ros.cli.main import main

for package in ("onnx", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs {package}, of the extra 'onnx'")


def test_the_file_is_written_and_described(model_dir, tmp_path, capsys):
    out = tmp_path / "deep" / "toy.onnx"
    assert main(["export", "--model", str(model_dir), "--out", str(out), "--size", "64x96", "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    assert out.is_file() and str(out) in printed and "input [64,96], batch 2" in printed
    assert "inputs images, merge_threshold, token_capacity; outputs logits, cluster_ids, capacity" in printed


def test_without_out_the_file_lies_where_the_engine_looks(model_dir):
    try:
        assert main(["export", "--model", str(model_dir)]) == 0
        assert (model_dir / "model.onnx").is_file()
    finally:
        (model_dir / "model.onnx").unlink(missing_ok=True)


def test_files_of_static_shapes_lie_beside_the_model_or_where_they_are_wanted(model_dir, tmp_path, capsys):
    assert main(["export", "--static", "--model", str(model_dir), "--out", str(tmp_path / "a"), "--size", "32x48"]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir())[0] == "stage_a.onnx"
    assert "and one for each of" in capsys.readouterr().out


def test_an_official_checkpoint_comes_back_as_it_was(model_dir, tmp_path):
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    assert main(["export", "--official", "--model", str(model_dir), "--out", str(first)]) == 0
    options = ["--out", str(tmp_path / "m"), "--image-size", "96x128", "--num-heads", "3", "--injection-point", "1"]
    assert main(["import-checkpoint", "--checkpoint", str(first), *options]) == 0
    assert main(["export", "--official", "--model", str(tmp_path / "m"), "--out", str(second)]) == 0
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (first, second))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_official_layout_needs_a_file(model_dir, capsys):
    assert main(["export", "--official", "--model", str(model_dir)]) == 2
    assert "export --official: needs --out FILE.pth" in capsys.readouterr().err


def test_numbers_that_differ_fail_the_command(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("clustvit_ros.engine.onnx_session.LOGIT_TOLERANCE", 0.0)
    assert main(["export", "--model", str(model_dir), "--out", str(tmp_path / "toy.onnx")]) == 2
    assert "logits differ from PyTorch's" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "640"], "expected HEIGHTxWIDTH in pixels"),
        (["--size", "0x4"], "expected HEIGHTxWIDTH in pixels"),
        (["--batch", "0"], "expected a positive count or dynamic"),
        (["--batch", "many"], "expected a positive count or dynamic"),
    ],
)
def test_unusable_arguments_are_refused(model_dir, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--model", str(model_dir), *arguments])
    assert message in capsys.readouterr().err
