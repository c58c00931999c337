# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Whole runs: what they leave behind, how they continue, and what stops them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import yaml
from toys import CLASSES, RECIPE, write_split

from clustvit_ros.networks import load_config, load_segmenter
from clustvit_ros.paths import share_dir
from clustvit_ros.training import trainer
from clustvit_ros.training.run_folder import draw_log


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same_weights(first, second):
    return all(torch.equal(tensor, second["network"][name]) for name, tensor in first["network"].items())


def test_everything_optional_at_once(train, write_recipe, tmp_path):
    recipe = write_recipe(
        network={"drop_path": 0.1},
        augmentation={"blur_px": 1.0, "noise": 5.0, "vertical_flip": True},
        schedule={
            "ohem_share": 0.5, "lovasz_weight": 1.0, "distillation_weight": 1.0, "merge_thresholds": [0.3, 0.5],
            "precision": "bfloat16", "epochs": 3,
        },
    )  # fmt: skip
    wrong = (("--cache-gb", "inf"), ("--time-limit", "nan"), ("--folds", "0"))
    assert [train(recipe, tmp_path / "run", *options) for options in wrong] == [2, 2, 2]
    assert train(recipe, tmp_path / "run", "--cache-gb", "0", "--seed", "7") == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["seed"] == 7
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert {"loss", "lovasz_loss", "distillation_loss", "cluster_loss", "learning_rate"} <= log[0].keys()
    load_segmenter(tmp_path / "run/model")


def test_a_run_folder_holds_what_it_takes_to_repeat_it(train, finished, tmp_path):
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert written["schedule"]["weight_decay"] == 0.05  # defaults are written out
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["seed"] == 0 and facts["packages"]["torch"] and len(facts["source_sha256"]) == 64
    data = json.loads((tmp_path / "run/data.json").read_text())
    assert len(data["train"]) == 10 and len(data["val"]) == 3 and data["left_out"] == []
    assert all(len(entry["sha256"]) == len(entry["label_sha256"]) == 64 for entry in data["train"])
    # The written recipe repeats the run, weight for weight.
    assert train(tmp_path / "run/recipe.yaml", tmp_path / "again") == 0
    assert same_weights(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "again"))


def test_options_come_before_the_recipe_and_the_run_is_drawn(train, write_recipe, tmp_path):
    options = ["--batch-size", "2", "--learning-rate", "0.001", "--precision", "bfloat16", "--input-size", "48x64"]
    assert train(write_recipe(), tmp_path / "run", *options, "--epochs", "1", draws=True) == 0
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    schedule = written["schedule"]
    names = ("batch_size", "learning_rate", "precision", "epochs")
    assert [schedule[name] for name in names] == [2, 0.001, "bfloat16", 1]
    assert load_config(tmp_path / "run/model").input.size == (48, 64) and written["input"]["size"] == [48, 64]
    assert cv2.imread(str(tmp_path / "run/log.png")).shape == (480, 840, 3)
    # A disk that filled up, or an editor, may have left anything in the log of a run that is done.
    (tmp_path / "run/log.png").unlink()
    with (tmp_path / "run/log.jsonl").open("ab") as log:
        log.write(b'{"epoch": 2}\n{"epoch": 3, "loss": "high"}\n[]\n\xff\n{"epoch": 4, "lo')
    draw_log(tmp_path / "run/log.jsonl")
    assert cv2.imread(str(tmp_path / "run/log.png")).shape == (480, 840, 3)


