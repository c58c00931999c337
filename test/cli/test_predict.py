# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros predict`: what comes in, what lies in the folder afterwards, and what is said; `models` and recipes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from clustvit_ros.cli.main import main
from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.engine.masks import draw_overlay
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.images import read_image, write_image
from clustvit_ros.measure.pictures import FilmWriter
from clustvit_ros.networks import load_config
from clustvit_ros.paths import find_recipe, shipped_models, shipped_recipes


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()]


@pytest.fixture
def video(tmp_path):
    """Five frames at 10 Hz."""
    path = tmp_path / "v1.2.mp4"
    with FilmWriter(path, 10.0) as film:
        for value in (0, 60, 120, 180, 240):
            film.add(np.full((120, 160, 3), value, np.uint8))
    return path


def test_masks_are_the_engine_s(model_dir, labelled_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(labelled_dir), "--model", str(model_dir), "--merge-threshold", "0.3"]) == 0
    folder = Path("runs/predict/1")
    printed = capsys.readouterr().out
    assert f"results in {folder}" in printed and "3 images in" in printed and "per second" in printed
    engine = create_engine(str(model_dir))
    for entry in entries(folder):
        expected = engine.segment(read_image(labelled_dir / "images" / entry["name"]), Settings(0.3))
        mask = cv2.imread(str(folder / entry["mask"]), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(mask, expected.mask[0])
        assert cv2.imread(str(folder / entry["overlay"])).shape == (120, 160, 3)
        assert entry["tokens_kept"] == pytest.approx(expected.stats.tokens_kept, abs=0.01)
        assert entry["total_ms"] > 0 and sum(entry["classes"].values()) == pytest.approx(1.0, abs=1e-3)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["images"] == 3 and summary["unreadable"] == [] and summary["merge_threshold"] == 0.3
    assert summary["classes"][1] == {"id": 1, "name": "road", "colour": [90, 90, 90]}
    legend = cv2.cvtColor(cv2.imread(str(folder / "legend.png")), cv2.COLOR_BGR2RGB).reshape(-1, 3)
    assert {(0, 0, 255), (90, 90, 90), (255, 0, 0)} <= set(map(tuple, legend.tolist()))
    # Nothing of an earlier run is touched.
    assert main(["predict", str(labelled_dir / "images" / "a.png"), "--model", str(model_dir)]) == 0
    assert len(entries(Path("runs/predict/2"))) == 1 and len(entries(folder)) == 3


def test_patterns_keep_pictures_of_one_name_apart(model_dir, tmp_path):
    for name in ("d/front/1.png", "d/rear/1.png", "d/rear/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((96, 128, 3), np.uint8))
    arguments = ["predict", "--model", str(model_dir)]
    assert main([*arguments, str(tmp_path / "d" / "**" / "*.*"), "--out", str(tmp_path / "out")]) == 0
    masks = sorted(str(p.relative_to(tmp_path / "out/masks")) for p in (tmp_path / "out/masks").rglob("*.png"))
    assert masks == ["front/1.png", "rear/1.png", "rear/1.png.png"]
    # As a shell would have named them.
    several = [str(path) for path in sorted((tmp_path / "d").rglob("*.png"))]
    assert main([*arguments, *several, "--out", str(tmp_path / "again")]) == 0
    assert [entry["name"] for entry in entries(tmp_path / "again")] == ["front/1.png", "rear/1.png"]


def test_results_stay_in_their_folder_wherever_pictures_come_from(tmp_path, monkeypatch):
    for name in ("pics/x.png", "w/a/b/here.png", "w/a/b/X.png", "w/a/b/001/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.full((48, 64, 3), 90, np.uint8))
    (tmp_path / "w/a/b/link.png").symlink_to(tmp_path / "pics/x.png")
    before = (tmp_path / "pics/x.png").read_bytes()
    monkeypatch.chdir(tmp_path / "w/a/b")
    arguments = ["predict", "--engine", "scripted"]
    given = ["../../../pics/x.png", "here.png", "../b/here.png", "X.png", "link.png", str(tmp_path / "pics/x.png")]
    assert main([*arguments, *given, "--out", "../../out"]) == 0
    masks = sorted(str(p.relative_to(tmp_path / "w/out/masks")) for p in (tmp_path / "w/out/masks").rglob("*.png"))
    inside = ["X.png", "here.png", "here.png.png", "link.png"]
    assert masks == [*("pics/x.png", "pics/x.png.png"), *(f"w/a/b/{name}" for name in inside)]
    assert (tmp_path / "pics/x.png").read_bytes() == before and len(list((tmp_path / "pics").iterdir())) == 1
    # Of two names that some file systems take for one, each gets its own.
    (tmp_path / "w/a/b/here.png").rename("x.png")
    assert main([*arguments, "x.png", "X.png", "--out", "../../two"]) == 0
    assert sorted(path.name for path in (tmp_path / "w/two/masks").iterdir()) == ["X.png.png", "x.png"]
    # A folder whose name is a number is no camera.
    assert main([*arguments, "001", "--out", "../../numbered"]) == 0
    assert [entry["name"] for entry in entries(tmp_path / "w/numbered")] == ["y.png"]


def test_unreadable_pictures_are_counted_and_the_others_segmented(model_dir, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "good.png"), np.zeros((96, 128, 3), np.uint8))
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    cv2.imwrite(str(tmp_path / "in" / "line.png"), np.zeros((2, 9000, 3), np.uint8))
    (tmp_path / "in" / "gone.png").symlink_to("elsewhere.png")
    cv2.imwrite(str(tmp_path / "in" / "depth.tiff"), np.zeros((96, 128, 3), np.float32))
    arguments = ["predict", str(tmp_path / "in"), "--model", str(model_dir), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "bad.png: cannot be read as an image" in printed and "line.png: image size" in printed
    assert "gone.png: is a link to elsewhere.png, which is not there" in printed
    assert "depth.tiff: got float32 values, expected unsigned 8 or 16 bits; replace or remove the file" in printed
    assert [entry["name"] for entry in entries(tmp_path / "out")] == ["good.png"]
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["unreadable"]) == 4
    assert main(["predict", str(tmp_path / "in" / "bad.png"), *arguments[2:4], "--out", str(tmp_path / "none")]) == 1
    assert "0 images: none of 1 could be read" in capsys.readouterr().out


def test_names_that_are_not_utf8_and_turned_pictures(model_dir, tmp_path, capsys):
    picture = Image.fromarray(np.zeros((96, 128, 3), np.uint8))
    tags = Image.Exif()
    tags[0x0112] = 6
    picture.save(tmp_path / "plain.jpg")
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "turned.jpg", exif=tags)
    os.rename(os.fsencode(tmp_path / "plain.jpg"), os.fsencode(tmp_path / "in") + b"/name\xff.jpg")
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path / "in"), "--model", str(model_dir), "--out", str(out)]) == 0
    assert "sideways or upside down to viewers: 1 with an orientation tag (turned.jpg)" in capsys.readouterr().out
    assert len(list((out / "masks").iterdir())) == 2
    with pytest.raises(DataError, match=r"wide.jpg: cannot be written: .jpg takes no 70000x1 pixels"):
        write_image(tmp_path / "wide.jpg", np.zeros((1, 70_000, 3), np.uint8))
    film = tmp_path / "film\udcff.mp4"
    film.write_bytes(b"")
    assert main(["predict", str(film), "--model", str(model_dir), "--out", str(tmp_path / "other")]) == 2
    assert "name that is not UTF-8, which OpenCV cannot open" in capsys.readouterr().err


