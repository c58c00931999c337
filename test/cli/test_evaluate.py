# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros evaluate`, from the command line to the file."""

from __future__ import annotations

import dataclasses
import json
import shutil

import cv2
import numpy as np
import pytest
import yaml

from clustvit_ros.classes import ClassSet
from clustvit_ros.cli.main import main
from clustvit_ros.networks import build_network, load_config, load_segmenter, save_model
from clustvit_ros.networks.architectures import network_config, plain_twin


def evaluate(model, data, *arguments):
    paths = ["--images", str(data / "images"), "--labels", str(data / "labels")]
    return main(["evaluate", "--model", str(model), *paths, "--device", "cpu", *map(str, arguments)])


def test_report_has_scores_and_costs(model_dir, labelled_dir, tmp_path):
    assert evaluate(model_dir, labelled_dir, "--json", tmp_path / "deep" / "out.json") == 0
    report = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert set(report["per_class_iou"]) == {"sky", "road", "car"}
    assert 0 <= report["miou"] <= 100 and report["images"] == 3
    assert 0 < report["tokens_kept_mean"] <= report["tokens_total"] == 48
    assert report["latency_ms_p50"] > 0


def test_threshold_and_capacity_reach_the_engine(model_dir, labelled_dir, tmp_path):
    def kept(*options):
        assert evaluate(model_dir, labelled_dir, "--json", tmp_path / "out.json", *options) == 0
        return json.loads((tmp_path / "out.json").read_text())["tokens_kept_mean"]

    assert kept("--merge-threshold", 1) == 48
    assert kept("--merge-threshold", 1, "--token-capacity", 7) == 7
    assert kept("--merge-threshold", 0) == 6  # the lowest rung


def test_ways_to_merge_are_scored_side_by_side(model_dir, labelled_dir, tmp_path, capsys):
    options = ("--merge", "none,clusters,algm,tome,kmeans", "--merge-threshold", 1, "--token-capacity", 24)
    assert evaluate(model_dir, labelled_dir, "--json", tmp_path / "out.json", *options) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [row["model"].split("+")[1] for row in rows] == ["none", "clusters", "algm", "tome", "kmeans"]
    assert [row["tokens_kept_mean"] for row in rows] == [48, 24, 24, 24, 24]
    assert capsys.readouterr().out.count("mIoU") == 6
    assert evaluate(model_dir, labelled_dir, "--merge", "magic") == 2
    ways = "none, clusters, algm, algm+clusters, cts, tome, kmeans, stvit"
    assert f"--merge: got 'magic', expected one of {ways}" in capsys.readouterr().err


def test_ways_that_weights_have_no_part_for_are_refused_before_any_is_scored(twin_dir, labelled_dir, tmp_path, capsys):
    for ways, message in (
        ("none,clusters", "which a plain vit has no weights for"), ("none,cts", "has no policy network"),
        ("none,none", "expected names separated by commas, each once"),
    ):  # fmt: skip
        try:
            assert evaluate(twin_dir, labelled_dir, "--merge", ways, "--json", tmp_path / "out.json") == 2
        except SystemExit as end:
            assert end.code == 2
        told = capsys.readouterr()
        assert message in told.err and "mIoU" not in told.out and "/clustvit_evaluate_" not in told.err


def test_models_of_one_name_keep_their_own_scores(model_dir, labelled_dir, tmp_path, capsys):
    """Ways to merge are made of each one's own weights, and told apart by the folders around."""
    for run, gain in (("q1", 1.0), ("q2", -1.0)):
        network = load_segmenter(model_dir)
        turned = {name: gain if name.startswith("head") else 1.0 for name in network.state_dict()}
        weights = {name: turned[name] * value for name, value in network.state_dict().items()}
        network.load_state_dict(weights)
        save_model(tmp_path / run / "m", load_config(model_dir), network)
    models = (tmp_path / "q1" / "m", labelled_dir, "--model", tmp_path / "q2" / "m")
    assert evaluate(*models, "--json", tmp_path / "plain.json") == 0
    assert evaluate(*models, "--merge", "clusters,tome", "--json", tmp_path / "out.json") == 0
    rows = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [row["model"] for row in rows] == ["q1-m+clusters", "q1-m+tome", "q2-m+clusters", "q2-m+tome"]
    plain = [row["miou"] for row in json.loads((tmp_path / "plain.json").read_text())["models"]]
    assert [rows[0]["miou"], rows[2]["miou"]] == plain and plain[0] != plain[1]


def test_scores_repeat(model_dir, labelled_dir, tmp_path):
    for name in ("first", "second"):
        assert evaluate(model_dir, labelled_dir, "--json", tmp_path / name) == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first", "second"))
    assert first["per_class_iou"] == second["per_class_iou"]


