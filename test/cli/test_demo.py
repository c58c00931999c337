# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros demo`: choosing a source, scoring, and the whole of it over DDS."""

from __future__ import annotations

import importlib.util
import json
import shutil

import cv2
import numpy as np
import pytest

from clustvit_ros.classes import load_class_set
from clustvit_ros.cli.demo import find_labels, find_source, make_run_folder, score
from clustvit_ros.cli.main import main
from clustvit_ros.engine import create_engine
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.measure.metrics import ConfusionMatrix
from clustvit_ros.measure.pictures import FilmWriter, contact_sheet, window_problem
from clustvit_ros.training.dataset import LabelledImages

needs_ros = pytest.mark.skipif(importlib.util.find_spec("rclpy") is None, reason="needs rclpy (ROS 2)")


def test_labels_are_found_in_or_beside_the_folder(labelled_dir, tmp_path):
    for folder in (labelled_dir, labelled_dir / "images"):
        source = find_source(str(folder))
        assert source.location == str(labelled_dir / "images") and source.labels == labelled_dir / "labels"
        assert source.frames == 60  # three images start over until there are enough
    assert find_source(str(labelled_dir), frames=5).frames == 5
    cv2.imwrite(str(tmp_path / "x.jpg"), np.zeros((8, 8, 3), np.uint8))
    assert find_source(str(tmp_path)).labels is None


def test_sources_that_cannot_work_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"make demo SOURCE=/dev/video0"):
        find_source(None)
    with pytest.raises(DataError, match="no image found"):
        find_source(str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        find_source("nowhere.mp4")


def test_masks_are_scored_against_the_labels_of_their_picture(tmp_path):
    (tmp_path / "labels").mkdir()
    labels = np.zeros((4, 4), np.uint8)
    labels[2:] = 1
    cv2.imwrite(str(tmp_path / "labels" / "a.png"), labels)
    (tmp_path / "labels" / "a.png").rename(tmp_path / "labels" / "A.PNG")
    for name in ("a", "unknown"):
        cv2.imwrite(str(tmp_path / f"{name}.jpg"), np.zeros((4, 4, 3), np.uint8))
    found = find_labels(find_source(str(tmp_path)), 2)
    cv2.imwrite(str(tmp_path / "m.png"), np.zeros((4, 4), np.uint8))
    frames = [
        {"name": "a.jpg", "mask": "m.png"}, {"name": "a.jpg", "mask": None}, {"name": "unknown.jpg", "mask": "m.png"},
        {"mask": "m.png"},
    ]  # fmt: skip
    matrix, scored = score(frames, tmp_path, found, 2)
    assert matrix.counts.tolist() == [[8, 0, 0], [8, 0, 0]] and scored == 1


@needs_ros
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((120, 160, 3), (9, 8, 7), np.uint8), "b.png: got shape (120, 160, 3) of uint8 of colours"),
        (np.zeros((12, 16), np.uint8), "b.png: labels are (12, 16), the image b.png is (120, 160)"),
    ],
)
def test_labels_that_cannot_be_used_are_told_before_the_run(
    model_dir, labelled_dir, tmp_path, capsys, pixels, message
):
    shutil.copytree(labelled_dir, tmp_path / "in")
    cv2.imwrite(str(tmp_path / "in/labels/b.png"), pixels)
    arguments = ["demo", "--source", str(tmp_path / "in"), "--model", str(model_dir)]
    assert main([*arguments, "--output", str(tmp_path / "demo")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "demo").exists()


def test_contact_sheet_fills_its_rows(labelled_dir):
    pictures = sorted((labelled_dir / "images").iterdir())
    assert contact_sheet(pictures, width=80).shape == (60, 240, 3)
    assert contact_sheet(pictures[:1], width=80).shape == (60, 240, 3)


def test_every_run_has_a_folder_of_its_own(tmp_path):
    first = make_run_folder(tmp_path / "demo", "sim:3")
    second = make_run_folder(tmp_path / "demo", "sim:3")
    third = make_run_folder(tmp_path / "demo", "/data/my drive/")
    assert len({first, second, third}) == 3 and first.name.endswith("_sim-3") and third.name.endswith("_my-drive")
    assert (tmp_path / "demo" / "latest").resolve() == third.resolve()
    assert sorted(path.name for path in (tmp_path / "demo").iterdir())[-1] == "latest"


def test_all_frames_of_a_video_are_sent_or_the_number_left_out_is_known(tmp_path):
    with FilmWriter(tmp_path / "long.mp4", 30.0) as film:
        for _ in range(310):
            film.add(np.zeros((16, 16, 3), np.uint8))
    source = find_source(str(tmp_path / "long.mp4"))
    assert (source.frames, source.available, source.left_out) == (300, 310, True)
    source = find_source(str(tmp_path / "long.mp4"), frames=310)
    assert (source.frames, source.left_out) == (310, False)


@needs_ros
@pytest.mark.ros
def test_the_viewer_draws_legend_rate_tokens_and_budget(monkeypatch):
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

    from clustvit_ros.demo.viewer import ViewerNode

    texts = []
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    draw = cv2.putText
    monkeypatch.setattr(cv2, "putText", lambda image, text, *rest: (texts.append(text), draw(image, text, *rest))[1])
    context = rclpy.Context()
    rclpy.init(context=context)
    try:
        node = ViewerNode(context=context)
        pairs = {"engine_ms": "41.6", "latency_budget_ms": "50", "tokens_kept": "330", "tokens_total": "660"}
        values = [KeyValue(key=key, value=value) for key, value in pairs.items()]
        node._on_stats(DiagnosticArray(status=[DiagnosticStatus(values=values)]))
        shown = node.draw(np.zeros((240, 320, 3), np.uint8))
        node.close()
        node.destroy_node()
    finally:
        rclpy.shutdown(context=context)
    assert shown.shape[0] == 240 and shown.shape[1] > 320
    assert "0.0 fps  42 of 50 ms  330 of 660 tokens" in texts and "bicyclist" in texts


@needs_ros
@pytest.mark.ros
def test_demo_scores_what_the_engine_would(model_dir, labelled_dir, tmp_path, capsys):
    out = tmp_path / "demo"
    arguments = ["demo", "--source", str(labelled_dir), "--model", str(model_dir), "--output", str(out)]
    out = out / "latest"
    assert main([*arguments, "--rate", "20", "--frames", "12", "--device", "cpu"]) == 0
    report = json.loads((out / "summary.json").read_text())
    assert report["frames_sent"] == 12
    film = cv2.VideoCapture(str(next(out.glob("demo.*"))))
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) == report["masks_received"]
    height, width = film.read()[1].shape[:2]
    assert height == 720 and width > 960  # four panels, and the legend
    node = report["node"]
    assert node["frames_segmented"] == report["masks_received"] > 0
    assert node["frames_received"] == sum(node.values()) - node["frames_received"]

    recording = json.loads((out / "recording.json").read_text())
    data = LabelledImages(labelled_dir / "images", labelled_dir / "labels", 3)
    engine = create_engine(str(model_dir), device="cpu")
    offline = ConfusionMatrix(3)
    by_name = {data[index].stem: data[index] for index in range(len(data))}
    for frame in recording["frames"]:
        if frame["mask"]:
            sample = by_name[frame["name"].split(".")[0]]
            offline.add(sample.labels, engine.segment(sample.image).mask[0])
    assert report["miou"] == pytest.approx(100 * offline.miou(), abs=0.5)
    assert (out / "summary.png").is_file() and list((out / "overlays").iterdir())
    printed = capsys.readouterr().out
    for word in ("frames sent", "received", "dropped", "fps", "p50", "p95", "p99", "mIoU"):
        assert word in printed