def test_a_video_that_was_cut_is_told(model_dir, tmp_path, capsys):
    path = tmp_path / "drive.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (128, 96))
    for shade in range(40):
        writer.write(np.full((96, 128, 3), 5 * shade, np.uint8))
    writer.release()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert main(["predict", str(path), "--model", str(model_dir), "--out", str(tmp_path / "out")]) == 1
    assert re.search(r"left out: .*drive.avi: ends after \d+ of 40 frames, cut short", capsys.readouterr().out)


def test_a_model_that_is_not_there_leaves_no_folder(tmp_path, model_dir):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((96, 128, 3), np.uint8))
    assert main(["predict", str(tmp_path / "a.png"), "--model", "none_such", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_video_becomes_a_film_that_browsers_play(model_dir, video, tmp_path, capsys):
    av = pytest.importorskip("av", reason="needs PyAV (the 'video' extra)")
    arguments = ["predict", str(video), "--model", str(model_dir), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    film = tmp_path / "out" / "v1.2.mp4"
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 10)
        assert len(list(container.decode(video=0))) == 5
    assert f"film {film}\n" in capsys.readouterr().out
    assert not (tmp_path / "out" / "masks").exists()
    assert main([*arguments[:-1], str(tmp_path / "masks"), "--masks", "--frames", "2"]) == 0
    assert [entry["mask"] for entry in entries(tmp_path / "masks")] == [f"masks/v1.2_00000{i}.png" for i in range(2)]


def test_without_pyav_the_film_says_what_it_is_not(model_dir, video, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["predict", str(video), "--model", str(model_dir), "--out", str(tmp_path / "out")]) == 0
    assert "browsers do not play this format: pip install av" in capsys.readouterr().out
    film = cv2.VideoCapture(str(next((tmp_path / "out").glob("v1.2.*"))))
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 5


def test_a_budget_chooses_size_and_tokens(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    for index in range(8):
        cv2.imwrite(str(tmp_path / "in" / f"{index}.png"), np.full((96, 128, 3), 30 * index, np.uint8))
    arguments = ["predict", str(tmp_path / "in"), "--model", str(model_dir)]
    assert main([*arguments, "--budget-ms", "30000", "--out", str(tmp_path / "easy")]) == 0
    summary = json.loads((tmp_path / "easy" / "summary.json").read_text())
    assert summary["budget"] == {"ms": 30000.0, "within": 1.0} and summary["images"] == 8
    assert "missed" not in capsys.readouterr().err
    with monkeypatch.context() as patch:  # a machine that seemed fast enough when it was asked
        patch.setattr("clustvit_ros.policy.policy.check_budget", lambda *arguments: None)
        assert main([*arguments, "--budget-ms", "0.01", "--out", str(tmp_path / "missed")]) == 0
    printed = capsys.readouterr().err
    assert "this budget was missed: latency_budget_ms 0.01 cannot be held now" in printed and "the smallest" in printed
    assert json.loads((tmp_path / "missed" / "summary.json").read_text())["budget"]["within"] == 0.0
    assert main([*arguments, "--budget-ms", "0.001", "--out", str(tmp_path / "hard")]) == 2
    streams = capsys.readouterr()
    assert streams.err.count("latency_budget_ms: got 0.001") == 1 and "at least" in streams.err
    assert "results in" not in streams.out and not (tmp_path / "hard").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "'nowhere.jpg', which is not there; expected a folder of pictures"),
        (["{tmp}/*.jpg"], "holds no pictures"),
        (["{tmp}"], "holds no pictures"),
        (["/dev/video987"], "/dev/video987 does not exist"),
        (["sim:abc"], "got 'sim:abc', expected sim, or sim:SEED with a whole number"),
        (["{picture}", "--intensity-range", "9000 7000"], "expected auto or LOW HIGH with LOW below HIGH"),
        (["{picture}", "--intensity-range", "thermal"], "expected auto or LOW HIGH"),
        (["{tmp}/notes.txt"], "cannot be read as a video"),
        (["rtsp://user:secret@127.0.0.1:9/x"], "rtsp://127.0.0.1:9/x gives no video"),
        (["{picture}", "--model", "nope"], "model 'nope' is not shipped"),
        (["{picture}", "--merge-threshold", "2"], "merge_threshold: got 2.0, expected a double from 0.0 to 1.0"),
        (["{picture}", "--budget-ms", "nan"], "latency_budget_ms: got nan"),
        (["{picture}", "--out", "{tmp}"], "is there and not empty"),
        (["{picture}", "--out", "/proc/masks"], "--out: /proc/masks cannot be made"),
        (["{picture}", "--model", "sim_tinny"], "did you mean sim_tiny?"),
        (["{picture}", "--show"], "--show: there is no screen here"),
    ],
)
def test_what_cannot_be_is_one_message(arguments, message, tmp_path, labelled_dir, monkeypatch, capfd):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no video")
    picture = labelled_dir / "images" / "a.png"
    assert main(["predict", *(text.format(tmp=tmp_path, picture=picture) for text in arguments)]) == 2
    printed = capfd.readouterr().err
    assert message in printed and "secret" not in printed and "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("text", "limits"), [("0 65535", (0, 65535)), ("7000 9000", (7000, 9000)), ("auto", None)])
