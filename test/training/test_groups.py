# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Groups of images, such as drives: held out together in training, scored by themselves in evaluation."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from toys import RECIPE

from clustvit_ros.cli.main import main
from clustvit_ros.networks import load_config


@pytest.fixture
def drives(scenes, tmp_path):
    """The scenes as two drives, `a` and `b`, both with images of train and val; writes the rule into dataset.yaml."""
    root = tmp_path / "drives"
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (root / split / folder).mkdir(parents=True)
            for path in (scenes / split / folder).iterdir():
                drive = "a" if int(path.stem) % 2 else "b"
                (root / split / folder / f"{drive}_{split}{path.name}").symlink_to(path)

    def write(group):
        splits = {name: {"images": f"{name}/images", "labels": f"{name}/labels"} for name in ("train", "val")}
        content = {"classes": RECIPE["classes"], "splits": splits, "group": group}
        (root / "dataset.yaml").write_text(yaml.safe_dump(content))
        return root

    return write


@pytest.mark.parametrize(
    "group", ["[^_]+", *(pytest.param(group, marks=pytest.mark.slow) for group in ("(.)_", ["a_train", "b_"]))]
)
def test_folds_hold_each_drive_out(train, write_recipe, drives, tmp_path, capsys, group):
    data = drives(group)
    recipe = write_recipe(schedule={"epochs": 1, "validate_every": 1})
    assert train(recipe, tmp_path / "run", "--folds", "group", data=data) == 0
    first, second = ("a_train", "b_") if isinstance(group, list) else ("a", "b")
    folds = json.loads((tmp_path / "run/folds.json").read_text())
    assert [fold["split"] for fold in folds["folds"]] == [f"{first}, held out", f"{second}, held out"]
    # Five and five training images, one and two of val; the list leaves out the one of a's in val.
    assert [fold["images"] for fold in folds["folds"]] == ([5, 7] if isinstance(group, list) else [6, 7])
    scores = load_config(tmp_path / "run/model").scores
    assert scores["miou_folds"] == [fold["miou"] for fold in folds["folds"]]
    assert scores["beside"]["split"] == "val" and scores["beside"]["images"] == 3
    output = capsys.readouterr().out
    listed = f"{first} ({5 if isinstance(group, list) else 6} images); {second} (7 images)"
    assert f"held out in turn: {listed}; {1 if isinstance(group, list) else 0} images in no fold" in output
    assert f"({first} {folds['folds'][0]['miou']:.2f}, {second} " in output and "val mIoU" in output
    # What a fold holds out chooses nothing: its log knows no score.
    log = [json.loads(line) for line in (tmp_path / f"run/fold_{first}/log.jsonl").read_text().splitlines()]
    assert all("miou" not in record for record in log)
    # Each fold is calibrated by the other one, the model of the run by both.
    temperatures = [fold["temperature"] for fold in folds["folds"]]
    assert load_config(tmp_path / f"run/fold_{first}/model").temperature == temperatures[1]
    assert load_config(tmp_path / "run/model").temperature == pytest.approx(
        (temperatures[0] * temperatures[1]) ** 0.5, abs=2e-3
    )


def test_folds_alone_train_no_model_of_all(train, write_recipe, drives, tmp_path):
    recipe = write_recipe(schedule={"epochs": 1})
    assert train(recipe, tmp_path / "run", "--folds", "group", "--folds-only", data=drives("[^_]+")) == 0
    assert (tmp_path / "run/folds.json").exists() and not (tmp_path / "run/model").exists()


def test_folds_of_other_images_are_neither_taken_over_nor_continued(train, write_recipe, tmp_path, capsys):
    recipe, run = write_recipe(schedule={"epochs": 1}), tmp_path / "run"

    def folds(count):
        code = train(recipe, run, "--folds", str(count), "--folds-only")
        return code, "".join(capsys.readouterr())

    def change(file, alter):
        content = json.loads(file.read_text())
        alter(content)
        file.write_text(json.dumps(content))

    assert folds(2)[0] == 0
    scores = (run / "folds.json").read_bytes()
    told = "scored on 5 images of fold 1 of 2, this run would be scored on 4 images of fold 1 of 3; pass another run"
    assert told in folds(3)[1]
    # What earlier versions left says less, and is taken where that is no contradiction.
    for fold in ("fold1", "fold2"):
        change(run / fold / "done.json", lambda content: content.pop("images"))
    assert told in folds(3)[1] and folds(2)[1].count("already trained") == 2
    change(run / "fold2/done.json", lambda content: content.update(images={"train": "0", "val": "1"}))
    assert "fold2: was trained on other images" in folds(2)[1]
    for fold in ("fold1", "fold2"):
        (run / fold / "done.json").unlink()
    assert "checkpoint.pt was made with other images; pass an empty run folder" in folds(3)[1]
    for fold in ("fold1", "fold2"):
        state = torch.load(run / fold / "checkpoint.pt", weights_only=True)
        state["fingerprint"] = json.dumps({k: v for k, v in json.loads(state["fingerprint"]).items() if k != "images"})
        torch.save(state, run / fold / "checkpoint.pt")
    code, printed = folds(2)
    assert code == 0 and "epoch 1 of 1" in printed
    assert json.loads((run / "folds.json").read_text())["summary"]["miou"] == json.loads(scores)["summary"]["miou"]


