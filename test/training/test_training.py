# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Targets, losses, scores, augmentation, and a whole small training run."""

from __future__ import annotations

import json
import os
import signal

import cv2
import numpy as np
import pytest
import torch
import yaml

from clustvit_ros.classes import Sample
from clustvit_ros.cli.main import main
from clustvit_ros.errors import DataError
from clustvit_ros.measure.metrics import BoundaryIoU, ConfusionMatrix
from clustvit_ros.networks import load_segmenter
from clustvit_ros.training.augmentation import Augmentation
from clustvit_ros.training.dataset import LabelledImages
from clustvit_ros.training.losses import cluster_loss, frequency_weights, pseudo_clusters, segmentation_loss
from clustvit_ros.training.optimisation import Precision


def test_pseudo_clusters_and_loss_equal_the_official_ones(golden_dir):
    golden = {
        name: torch.from_numpy(np.asarray(value)) for name, value in np.load(golden_dir / "p_pseudo_labels.npz").items()
    }
    targets = pseudo_clusters(golden["masks"], 16, 3)
    assert torch.equal(targets, golden["pseudo_labels"])
    torch.testing.assert_close(cluster_loss(golden["cluster_logits"], targets), golden["clust_loss"], rtol=0, atol=1e-6)


def test_pseudo_clusters_rank_by_count_and_skip_mixed_and_void_patches():
    labels = torch.full((1, 8, 12), 255)
    labels[:, :4, :8] = 7  # two patches of class 7
    labels[:, :4, 8:] = 3  # one of class 3
    labels[:, 4:, :4] = 3
    labels[:, 5, 1] = 4  # mixed
    assert pseudo_clusters(labels, 4, 3).tolist() == [[[1, 1, 2], [0, 0, 0]]]
    assert pseudo_clusters(labels, 4, 1).tolist() == [[[1, 1, 0], [0, 0, 0]]]


def test_pseudo_clusters_of_a_ragged_image_cover_its_padded_grid():
    labels = torch.zeros(1, 20, 36, dtype=torch.long)
    targets = pseudo_clusters(labels, 16, 2)
    # Patches that reach beyond the image hold void and are therefore mixed.
    assert targets.tolist() == [[[1, 1, 0], [0, 0, 0]]]


def test_segmentation_loss_is_pytorchs_weighted_mean_and_survives_void():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 4, 6), torch.randint(0, 5, (2, 8, 12))
    labels[:, :2] = 255
    weights = torch.rand(5) + 0.5
    upsampled = torch.nn.functional.interpolate(logits, size=(8, 12), mode="bilinear")
    for w in (None, weights):
        expected = torch.nn.functional.cross_entropy(upsampled, labels, weight=w, ignore_index=255)
        torch.testing.assert_close(segmentation_loss(logits, labels, w), expected)
    assert segmentation_loss(logits, torch.full_like(labels, 255), weights) == 0.0


def test_rare_classes_weigh_more_within_the_bound():
    weights = frequency_weights(torch.tensor([1_000_000, 200_000, 0]))
    assert weights[0] < weights[1] < weights[2]
    assert weights.max() / weights.min() <= 10.0 + 1e-4


def test_miou_by_hand():
    truth = np.array([[0, 0, 1, 1], [2, 2, 255, 255]])
    predicted = np.array([[0, 1, 1, 1], [2, 255, 0, 3]])
    matrix = ConfusionMatrix(4)
    matrix.add(truth, predicted)
    iou = matrix.iou()
    assert iou[:3].tolist() == pytest.approx([1 / 2, 2 / 3, 1 / 2])  # unlabelled pixels count against class 2
    assert np.isnan(iou[3])  # predicted on void only
    assert matrix.miou() == pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 3)
    with pytest.raises(DataError, match="all void"):
        ConfusionMatrix(4).miou()
    with pytest.raises(DataError, match="cannot be scored"):
        matrix.add(truth, predicted[:1])


def test_boundary_iou_by_hand():
    truth = np.zeros((40, 60), np.uint8)
    truth[10:30, 10:50] = 1
    metric = BoundaryIoU(2, width=1 / np.hypot(40, 60))  # bands of one pixel
    metric.add(truth, truth)
    assert metric.iou().tolist() == [1.0, 1.0]
    # One pixel wider to the right: the bands share top and bottom but for two corners, and the left side.
    wider = truth.copy()
    wider[10:30, 50] = 1
    metric = BoundaryIoU(2, width=1 / np.hypot(40, 60))
    metric.add(truth, wider)
    band = 2 * 40 + 2 * 18
    shared = 2 * 40 + 18
    assert metric.iou()[1] == pytest.approx(shared / (2 * band + 2 - shared))