def test_16_bit_pictures_are_scaled_as_asked(text, limits, model_dir, labelled_dir, tmp_path, capfd):
    """A thermal camera's, which uses a small part of them: what `auto` makes of it is as the eight bits were."""
    eight = cv2.imread(str(labelled_dir / "images" / "a.png"))
    (tmp_path / "in").mkdir()
    pixels = (7000 + eight.astype(np.float64) * (2000 / 255)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "in/a.png"), pixels)
    command = ["predict", str(tmp_path / "in"), "--model", str(model_dir), "--out", str(tmp_path / "out")]
    assert main([*command, "--intensity-range", text]) == 0
    assert ("next to nothing is seen in them" in capfd.readouterr().err) == (text == "0 65535")
    low, high = limits or np.percentile(pixels[::4, ::4], (1, 99)).round()
    scaled = (((pixels.astype(np.float64) - low) / (high - low)).clip(0, 1) * 255).round().astype(np.uint8)
    mask = cv2.imread(str(tmp_path / "out/masks/a.png"), cv2.IMREAD_UNCHANGED)
    prediction = create_engine(str(model_dir)).segment(np.ascontiguousarray(scaled[..., ::-1]), Settings(0.5))
    assert (mask == prediction.mask[0]).mean() > 0.99


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_has(model_dir, labelled_dir, tmp_path, number):
    script = "import sys; from clustvit_ros.cli.main import main; sys.exit(main(sys.argv[1:]))"
    pictures = tmp_path / "in"
    pictures.mkdir()
    for index in range(2000):
        (pictures / f"{index:04d}.png").symlink_to(labelled_dir / "images" / "a.png")
    command = [sys.executable, "-c", script, "predict", str(pictures), "--model", str(model_dir)]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A job in the background ignores Ctrl-C, and whatever it starts does, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline_s = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("masks/*"))) < 5 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for _ in range(20):  # an impatient supervisor
        process.send_signal(number)
        time.sleep(0.005)
    printed, problems = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Traceback" not in problems
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["images"] == len(entries(tmp_path / "out")) >= 5
    assert summary["interrupted"] is True
    assert "interrupted, the rest was not looked at; results in" in printed