def test_labels_that_mean_something_else_continue_no_run(train, write_recipe, drives, tmp_path, capsys):
    data, recipe, run = drives("[^_]+"), write_recipe(schedule={"epochs": 1}), tmp_path / "run"
    said = yaml.safe_load((data / "dataset.yaml").read_text())
    assert train(recipe, run, data=data) == 0
    (data / "dataset.yaml").write_text(yaml.safe_dump({**said, "ignore": [0]}))
    assert train(recipe, run, data=data) == 2
    assert "labels are read otherwise than when this run began; restore classes, labels and" in capsys.readouterr().err
    (data / "dataset.yaml").unlink()  # plain folders of the same ids
    assert train(recipe, run, data=data) == 0 and "already trained" in capsys.readouterr().out
    # Earlier versions did not note it.
    listing = json.loads((run / "data.json").read_text())
    assert listing.pop("meanings") == {"train": "", "val": ""}
    (run / "data.json").write_text(json.dumps(listing))
    (data / "dataset.yaml").write_text(yaml.safe_dump({**said, "ignore": [0]}))
    assert train(recipe, run, data=data) == 0


def test_drives_of_train_alone_are_held_out_and_then_all_are_learnt(train, write_recipe, drives, tmp_path, capsys):
    data = drives("[^_]+")
    content = yaml.safe_load((data / "dataset.yaml").read_text())
    del content["splits"]["val"]
    (data / "dataset.yaml").write_text(yaml.safe_dump(content))
    recipe = write_recipe(schedule={"epochs": 1})
    assert train(recipe, tmp_path / "run", "--folds", "group", data=data) == 0
    output = capsys.readouterr().out
    assert "held out in turn: a (5 images); b (5 images); 0 images in no fold" in output
    assert "10 training and no validation images" in output
    scores = load_config(tmp_path / "run/model").scores
    assert scores["split"].startswith("mean of 2 held-out folds") and "beside" not in scores


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("", "nothing says which images belong together, expected group in dataset.yaml"),
        ("c_", "finds nothing in 13 names"),
        ("(x?)", "finds nothing in 13 names"),
        ("(", "is no regular expression"),
        ("(?=.)", "finds nothing in 13 names"),
        ([""], "expected names of which none begins with another"),
        (["a", "a_"], "expected names of which none begins with another"),
        (["a", "b", "c"], "no image belongs to group c"),
        (["a"], "all images belong to group a, expected two or more"),
        ("._(?=t|v)|(.)", "finds nothing in 13 names"),
    ],
)
def test_groups_that_give_no_folds_are_named_before_training(train, write_recipe, drives, tmp_path, capsys, group,
                                                             message):  # fmt: skip
    assert train(write_recipe(), tmp_path / "run", "--folds", "group", data=drives(group)) == 2
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "run/checkpoint.pt").exists()


def test_evaluate_scores_each_drive(finished, drives, tmp_path, capsys):
    data = drives("[^_]+")

    def evaluate(*arguments):
        command = ["evaluate", "--model", str(finished / "model"), "--data", str(data), "--device", "cpu"]
        code = main([*command, "--json", str(tmp_path / "out.json"), *arguments])
        return json.loads((tmp_path / "out.json").read_text()) if code == 0 else code

    found = evaluate("--split", "train", "val")
    assert {name: group["images"] for name, group in found["groups"].items()} == {"a": 6, "b": 7}
    assert found["model"] == "run"  # not "model", as its folder is called
    alone = evaluate("--split", "train", "val", "--group", "a")
    assert alone["images"] == 6 and alone["miou"] == found["groups"]["a"]["miou"]
    assert evaluate("--split", "val", "val") == 2 and "expected each once" in capsys.readouterr().err
    assert evaluate("--group", "a", "a") == 2 and "--group: got a a, expected each once" in capsys.readouterr().err
    # What has no label is told of all splits.
    next((data / "train/labels").iterdir()).unlink()
    assert evaluate("--split", "train", "val", "--bad-data", "skip")["images"] == 12
    assert "1 file(s) cannot be used" in capsys.readouterr().err
    assert evaluate("--group", "c") == 2
    assert "--group: got c; the groups of these images are a, b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("train_list", "val_list", "message"),
    [
        (b"000\n001\n000.png\n", b"002\n", "1 image(s) are there more than once, and would count as often: 000; name"),
        (b"000\n001\n", b"001\n", "1 image(s) are there more than once, and would count as often: 001; name"),
        (b"000\nstra\xdfe\n", b"001\n", "train.txt: cannot be read (invalid continuation byte), expected text"),
    ],
)
def test_lists_that_name_an_image_twice_or_are_no_text(
    scenes, finished, tmp_path, capsys, train_list, val_list, message
):
    for name, names in (("train", train_list), ("val", val_list)):
        (tmp_path / f"{name}.txt").write_bytes(names)
    places = {"images": str(scenes / "train/images"), "labels": str(scenes / "train/labels")}
    splits = {name: {**places, "list": f"{name}.txt"} for name in ("train", "val")}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"classes": RECIPE["classes"], "splits": splits}))
    command = ["evaluate", "--model", str(finished / "model"), "--data", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--split", "train", "val"]) == 2
    assert message in capsys.readouterr().err