def test_boundary_iou_leaves_void_out_and_sees_thin_things():
    truth = np.zeros((50, 50), np.uint8)
    truth[:, 24:26] = 1
    truth[:10] = 255
    predicted = np.where(truth == 1, 1, 0).astype(np.uint8)
    predicted[:10] = 1  # nonsense on void
    metric = BoundaryIoU(3)
    metric.add(truth, predicted)
    assert metric.iou()[:2].tolist() == [1.0, 1.0] and np.isnan(metric.iou()[2])
    metric = BoundaryIoU(3)
    metric.add(truth, np.zeros_like(truth))
    assert metric.iou()[1] == 0.0 and metric.iou()[0] < 0.8


def test_augmentation_moves_image_and_labels_together():
    rng = np.random.default_rng(0)
    labels = np.zeros((120, 160), np.uint8)
    labels[30:80, 40:110] = 1
    image = np.repeat(np.where(labels, 230, 30).astype(np.uint8)[..., None], 3, axis=2)
    augment = Augmentation(crop_size=(64, 96), jitter=0.0, hue_deg=0.0)
    shares = []
    for _ in range(50):
        crop, crop_labels = augment(Sample(image, labels, "x"), (120, 160), rng)
        assert crop.shape == (64, 96, 3) and crop_labels.shape == (64, 96)
        known = crop_labels != 255
        shares.append(((crop[..., 0] > 130) == (crop_labels == 1))[known].mean() if known.any() else 1.0)
    assert np.mean(shares) > 0.97


def test_augmentation_repeats_with_its_seed():
    sample = Sample(np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8), np.zeros((60, 80), np.uint8), "x")
    augment = Augmentation(crop_size=(32, 48))
    first, second = (augment(sample, (60, 80), np.random.default_rng(7))[0] for _ in range(2))
    assert np.array_equal(first, second)


def write_split(folder, count, seed):
    """Images whose colour tells the class: sky above, road below, sometimes a car between."""
    rng = np.random.default_rng(seed)
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for index in range(count):
        labels = np.zeros((96, 128), np.uint8)
        horizon = int(rng.integers(30, 66))
        labels[horizon:] = 1
        x = int(rng.integers(0, 90))
        labels[horizon - 12 : horizon + 12, x : x + 30] = 2
        colours = np.array([[200, 160, 120], [90, 90, 90], [30, 30, 220]])
        image = colours[labels] + rng.integers(-20, 21, (96, 128, 3))
        cv2.imwrite(str(folder / "images" / f"{index:03}.png"), np.clip(image, 0, 255).astype(np.uint8))
        cv2.imwrite(str(folder / "labels" / f"{index:03}.png"), labels)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small made-up data set and a recipe for it."""
    root = tmp_path_factory.mktemp("toy")
    write_split(root / "train", 24, 0)
    write_split(root / "val", 6, 1)
    recipe = {
        "name": "toy",
        "architecture": "clustvit_t",
        "network": {"stem": "conv", "embed_dim": 48, "depth": 4, "injection_point": 1, "head_depth": 1},
        "classes": [{"name": n, "colour": [i, 0, 0]} for i, n in enumerate(("sky", "road", "car"))],
        "input": {"size": [96, 128]},
        "augmentation": {"crop_size": [64, 96], "scale": [0.7, 1.4]},
        "schedule": {
            "epochs": 8,
            "batch_size": 4,
            "learning_rate": 0.002,
            "validate_every": 4,
            "kept_fractions": [1.0, 0.5],
        },
    }
    (root / "toy.yaml").write_text(yaml.safe_dump(recipe))
    return root


def train_toy(toy, out, recipe="toy.yaml"):
    return main(["train", str(toy / recipe), "--data", str(toy), "--out", str(out), "--device", "cpu"])


@pytest.fixture(scope="module")
def trained(toy):
    assert train_toy(toy, toy / "run") == 0
    return toy / "run"


def test_training_learns_segmentation_and_clusters(trained):
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert len(log) == 8
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[-1]["cluster_accuracy"] > log[0]["cluster_accuracy"]
    assert log[-1]["miou"] > 50
    scores = yaml.safe_load((trained / "model" / "model.yaml").read_text())["scores"]
    assert scores["miou"] == max(record.get("miou", 0) for record in log)
    load_segmenter(trained / "model")


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(
            {"injection_points": [1, 2], "decode": "compact"}, id="progressive-compact", marks=pytest.mark.slow
        ),
        pytest.param(
            {"head": "upernet", "head_channels": 16, "head_blocks": [0, 1, 2, 3]}, id="upernet", marks=pytest.mark.slow
        ),
        pytest.param({"head": "detail", "stem": "conv", "head_channels": 16}, id="detail"),
    ],
)
def test_every_kind_of_network_trains(toy, tmp_path, network):
    recipe = yaml.safe_load((toy / "toy.yaml").read_text())
    recipe["network"] |= network
    recipe["schedule"] |= {"epochs": 3, "validate_every": 3, "merge_after": 0.0}
    (toy / f"{tmp_path.name}.yaml").write_text(yaml.safe_dump(recipe))
    assert train_toy(toy, tmp_path / "run", f"{tmp_path.name}.yaml") == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["cluster_loss"] < log[0]["cluster_loss"]
    load_segmenter(tmp_path / "run" / "model")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_ends_with_the_same_weights(train, write_recipe, toy_run, tmp_path, monkeypatch, number):
    """SIGTERM, which a container's end sends, as well."""
    from clustvit_ros.training import trainer

    train_epoch = trainer.Trainer._train_epoch

    def interrupted(self, epoch):
        if epoch == 1:
            os.kill(os.getpid(), number)
        return train_epoch(self, epoch)

    monkeypatch.setattr(trainer.Trainer, "_train_epoch", interrupted)
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background have Ctrl-C ignored
    try:
        assert train(write_recipe(), tmp_path / "again") == 130
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    monkeypatch.undo()
    assert train(write_recipe(), tmp_path / "again") == 0
    first, second = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (toy_run, tmp_path / "again"))
    for name, tensor in first["network"].items():
        assert torch.equal(tensor, second["network"][name]), name