@needs_ros
@pytest.mark.ros
def test_demo_tells_why_the_node_failed(model_dir, labelled_dir, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.yaml").write_bytes((model_dir / "model.yaml").read_bytes())
    arguments = ["demo", "--source", str(labelled_dir), "--model", str(tmp_path / "broken")]
    assert main([*arguments, "--output", str(tmp_path / "demo"), "--device", "cpu"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_a_window_needs_a_screen():
    assert window_problem({}).startswith("there is no screen here")
    # Whether this OpenCV can open windows differs by build; if it cannot, the remedy is named.
    problem = window_problem({"DISPLAY": ":0"})
    assert not problem or "install opencv-python" in problem


def test_bad_numbers_are_refused(capsys):
    assert main(["demo", "--rate", "0"]) == 2
    assert "expected a rate above 0" in capsys.readouterr().err


@needs_ros
@pytest.mark.ros
@pytest.mark.skipif(importlib.util.find_spec("panda3d") is None, reason="needs panda3d (the 'sim' extra)")
def test_simulated_drive_is_scored_under_every_budget(make_toy_model, tmp_path, capsys):
    """Short phases and an untrained model: it is the chain that is tested, from renderer to film."""
    model, out = make_toy_model(load_class_set("sim")), tmp_path / "demo"
    arguments = ["demo", "--source", "sim:5", "--model", str(model), "--output", str(out), "--view"]
    assert main([*arguments, "--device", "cpu", "--frames", "8", "--rate", "30"]) == 0
    out = out / "latest"
    report = json.loads((out / "summary.json").read_text())
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert list(phases) == ["default", "full", "budget_100", "budget_60", "budget_40", "budget_25"]
    assert phases["full"]["tokens_kept_mean"] == phases["full"]["tokens_total"]
    assert report["miou"] == pytest.approx(phases["default"]["miou"], abs=1e-3)
    stream = report["streaming"]
    assert [stream[name]["coverage"] > 0 for name in ("fresh", "held", "filled")] == [True] * 3
    assert stream["filled"]["in_order"] and stream["fresh"]["coverage"] == 1.0 and stream["rate_hz"] == 30
    # The published truth is the renderer's, and the score is of the published masks.
    recording = json.loads((out / "recording.json").read_text())
    masked = [frame for frame in recording["frames"] if frame["mask"] and frame["ground_truth"]]
    frame = masked[len(masked) // 2]
    index = int(frame["name"].rpartition("_")[2])
    from clustvit_ros.sim import SimulatedCamera

    truth = SimulatedCamera(5, rate_hz=30.0 / 3.0).frame(index).labels
    np.testing.assert_array_equal(cv2.imread(str(out / frame["ground_truth"]), cv2.IMREAD_UNCHANGED), truth)
    film = cv2.VideoCapture(str(next(out.glob("demo.*"))))
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) >= sum(phase["frames"] for phase in phases.values())
    height, width = film.read()[1].shape[:2]
    assert height == 720 and width > 960
    assert cv2.imread(str(out / "summary.png")).shape[1] == 3 * 480
    printed = capsys.readouterr().out
    words = ("no window: there is no screen", "live mIoU", "budget 60 %", "streaming mIoU", "tokens kept", "demo.")
    for word in (*words, "summary.png"):
        assert word in printed