def test_pictures_are_written(model_dir, labelled_dir, tmp_path):
    assert evaluate(model_dir, labelled_dir, "--pictures", tmp_path / "pictures") == 0
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.stem for path in pictures] == ["a", "b", "c"]
    assert cv2.imread(str(pictures[0])).shape == (120, 4 * 160, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--merge-threshold", 2), "merge_threshold: got 2.0, expected 0.0 to 1.0"),
        (("--token-capacity", -4), "token_capacity: got -4"),
        (("--device", "cuda:99"), "cannot be used"),
    ],
)
def test_bad_options_give_one_line_and_exit_code_2(model_dir, labelled_dir, capsys, arguments, message):
    assert evaluate(model_dir, labelled_dir, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("clustvit-ros: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["evaluate", "tune"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "{data}", "--images", "{data}/images"), "--data: got --images as well, expected either --data or"),
        (("--data", "{data}", "--labels", "{data}/labels"), "--data: got --labels as well"),
        (("--images", "{data}/images", "--labels", "{data}/labels", "--split", "val"), "--split: got no --data"),
    ],
)
def test_options_of_data_that_contradict_are_refused(model_dir, labelled_dir, capsys, command, arguments, message):
    assert main([command, "--model", str(model_dir), *(each.format(data=labelled_dir) for each in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_labels_of_other_classes_are_refused(model_dir, labelled_dir, tmp_path, capsys):
    for name in ("images", "labels"):
        (tmp_path / name).symlink_to(labelled_dir / name)
    (tmp_path / "labels").unlink()
    (tmp_path / "labels").mkdir()
    for path in (labelled_dir / "labels").iterdir():
        cv2.imwrite(str(tmp_path / "labels" / path.name), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) | 8)
    assert evaluate(model_dir, tmp_path) == 2
    assert "have no class, expected 0 to 2 or 255 for void" in capsys.readouterr().err


def test_a_model_that_cannot_be_scored_is_found_before_others_are(
    model_dir, make_toy_model, labelled_dir, tmp_path, capsys
):
    for name in ("images", "labels"):
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / name).symlink_to(labelled_dir / name)
    (tmp_path / "dataset.yaml").write_text("classes: [sky, road, car]\n")
    other = make_toy_model(ClassSet.numbered(4))
    command = ["evaluate", "--model", str(model_dir), str(other), "--data", str(tmp_path), "--device", "cpu"]
    assert main(command) == 2
    told = capsys.readouterr()
    assert "its class list differs from the model's" in told.err and "mIoU" not in told.out


@pytest.fixture(scope="module")
def twin_dir(model_dir, tmp_path_factory):
    """The plain ViT twin of the toy model: the same weights, nothing merged."""
    config = load_config(model_dir)
    architecture, overrides = plain_twin(config.architecture, config.overrides)
    network = network_config(architecture, overrides)
    twin = dataclasses.replace(config, architecture=architecture, network=network, overrides=overrides)
    built = build_network(network, len(config.classes))
    built.load_state_dict(load_segmenter(model_dir).state_dict(), strict=False)
    folder = tmp_path_factory.mktemp("twin") / "toy_vit"
    save_model(folder, twin, built)
    return folder


def test_report_compares_models_and_settings(model_dir, twin_dir, labelled_dir, tmp_path, capsys):
    models = ["--model", str(model_dir), str(twin_dir)]
    paths = ["--images", str(labelled_dir / "images"), "--labels", str(labelled_dir / "labels")]
    assert main(["evaluate", *models, *paths, "--device", "cpu", "--report", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    merged, plain = report["models"]
    assert [merged["model"], plain["model"]] == ["toy", "toy_vit"]
    assert plain["tokens_kept_mean"] == plain["tokens_total"] == 48 and len(plain["sweep"]) == 1
    # Threshold 1 is the plain ViT, bit for bit, and merging saves operations.
    unmerged = next(r for r in merged["sweep"] if r["merge_threshold"] == 1 and not r["token_capacity"])
    assert unmerged["accuracy"] == plain["miou"]
    operations = [r["gflops_mean"] for r in sorted(merged["sweep"], key=lambda r: r["tokens_kept_mean"])]
    assert operations == sorted(operations) and operations[0] < operations[-1]
    assert {(c["model"], c["twin"]) for c in report["comparisons"]} == {("toy", "toy_vit")}  # not the other way round
    points = {c["point"]: c for c in report["comparisons"]}
    assert {"as evaluated", "at 60 % merged"} <= points.keys()
    at_60 = points["at 60 % merged"]
    row = next(r for r in merged["sweep"] if r["token_capacity"] == 18)  # 62.5 % merged, the next rung
    assert at_60["lost"] == pytest.approx(plain["miou"] - row["accuracy"], abs=1e-3)
    assert at_60["text"] in capsys.readouterr().out
    assert np.sum(merged["confusion"]) == 3 * 120 * 160 - 3 * 10 * 160  # every labelled pixel
    assert {r["image"] for r in merged["per_image"]} == {"a", "b", "c"}
    assert 0 <= merged["boundary_iou"] <= 100 and set(merged["per_class_boundary_iou"]) == {"sky", "road", "car"}
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and page.count("data:image/jpeg;base64,") == 6
    assert "http" not in page  # it holds everything it shows
    # Another one in the same place shows its own pictures, and sweeps at the size that it scores.
    one = ["evaluate", "--model", str(model_dir), *paths, "--device", "cpu", "--report", str(tmp_path / "report")]
    assert main([*one, "--input-scale", "0.5"]) == 0
    small = json.loads((tmp_path / "report/report.json").read_text())["models"][0]
    assert {(r["input_scale"], r["tokens_total"]) for r in small["sweep"]} == {(0.5, small["tokens_total"])}
    assert small["tokens_total"] == 12 and max(r["gflops_mean"] for r in small["sweep"]) < operations[-1] / 2
    assert (tmp_path / "report/report.html").read_text().count("data:image/jpeg;base64,") == 3


def test_several_models_go_into_one_file(model_dir, twin_dir, labelled_dir, tmp_path):
    assert evaluate(model_dir, labelled_dir, "--model", twin_dir, "--json", tmp_path / "out.json") == 0
    assert [m["model"] for m in json.loads((tmp_path / "out.json").read_text())["models"]] == ["toy", "toy_vit"]


def test_data_sets_are_taken_as_train_takes_them(model_dir, labelled_dir, tmp_path, capsys):
    (tmp_path / "val").symlink_to(labelled_dir)
    command = ["evaluate", "--model", str(model_dir), "--data", str(tmp_path), "--device", "cpu"]
    assert main(command) == 0
    assert main([*command, "--split", "test"]) == 2
    assert "has no split 'test'" in capsys.readouterr().err
    classes = [{"name": name, "colour": [0, 0, 0]} for name in ("sky", "street", "car")]
    content = {"classes": classes, "splits": {"val": {"images": "val/images", "labels": "val/labels"}}}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(content))
    assert main(command) == 2
    assert (
        "class list differs from the model's: got sky, street, car; toy has sky, road, car" in capsys.readouterr().err
    )
    assert main(["evaluate", "--model", str(model_dir)]) == 2
    assert "expected --images and --labels, or --data" in capsys.readouterr().err


def test_a_drive_without_labelled_pixels_costs_no_evaluation(model_dir, labelled_dir, tmp_path, capsys):
    shutil.copytree(labelled_dir, tmp_path / "val")
    cv2.imwrite(str(tmp_path / "val/labels/b.png"), np.full((120, 160), 255, np.uint8))
    (tmp_path / "dataset.yaml").write_text("classes: [sky, road, car]\ngroup: .\n")
    command = ["evaluate", "--model", str(model_dir), "--data", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    groups = json.loads((tmp_path / "out.json").read_text())["groups"]
    assert groups["b"] == {"miou": None, "images": 1} and groups["a"]["miou"] > 0
    assert "  b                    - on 1 images" in capsys.readouterr().out


def test_bad_files_are_skipped_on_request(model_dir, labelled_dir, tmp_path, capsys):
    shutil.copytree(labelled_dir, tmp_path / "data")
    (tmp_path / "data/labels/b.png").write_bytes(b"")
    assert evaluate(model_dir, tmp_path / "data") == 2
    assert "b.png: cannot be read as an image" in capsys.readouterr().err
    assert evaluate(model_dir, tmp_path / "data", "--bad-data", "skip") == 0
    captured = capsys.readouterr()
    assert "b.png: cannot be read as an image" in captured.err and "on 2 images" in captured.out


def test_a_shipped_model_keeps_its_score_on_every_eighth_image(camvid_dir, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for path in sorted((camvid_dir / "val" / kind).iterdir())[::8]:
            (tmp_path / kind / path.name).symlink_to(path)
    assert evaluate("camvid_tiny", tmp_path, "--json", tmp_path / "out.json") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["images"] == 13
    assert report["miou"] == pytest.approx(63.79, abs=0.2)
    assert report["tokens_merged_mean"] == pytest.approx(0.4235, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data"),
    [*((f"camvid_{name}", "camvid_dir") for name in ("tiny", "small", "clustr")), ("offroad_tiny", "ycor_dir")],
)
def test_shipped_models_keep_their_scores(request, tmp_path, name, data):
    """The figures in the cards of models that have a val split come out of this command."""
    from clustvit_ros.networks import load_config
    from clustvit_ros.paths import share_dir

    model = share_dir() / "models" / name
    assert evaluate(model, request.getfixturevalue(data) / "val", "--json", tmp_path / "out.json") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    stated = load_config(model).scores
    assert report["miou"] == pytest.approx(stated["miou"], abs=0.1)
    assert report["tokens_merged_mean"] == pytest.approx(stated["tokens_merged_mean"], abs=0.005)
