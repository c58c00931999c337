"""`clustvit-ros evaluate`, from the command line to the file."""

from __future__ import annotations

import json

import cv2
import pytest

from clustvit_ros.cli.main import main


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
    options = ("--merge", "none,clusters,tome,kmeans", "--merge-threshold", 1, "--token-capacity", 24)
    assert evaluate(model_dir, labelled_dir, "--json", tmp_path / "out.json", *options) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["model"].split("+")[1] for row in rows] == ["none", "clusters", "tome", "kmeans"]
    assert [row["tokens_kept_mean"] for row in rows] == [48, 24, 24, 24]
    assert capsys.readouterr().out.count("mIoU") == 4
    assert evaluate(model_dir, labelled_dir, "--merge", "magic") == 2
    assert "--merge: got 'magic', expected one of none, clusters, tome, kmeans" in capsys.readouterr().err


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


def test_labels_of_other_classes_are_refused(model_dir, labelled_dir, tmp_path, capsys):
    for name in ("images", "labels"):
        (tmp_path / name).symlink_to(labelled_dir / name)
    (tmp_path / "labels").unlink()
    (tmp_path / "labels").mkdir()
    for path in (labelled_dir / "labels").iterdir():
        cv2.imwrite(str(tmp_path / "labels" / path.name), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) | 8)
    assert evaluate(model_dir, tmp_path) == 2
    assert "have no class, expected 0 to 2 or 255 for void" in capsys.readouterr().err


def test_shipped_models_keep_their_scores(camvid_dir, tmp_path):
    """The figures in every model card of CamVid come out of this command."""
    from clustvit_ros.modeling import load_config
    from clustvit_ros.paths import share_dir

    models = [path.parent for path in (share_dir() / "models").glob("camvid_*/model.yaml")]
    assert models, "no CamVid model is shipped"
    for model in models:
        assert evaluate(model, camvid_dir / "val", "--json", tmp_path / "out.json") == 0
        report = json.loads((tmp_path / "out.json").read_text())
        stated = load_config(model).scores
        assert report["miou"] == pytest.approx(stated["miou"], abs=0.1)
        assert report["tokens_merged_mean"] == pytest.approx(stated["tokens_merged_mean"], abs=0.005)