def test_a_run_folder_of_another_recipe_is_refused(toy, trained, capsys):
    recipe = yaml.safe_load((toy / "toy.yaml").read_text())
    recipe["schedule"]["epochs"] = 9
    (toy / "other.yaml").write_text(yaml.safe_dump(recipe))
    assert train_toy(toy, trained, "other.yaml") == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "labels/000.png").unlink(), "1 of 3 images have no label: 000"),
        (lambda d: (d / "images/001.png").write_bytes(b"no image"), "001.png: cannot be read as an image"),
        (lambda d: (d / "labels/001.png").write_bytes(b""), "001.png: cannot be read as an image"),
        (lambda d: cv2.imwrite(str(d / "labels/002.png"), np.zeros((5, 5), np.uint8)), "labels are (5, 5), the image"),
        (
            lambda d: cv2.imwrite(str(d / "labels/002.png"), np.full((96, 128), 9, np.uint8)),
            "label ids [9] have no class",
        ),
        (
                lambda d: cv2.imwrite(str(d / "labels/002.png"), np.full((96, 128, 3), (0, 1, 2), np.uint8)),
                "expected an 8-bit PNG of class ids",
            ),
        (lambda d: [path.unlink() for path in (d / "images").iterdir()], "no image found"),
    ],
)
def test_damaged_data_is_named(tmp_path, damage, message):
    write_split(tmp_path / "d", 3, 0)
    damage(tmp_path / "d")
    with pytest.raises(DataError) as error:
        data = LabelledImages(tmp_path / "d" / "images", tmp_path / "d" / "labels", 3)
        for index in range(len(data)):
            data[index]
    assert message in str(error.value)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        LabelledImages(tmp_path / "images", tmp_path / "labels", 3)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx512_f": True}, "float32")],
)
def test_auto_is_bfloat16_where_the_cpu_has_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert Precision("auto", torch.device("cpu")).name == expected
    assert Precision("float32", torch.device("cpu")).name == "float32"


def test_semantic_tokens_are_learnt_from_the_full_network(train, write_recipe, tmp_path):
    """A way to merge that has no parts of its own is distilled as clusters are."""
    schedule = {"distillation_weight": 1.0, "kept_fractions": [0.25], "epochs": 4}
    recipe = write_recipe(network={"merging": "stvit", "depth": 4}, schedule=schedule)
    assert train(recipe, tmp_path / "run") == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["distillation_loss"] > 0 and log[-1]["segmentation_loss"] < log[0]["segmentation_loss"]
    network = load_segmenter(tmp_path / "run/model")
    assert 0 < int((network(torch.randn(1, 3, 64, 96), token_capacity=6).cluster_ids == 0).sum()) <= 6


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_labels_at_every_place_get_their_turn(train, write_recipe, tmp_path, place):
    """Every second label in both directions is judged in a step: nowhere are labels that no step ever looks at."""
    for split in ("train", "val"):
        write_split(tmp_path / split, 4, 0)
    for path in (tmp_path / "train/labels").iterdir():
        labels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        kept = np.full_like(labels, 255)
        kept[place[0] :: 2, place[1] :: 2] = labels[place[0] :: 2, place[1] :: 2]
        cv2.imwrite(str(path), kept)
    # Crops that are the images themselves, pixel by pixel.
    still = {"crop_size": [96, 128], "scale": [1.0, 1.0], "stretch": 1.0, "rotation_deg": 0.0, "flip": False}
    recipe = write_recipe(
        input={"size": [96, 128]},
        augmentation={**still, "rare_class": 0.0}, schedule={"batch_size": 1, "epochs": 3, "class_weighting": False},
    )  # fmt: skip
    assert train(recipe, tmp_path / "run", "--without-merging", data=tmp_path) == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert any(record["segmentation_loss"] > 0 for record in log)