@pytest.mark.parametrize(
    "extras",
    [pytest.param({}, marks=pytest.mark.slow), {"distillation_weight": 1.0, "input_scales": [1.0, 0.75, 0.5]}],
)
def test_stopped_within_an_epoch_and_continued_equals_uninterrupted(train, write_recipe, tmp_path, monkeypatch, extras):
    recipe = write_recipe(network={"drop_path": 0.2}, schedule={"epochs": 2, "batch_size": 2, **extras})
    assert train(recipe, tmp_path / "whole") == 0
    monkeypatch.setattr(trainer.Trainer, "_is_due", lambda self: self.step == 7)
    monkeypatch.setattr(trainer.Trainer, "_time_is_up", lambda self: self.step == 7)
    assert train(recipe, tmp_path / "parts") == 75
    monkeypatch.undo()
    assert checkpoint(tmp_path / "parts")["step"] == 7
    assert train(recipe, tmp_path / "parts") == 0
    assert same_weights(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [r["loss"] for r in logs[0]] == pytest.approx([r["loss"] for r in logs[1]], rel=1e-6)


def test_input_sizes_are_drawn_and_learnt(train, write_recipe, tmp_path):
    sizes = {"input_scales": [1.0, 0.5], "distillation_weight": 1.0, "kept_fractions": [1.0]}
    assert train(write_recipe(schedule=sizes), tmp_path / "run") == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["distillation_loss"] > 0  # nothing merges: it is the smaller input that is distilled
    assert train(write_recipe(schedule={**sizes, "input_scales": [1.0]}), tmp_path / "full") == 0
    assert not same_weights(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "full"))
    # A plain ViT, which merges nothing, learns them as well.
    assert train(write_recipe(schedule=sizes), tmp_path / "plain", "--without-merging", "--epochs", "1") == 0
    assert "distillation_loss" in json.loads((tmp_path / "plain/log.jsonl").read_text().splitlines()[-1])


def test_a_frozen_teacher_holds_the_full_size_against_what_the_labels_say(
    train, write_recipe, scenes, tmp_path, capsys
):
    length = {"epochs": 6, "validate_every": 6}
    assert train(write_recipe(schedule=length), tmp_path / "base") == 0
    init = str(tmp_path / "base/model")
    shutil.copytree(scenes, tmp_path / "swapped")
    for path in (tmp_path / "swapped").glob("*/labels/*.png"):
        cv2.imwrite(str(path), np.array([1, 0, 2], np.uint8)[cv2.imread(str(path), cv2.IMREAD_UNCHANGED)])
    paths = sorted((scenes / "val/images").iterdir())
    pixels = np.stack([cv2.imread(str(path))[..., ::-1] for path in paths]).astype(np.float32)
    images = torch.from_numpy((pixels - 127.5) / 127.5).permute(0, 3, 1, 2)

    def labels(model):
        with torch.inference_mode():
            return load_segmenter(model)(images, 1.0).logits.argmax(1)

    equal = {}
    for teacher, weight in (("init", 50.0), ("self", 0.0)):
        schedule = {"input_scales": [1.0, 0.5], "distillation_weight": weight, "teacher": teacher, **length}
        recipe = write_recipe(init=init, schedule=schedule)
        assert train(recipe, tmp_path / teacher, data=tmp_path / "swapped") == 0
        equal[teacher] = float((labels(tmp_path / teacher / "model") == labels(init)).float().mean())
    assert equal["init"] > equal["self"] + 0.1, equal
    assert train(write_recipe(schedule={"distillation_weight": 1.0, "teacher": "init"}), tmp_path / "none") == 2
    assert "teacher is 'init', and there is none" in capsys.readouterr().err


def test_the_plain_twin_trains_alike_and_merges_nothing(train, write_recipe, tmp_path, capsys):
    recipe = write_recipe(schedule={"distillation_weight": 1.0, "epochs": 1})
    assert train(recipe, tmp_path / "run", "--without-merging") == 0
    assert "toy_vit: device cpu" in capsys.readouterr().out
    config = load_config(tmp_path / "run/model")
    assert (config.architecture, config.training["recipe"]) == ("vit_t", "toy.yaml --without-merging")
    assert config.scores["tokens_merged_mean"] == 0 and "injection_point" not in config.overrides
    assert not any("clusterer" in name for name in load_segmenter(tmp_path / "run/model").state_dict())
    # What the run folder says repeats it without the option, and a run folder is of either.
    assert train(tmp_path / "run/recipe.yaml", tmp_path / "again") == 0
    assert same_weights(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "again"))
    assert train(recipe, tmp_path / "run") == 2
    assert "another recipe" in capsys.readouterr().err
    assert train(write_recipe(architecture="clustr_b1", network={}), tmp_path / "other", "--without-merging") == 2
    assert "clustr_b1 has no plain ViT twin, expected one of clustvit_t" in capsys.readouterr().err


