# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Joint training: one encoder and decoder, several data sets, a classifier for each."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
import yaml
from toys import CLASSES, RECIPE, scene, write_split

from clustvit_ros.classes import ClassEntry
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks import load_config, load_segmenter
from clustvit_ros.training.dataset import LabelledImages, joined
from clustvit_ros.training.losses import JointClasses, mean_prediction
from clustvit_ros.training.recipe import read_recipe
from clustvit_ros.training.trainer import Trainer

DETAIL = {**{name: value for name, value in RECIPE["network"].items() if name != "head_depth"}, "head": "detail"}
OTHERS = [{"name": name, "colour": [0, 0, index]} for index, name in enumerate(("ground", "thing"))]
DATA = [{"name": "toys"}, {"name": "others", "weight": 0.5, "classes": OTHERS}]


@pytest.fixture
def others(tmp_path):
    """Taller pictures with two classes: the thing is what a car is elsewhere."""
    rng = np.random.default_rng(3)
    for sub in ("images", "labels"):
        (tmp_path / "others/train" / sub).mkdir(parents=True)
    for index in range(4):
        image, labels = scene(rng, (80, 64))
        cv2.imwrite(str(tmp_path / f"others/train/images/{index:03}.png"), image[..., ::-1])
        cv2.imwrite(str(tmp_path / f"others/train/labels/{index:03}.png"), (labels == 2).astype(np.uint8))
    return tmp_path / "others"


@pytest.fixture
def joint_recipe(write_recipe):
    """Writes a joint recipe for head `detail`."""

    def write(data=DATA, **sections):
        path = write_recipe(data=data, **sections)
        content = yaml.safe_load(path.read_text())
        if "network" not in sections:
            content["network"] = DETAIL
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_what_is_kept_is_a_model_of_the_first_one_s_classes(train, joint_recipe, others, tmp_path, capsys):
    weights = {"lovasz_weight": 0.5, "distillation_weight": 1.0, "class_weighting": True}
    recipe = joint_recipe(schedule={**weights, "epochs": 1})
    folders = ["--data", str(tmp_path / "first"), f"others={others}"]
    write_split(tmp_path / "first/train", 10, 0)
    write_split(tmp_path / "first/val", 3, 1)
    assert train(recipe, tmp_path / "run", *folders) == 0
    config = load_config(tmp_path / "run/model")
    assert config.classes.names == CLASSES and config.training["data"] == "toys; others"
    network = load_segmenter(tmp_path / "run/model")
    assert network(torch.zeros(1, 3, 64, 96)).logits.shape[1] == 3
    # Its classifier is the first three rows of the one that learnt: everything else learnt from both.
    averaged = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["averaged"]
    assert averaged["head.classify.weight"].shape[0] == 5
    assert torch.equal(network.head.classify.bias, averaged["head.classify.bias"][:3].half().float())
    listing = json.loads((tmp_path / "run/data.json").read_text())
    assert len(listing["train"]) == 10 and len(listing["others"]) == 4
    # An interrupted run knows its data sets.
    assert train(recipe, tmp_path / "run", *folders) == 0
    printed = capsys.readouterr().out
    assert "10 training, 4 of others and 3 validation images" in printed and "already trained" in printed
    assert train(tmp_path / "run/recipe.yaml", tmp_path / "again", *folders) == 0


def test_an_epoch_is_all_of_the_first_and_of_the_others_by_weight(scenes, others, joint_recipe, tmp_path):
    recipe = read_recipe(joint_recipe())
    first = LabelledImages(scenes / "train/images", scenes / "train/labels", 3)
    other = LabelledImages(others / "train/images", others / "train/labels", 2)
    trainer = Trainer(recipe, first, tmp_path / "run", torch.device("cpu"), further=[other])
    drawn = trainer._order(torch.Generator().manual_seed(0))
    assert trainer.num_images == len(drawn) == 15  # ten, and half as many
    assert sorted(index for index in drawn if index < 10) == list(range(10))
    again = [index for index in drawn if index >= 10]
    assert set(again) == {10, 11, 12, 13} and len(again) == 5
    # At scale 1 a foreign picture has the input's area and its own shape, one of the model's own the input's shape.
    assert trainer.crops._size_of(0, (80, 64)) == (64, 96)
    height, width = trainer.crops._size_of(10, (80, 64))
    assert height * width == pytest.approx(64 * 96) and height / width == pytest.approx(80 / 64)