def test_models_are_listed_with_classes_scores_and_terms(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    for folder in shipped_models():
        config = load_config(folder)
        assert config.licence and config.licence in printed
        first = config.scores.get("unseen", config.scores)  # what it is worth on roads that it does not know
        assert f"{config.name}: mIoU {first['miou']:.1f} (" in printed and f"{config.scores['miou']:.1f} (" in printed
        assert rows[config.name]["classes"] == list(config.classes.names)


def test_recipes_have_names():
    assert find_recipe("finetune") == shipped_recipes()["finetune"]
    assert find_recipe(shipped_recipes()["sim_tiny"]) == shipped_recipes()["sim_tiny"]
    with pytest.raises(ConfigError, match=r"recipe 'finetunee': there is no such file, and none .*\(.*finetune"):
        find_recipe("finetunee")


def test_each_thermal_picture_is_judged_by_itself(model_dir, tmp_path, capfd):
    """One picture that uses all of 16 bits hides nothing of the others, wherever it stands."""
    rng = np.random.default_rng(2)
    (tmp_path / "in").mkdir()
    for number, name in enumerate("abd"):
        pixels = rng.normal(7_700 + 900 * number, 120, (120, 160)).astype(np.uint16)
        cv2.imwrite(str(tmp_path / f"in/{name}.png"), pixels)
    cv2.imwrite(str(tmp_path / "in/c.png"), rng.integers(0, 65_536, (120, 160), np.uint16))
    command = ["predict", str(tmp_path / "in"), "--model", str(model_dir)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "3 of 4: intensity_range: got 0 65535, of which 16-bit pictures use" in capfd.readouterr().err
    assert json.loads((tmp_path / "out/summary.json").read_text())["hardly_in_range"] == 3
    assert main([*command, "--out", str(tmp_path / "auto"), "--intensity-range", "auto"]) == 0
    assert "intensity_range" not in capfd.readouterr().err
    alone = ["predict", str(tmp_path / "in/d.png"), "--model", str(model_dir), "--out", str(tmp_path / "alone")]
    assert main([*alone, "--intensity-range", "auto"]) == 0
    masks = [cv2.imread(str(tmp_path / out / "masks/d.png"), cv2.IMREAD_UNCHANGED) for out in ("auto", "alone")]
    np.testing.assert_array_equal(*masks)


def test_a_film_that_was_interrupted_is_told(model_dir, video, tmp_path, monkeypatch, capsys):
    drawn = []

    def interrupted(*arguments):
        drawn.append(arguments)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw_overlay(*arguments)

    monkeypatch.setattr("clustvit_ros.cli.predict.draw_overlay", interrupted)
    assert main(["predict", str(video), "--model", str(model_dir), "--out", str(tmp_path / "out")]) == 130
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["images"], summary["interrupted"], summary["films"]) == (3, True, ["v1.2.mp4"])
    assert f"film {tmp_path / 'out/v1.2.mp4'}" in capsys.readouterr().out
    film = cv2.VideoCapture(str(tmp_path / "out/v1.2.mp4"))
    assert int(film.get(cv2.CAP_PROP_FRAME_COUNT)) == 3