def test_merging_alone_is_learned_around_a_plain_vit_that_stays(train, write_recipe, tmp_path, capsys):
    plain = {name: value for name, value in RECIPE["network"].items() if name != "injection_point"}
    vit = {"architecture": "vit_t", "network": {**plain, "drop_path": 0.2}}
    assert train(write_recipe(**vit), tmp_path / "vit") == 0
    merging = {"trains": "merging", "epochs": 8, "distillation_weight": 1.0, "kept_fractions": [0.5]}
    recipe = write_recipe(network={"drop_path": 0.2}, init=str(tmp_path / "vit/model"), schedule=merging)
    assert train(recipe, tmp_path / "run") == 0
    before, after = load_segmenter(tmp_path / "vit/model"), load_segmenter(tmp_path / "run/model")
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(after(images, merge_threshold=1.0).logits, before(images).logits)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["distillation_loss"] < log[0]["distillation_loss"]
    assert log[-1]["cluster_loss"] < log[0]["cluster_loss"]
    assert train(recipe, tmp_path / "twin", "--without-merging") == 2
    assert "trains is 'merging', which leaves its plain ViT twin nothing to learn" in capsys.readouterr().err
    shipped = yaml.safe_load((share_dir() / "config/train/add_merging.yaml").read_text())
    shipped["schedule"] |= {"epochs": 1, "batch_size": 4}
    for network, backbone in (({"injection_point": 1}, "clustvit_t"), ({"merging": "cts"}, "vit_t")):
        added = tmp_path / f"add_{backbone}.yaml"
        added.write_text(yaml.safe_dump({**shipped, "network": network}))
        assert train(added, tmp_path / backbone, "--init", str(tmp_path / "vit/model")) == 0
        folder = tmp_path / backbone / "model"
        merged = load_segmenter(folder)
        assert load_config(folder).architecture == backbone and merged.backbone.merges
        assert torch.equal(merged(images, merge_threshold=1.0, token_capacity=24).logits, before(images).logits)
        assert int((merged(images, token_capacity=12).cluster_ids == 0).sum()) == 24
    other = {**shipped, "network": {"injection_point": 1, "head": "linear"}}
    (tmp_path / "head.yaml").write_text(yaml.safe_dump(other))
    assert train(tmp_path / "head.yaml", tmp_path / "head", "--init", str(tmp_path / "vit/model")) == 2
    assert "head.classify.bias would start random and stay so" in capsys.readouterr().err
    assert train(added, tmp_path / "none") == 2
    assert "architecture is that of the model to start from; name one, e.g. --init MODEL" in capsys.readouterr().err
    assert train(write_recipe(**vit, schedule=merging), tmp_path / "other") == 2
    assert "trains is 'merging', and its network has no Clusterer" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_again(train, write_recipe, finished, capsys):
    before = (finished / "checkpoint.pt").stat().st_mtime_ns
    assert train(write_recipe(), finished) == 0
    assert "already trained, mIoU" in capsys.readouterr().out
    assert (finished / "checkpoint.pt").stat().st_mtime_ns == before