def test_ids_follow_on_each_other_and_no_pixel_is_judged_by_foreign_classes(scenes, others):
    first = LabelledImages(scenes / "train/images", scenes / "train/labels", 3)
    other = LabelledImages(others / "train/images", others / "train/labels", 2)
    both = joined([first, other])
    assert len(both) == 14 and both.num_classes == 5
    assert set(np.unique(both[0].labels)) <= {0, 1, 2} and set(np.unique(both[13].labels)) == {3, 4}
    labels = torch.from_numpy(np.stack([both[0].labels[:64, :64], both[13].labels[:64, :64]])).long()
    labels[:, 0] = 255
    foreign = JointClasses([3, 2], [None, None]).foreign(labels)[:, :, 0, 0]
    assert foreign.tolist() == [[False, False, False, True, True], [True, True, True, False, False]]


def test_one_data_set_alone_learns_what_it_learnt_before(train, write_recipe, tmp_path):
    once = {"schedule": {"epochs": 1}}
    assert train(write_recipe(data=[{"name": "toys"}], network={"head_depth": 1}, **once), tmp_path / "named") == 0
    assert train(write_recipe(data="toys", **once), tmp_path / "text") == 0
    first, second = (load_segmenter(tmp_path / name / "model").state_dict() for name in ("named", "text"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (DATA, [], "learns from toys and others, got toys alone; expected others=DIR as well"),
        (DATA, ["others={others}", "rest={others}"], "has no classifier for rest; its data names toys, others"),
        (DATA, ["others={others}", "others={others}"], "expected one folder for each data set"),
        ("text", ["others={others}"], "has no classifier for others; its data names no data sets"),
        (DATA[:1], ["others={others}"], "has no classifier for others; its data names toys"),
        ([DATA[0], {"name": "others"}], ["others={others}"], "data: others: classes is missing, and the data set"),
        ([DATA[0], DATA[0]], [], "data: names are toys, toys, expected each once"),
        ([{"name": "toys", "classes": OTHERS}, DATA[1]], [], "toys, the first, lists classes of its own; drop them"),
        ([DATA[0], {**DATA[1], "weight": 0.0}], [], "data: weight of others is 0.0, expected above 0"),
        ([DATA[0], {**DATA[1], "wait": 1.0}], [], "unknown key 'wait'; did you mean 'weight'"),
        ([DATA[0], {**DATA[1], "means": {"grund": ["sky"]}}], ["others={others}"], "'grund' is none of its"),
        ([DATA[0], {**DATA[1], "means": {"thing": ["cat"]}}], ["others={others}"], "'cat' is none of the model's"),
        ([DATA[0], {**DATA[1], "means": {"thing": "car"}}], ["others={others}"], "means: thing: got 'car' (str)"),
        ([DATA[0], {**DATA[1], "means": {"thing": []}}], ["others={others}"], "every class is void, expected"),
        ([DATA[0], {**DATA[1], "means": {}}], ["others={others}"], "every class is void, expected"),
        ([], [], "data is an empty list; name data sets, or leave it out"),
        (
            [DATA[0], {**DATA[1], "means": {"thing": ["car", "road", "sky"]}}], ["others={others}"],
            "'thing' may be any class, which teaches nothing",
        ),
        ([{**DATA[0], "means": {"sky": ["sky"]}}, DATA[1]], [], "toys, the first, has the model's classes; leave"),
        (DATA, ["others={stated}"], "data: others: its class list differs from the data set's: got ground, thing"),
    ],
)
def test_data_that_does_not_fit_is_named_before_training(
    joint_recipe, scenes, train, others, tmp_path, capsys, data, arguments, message
):
    (tmp_path / "stated").mkdir()
    stated = {"classes": [*OTHERS[:1], {"name": "car", "colour": [1, 1, 1]}], "root": str(others)}
    stated["splits"] = {"train": {"images": "train/images", "labels": "train/labels"}}
    (tmp_path / "stated/dataset.yaml").write_text(yaml.safe_dump(stated))
    filled = [argument.format(others=others, stated=tmp_path / "stated") for argument in arguments]
    assert train(joint_recipe(data), tmp_path / "run", "--data", str(scenes), *filled) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run/checkpoint.pt").exists()


def test_a_head_whose_classes_hang_on_each_other_is_refused(train, write_recipe, scenes, others, tmp_path, capsys):
    recipe = write_recipe(data=DATA)
    unread = tmp_path / "unread"  # refused before any label is looked at
    for split in ("train", "val"):
        shutil.copytree(scenes / split / "images", unread / split / "images")
        (unread / split / "labels").mkdir()
    assert train(recipe, tmp_path / "run", "--data", str(unread), f"others={others}") == 2
    assert "a joint training needs head detail, linear or upernet" in capsys.readouterr().err