def test_another_class_list_and_other_data_are_refused(train, finished, write_recipe, tmp_path, capsys):
    classes = [{"name": name, "colour": [0, 0, 0]} for name in ("sky", "street", "car")]
    assert train(write_recipe(classes=classes), tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "another class list: got sky, street, car; the checkpoint has sky, road, car" in error
    assert train(write_recipe(schedule={"learning_rate": 0.5}), tmp_path / "run") == 2
    assert "another recipe (schedule.learning_rate 0.002 -> 0.5)" in capsys.readouterr().err
    other = tmp_path / "other"
    write_split(other / "train", 10, 5)
    write_split(other / "val", 3, 1)
    assert train(write_recipe(), tmp_path / "run", data=other) == 2
    assert "the data changed since this run began" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_the_files_and_keeps_the_checkpoint(
    train, write_recipe, tmp_path, capsys, monkeypatch
):
    recipe = write_recipe(schedule={"batch_size": 2})
    forward = trainer._TrainingStep.forward
    seen = []

    def poisoned(self, images, labels, *merging):
        seen.append(1)
        return forward(self, images * (float("nan") if len(seen) == 9 else 1.0), labels, *merging)

    names = []
    inputs = trainer.Trainer._inputs
    monkeypatch.setattr(trainer.Trainer, "_inputs", lambda s, step, b: names.append(b.names) or inputs(s, step, b))
    monkeypatch.setattr(trainer._TrainingStep, "forward", poisoned)
    assert train(recipe, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"the loss became nan at step 8, on {', '.join(names[8])}; the last good checkpoint" in error
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 5  # the end of the first epoch
    assert all(torch.isfinite(tensor).all() for tensor in state["network"].values())
    monkeypatch.undo()
    assert train(recipe, tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("share", "name"), [(0.5, "checkpoint.pt"), pytest.param(0.05, "model.safetensors", marks=pytest.mark.slow)]
)
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(scenes, write_recipe, tmp_path, train, share, name):
    # The epoch that the first run leaves unfinished ends with a model, then a checkpoint.
    recipe = write_recipe(schedule={"epochs": 1, "validate_every": 1})
    assert train(recipe, tmp_path / "run", "--time-limit", "0.00001") == 75
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    limit = round(len(before) * share)
    result = subprocess.run(
        [sys.executable, "-m", "clustvit_ros.cli.main", "train", str(recipe), "--data", str(scenes),
         "--out", str(tmp_path / "run"), "--device", "cpu"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr[-2000:]
    assert f"{name}: cannot be written" in result.stderr and "make room on the disk" in result.stderr
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_bad_files_stop_strict_runs_and_are_skipped_on_request(train, scenes, write_recipe, tmp_path, capsys):
    data = tmp_path / "data"
    write_split(data / "train", 6, 0)
    write_split(data / "val", 2, 1)
    (data / "train/labels/001.png").unlink()
    cv2.imwrite(str(data / "train/labels/002.png"), np.full((64, 96), 255, np.uint8))
    cv2.imwrite(str(data / "train/labels/003.png"), np.full((64, 96), 77, np.uint8))
    assert train(write_recipe(), tmp_path / "run", data=data) == 2
    strict = capsys.readouterr().err
    assert "or pass --bad-data skip" in strict
    assert train(write_recipe(), tmp_path / "run", "--bad-data", "skip", data=data) == 0
    for error in (strict, capsys.readouterr().err):
        assert "3 file(s) cannot be used" in error and "001.png: the image has no label" in error
        assert "002.png: the labels are all void" in error and "label ids [77] have no class" in error
    listing = json.loads((tmp_path / "run/data.json").read_text())
    assert len(listing["train"]) == 3 and len(listing["left_out"]) == 3


def test_classes_come_from_the_data_set_or_must_agree_with_it(train, scenes, write_recipe, tmp_path, capsys):
    classes = [{"name": name, "colour": [0, index, 0]} for index, name in enumerate(CLASSES)]
    splits = {name: {"images": f"{name}/images", "labels": f"{name}/labels"} for name in ("train", "val")}
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "val"):
        (data / name).symlink_to(scenes / name)
    (data / "dataset.yaml").write_text(yaml.safe_dump({"classes": classes, "splits": splits}))
    recipe = yaml.safe_load(write_recipe().read_text())
    del recipe["classes"]
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    assert train(tmp_path / "toy.yaml", tmp_path / "none") == 2
    assert "classes is missing, and the data set names none" in capsys.readouterr().err
    assert train(tmp_path / "toy.yaml", tmp_path / "run", "--epochs", "1", data=data) == 0
    assert load_config(tmp_path / "run/model").classes.names == CLASSES
    classes[1]["name"] = "water"
    (data / "dataset.yaml").write_text(yaml.safe_dump({"classes": classes, "splits": splits}))
    assert train(write_recipe(), tmp_path / "other", data=data) == 2
    assert "class list differs from the data set's: got sky, road, car; expected sky, water, car" in (
        capsys.readouterr().err
    )


def test_folds_hold_each_image_out_once_and_end_in_a_model_of_all(train, write_recipe, tmp_path):
    recipe = write_recipe(schedule={"epochs": 1, "validate_every": 1})
    assert train(recipe, tmp_path / "run", "--folds", "2") == 0
    folds = json.loads((tmp_path / "run/folds.json").read_text())
    assert len(folds["folds"]) == 2 and folds["summary"]["images"] == 10
    mious = [fold["miou"] for fold in folds["folds"]]
    assert folds["summary"]["miou"] == pytest.approx(np.mean(mious), abs=1e-3)
    assert folds["summary"]["miou_std"] == pytest.approx(np.std(mious, ddof=1), abs=1e-3)
    assert load_config(tmp_path / "run/model").scores["miou_folds"] == mious
    assert checkpoint(tmp_path / "run")["step"] == 2 and checkpoint(tmp_path / "run/fold1")["step"] == 1


def test_tensorboard_logs(train, write_recipe, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(write_recipe(), tmp_path / "run", "--tensorboard") == 0
    log = events.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert {"loss", "learning_rate", "miou", "per_class_iou/car"} <= set(log.Tags()["scalars"])
    assert [event.step for event in log.Scalars("loss")] == [1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({1: 255, 2: 255}, "no pixel of road, car in the training labels; every labelled pixel is 0, as in binary"),
        ({2: 1}, "no pixel of car in the training labels; check ids and colours"),
    ],
)
def test_labels_that_lack_a_class_train_nothing(train, write_recipe, scenes, tmp_path, capsys, values, message):
    shutil.copytree(scenes, tmp_path / "data")
    for path in (tmp_path / "data").glob("*/labels/*.png"):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        for old, new in values.items():
            labels[labels == old] = new
        cv2.imwrite(str(path), labels)
    assert train(write_recipe(), tmp_path / "run", data=tmp_path / "data") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "data.json").exists()  # with what was mended, the same command begins


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("schedule", {"epochs": 0}, "schedule: epochs is 0, expected at least 1"),
        ("schedule", {"ohem_share": 0.0}, "schedule: ohem_share is 0.0, expected in (0, 1]"),
        ("schedule", {"kept_fractions": []}, "schedule: kept_fractions is []"),
        ("schedule", {"merge_thresholds": [1.5]}, "schedule: merge_thresholds is [1.5]"),
        ("schedule", {"input_scales": []}, "schedule: input_scales is []"),
        ("schedule", {"input_scales": [0.5, 1.2]}, "schedule: input_scales is [0.5, 1.2], expected numbers in (0, 1]"),
        ("schedule", {"input_scales": [0.5], "trains": "merging"}, "expected [1]: what sees the input is frozen"),
        ("schedule", {"teacher": "init"}, "expected a distillation_weight above 0"),
        ("schedule", {"precision": "half"}, "precision: got 'half' (str), expected one of 'auto'"),
        ("schedule", {"precision": "float16"}, "needs a GPU"),
        ("schedule", {"learning_rte": 1.0}, "unknown key 'learning_rte'; did you mean 'learning_rate'"),
        ("augmentation", {"scale": [2.0, 1.0]}, "augmentation: scale is [2.0, 1.0]"),
        ("augmentation", {"crop_size": [1, 96]}, "expected two patches of 16 px in a batch, and sides"),
    ],
)
def test_recipes_that_cannot_be_used(train, write_recipe, tmp_path, capsys, section, change, message):
    assert train(write_recipe(**{section: change}), tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_refused_command_changes_no_file_of_the_run(train, write_recipe, finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    assert train(write_recipe(), finished, "--epochs", "60") == 2
    assert "was made with another recipe" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_a_run_folder_has_one_training_at_a_time(train, write_recipe, tmp_path, capsys):
    from clustvit_ros.training.run_folder import owned

    with owned(tmp_path / "run"):
        assert train(write_recipe(), tmp_path / "run") == 2
    assert "another training runs in this folder" in capsys.readouterr().err
    assert not (tmp_path / "run/recipe.yaml").exists()
    assert train(write_recipe(), tmp_path / "run", "--epochs", "1") == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("checkpoint.pt", b"text"), ("checkpoint.pt", b""), ("checkpoint.pt", b"\x80\x02}q\x00."),
     ("data.json", b"{broken"), ("data.json", b"[]"), ("done.json", b"{"), ("done.json", b"7")],
)  # fmt: skip
def test_damaged_files_of_a_run_are_named(train, write_recipe, finished, capsys, name, content):
    if name == "checkpoint.pt":
        (finished / "done.json").unlink()
    (finished / name).write_bytes(content)
    assert train(write_recipe(), finished) == 2
    assert f"{name}: " in capsys.readouterr().err