def test_too_many_classes_are_refused(joint_recipe):
    many = [{"name": f"thing_{index}", "colour": [0, 0, 0]} for index in range(253)]
    recipe = read_recipe(joint_recipe([DATA[0], {"name": "others", "classes": many}]))
    with pytest.raises(ConfigError, match="got 256 classes together, expected up to 255"):
        recipe.with_classes(None, None)
    assert recipe.sources[1].classes[0] == ClassEntry("thing_0", (0, 0, 0))


def test_an_ensemble_teaches_its_own_data_s_classes(
    train, joint_recipe, write_recipe, scenes, others, tmp_path, capsys
):
    network = {"network": {**DETAIL, "head_depth": 1}}
    for name in ("one", "two"):
        seed = {"seed": len(name) + ord(name[0])}
        assert train(write_recipe(**network, schedule={"epochs": 2, **seed}), tmp_path / name) == 0
    teachers = [str(tmp_path / name / "model") for name in ("one", "two")]
    taught = {"teachers": teachers, "distillation_weight": 20.0, "epochs": 8, "kept_fractions": [1.0]}
    folders = ["--data", str(scenes), f"others={others}"]
    assert train(joint_recipe(schedule=taught), tmp_path / "run", *folders) == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["teacher_loss"] < 0.7 * log[0]["teacher_loss"]
    capsys.readouterr()
    for schedule, message in (
        ({"teachers": teachers}, "expected a distillation_weight above 0: else nothing is learnt from them"),
        ({**taught, "teachers": ["cwfid_tiny"]}, "has the classes soil, crop, weed; expected sky, road, car"),
        ({**taught, "teachers": ["nowhere"]}, "model 'nowhere' is not shipped"),
    ):
        assert train(joint_recipe(schedule=schedule), tmp_path / "none", *folders) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "none/checkpoint.pt").exists()


def test_the_ensemble_says_the_mean_of_its_probabilities():
    sure, unsure = torch.tensor([4.0, 0.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 2, 2)
    said = mean_prediction([sure.expand(1, 2, 4, 4), unsure]).exp()
    assert said.shape == (1, 2, 4, 4)
    assert float(said[0, 0, 0, 0]) == pytest.approx((float(torch.tensor(4.0).sigmoid()) + 0.5) / 2)


MEANS = {"ground": ["sky", "road"], "thing": ["car"]}


def test_labels_that_mean_classes_of_the_model_teach_those(train, joint_recipe, scenes, others, tmp_path):
    """The others' car is the model's, and of sky or road the likelier is right: what only they know is learnt."""
    write_split(tmp_path / "first/train", 10, 0)
    write_split(tmp_path / "first/val", 3, 1)
    for path in sorted((tmp_path / "first/train/labels").iterdir())[1:]:
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(labels == 2, 255, labels))  # a single car is left to learn from
    car = {}
    for name, data in (("means", [DATA[0], {**DATA[1], "weight": 2.0, "means": MEANS}]), ("own", DATA)):
        folders = ["--data", str(tmp_path / "first"), f"others={others}"]
        assert train(joint_recipe(data, schedule={"epochs": 8}), tmp_path / name, *folders) == 0
        car[name] = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["per_class_iou"]["car"]
        averaged = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["averaged"]
        assert len(averaged["head.classify.weight"]) == (3 if name == "means" else 5)
    assert car["means"] > car["own"] + 5


def test_what_a_label_may_mean():
    joint = JointClasses([3, 2, 2], [None, [[0, 1], []], None])
    labels = torch.tensor([[0, 1, 2, 255], [3, 3, 4, 255], [5, 6, 5, 255]])[:, None]
    logits = torch.tensor([0.0, 1.0, 9.0, 0.0, 5.0]).view(1, 5, 1, 1).repeat(3, 1, 1, 4)
    logits[1, 0, 0, 1] = 2.0
    assert joint.num_logits == 5  # the second set's labels are the model's
    assert joint.foreign(labels)[:, :, 0, 0].int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 0, 0]]
    alike, right = joint.judged(logits, labels)
    assert right[:, 0].tolist() == [[0, 1, 2, 255], [1, 0, 255, 255], [3, 4, 3, 255]]
    either = logits[1].softmax(dim=0)[:2].sum(dim=0)[0]  # of the first two classes, where a label may mean both
    assert torch.allclose(alike[1].softmax(dim=0).gather(0, right[1, :, :2][None])[0, 0], either[:2])
    assert torch.equal(alike[[0, 2]].argmax(dim=1), logits[[0, 2]].argmax(dim=1))
    assert torch.allclose(alike[0], logits[0]) and torch.allclose(alike[2], logits[2])
    assert joint.pixel_counts(torch.tensor([1, 2, 3, 40, 50, 6, 7])).tolist() == [1, 2, 3, 6, 7]
