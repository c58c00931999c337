# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Documents and viewers' configurations follow the code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from clustvit_ros.classes import IGNORE_INDEX, ClassSet, class_set_names, load_class_set
from clustvit_ros.dds import CAMERA_TOPIC
from clustvit_ros.networks import load_config

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = sorted(page for pattern in ("*.md", "[cdm]*/**/*.md") for page in ROOT.glob(pattern))  # config, docs, models
MODELS = sorted(path.parent for path in (ROOT / "models").glob("*/model.yaml"))


@pytest.fixture(scope="module")
def views() -> Any:
    """scripts/write_views.py as a module."""
    spec = importlib.util.spec_from_file_location("write_views", ROOT / "scripts" / "write_views.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.ros
@pytest.mark.parametrize("installed", [False, True])
def test_the_reference_is_current(tmp_path, installed):
    """With vision_msgs installed, here its stand-in, as without."""
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    command = [sys.executable, str(ROOT / "scripts" / "write_reference.py"), "--output", str(tmp_path / "reference.md")]
    environ = {name: value for name, value in os.environ.items() if name != "_ROS_WHEELS_BOOTSTRAP_COMPLETE"}
    if installed:
        environ["PYTHONPATH"] = f"{ROOT / 'test/node/fake_messages'}{os.pathsep}{environ.get('PYTHONPATH', '')}"
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "reference.md").read_text()
    assert (ROOT / "docs" / "reference.md").read_text() == written, "run `make reference`"


def test_viewers_configurations_are_current(views):
    classes = load_config(views.MODEL).classes
    shown = (ROOT / "config/rviz/segmentation.rviz").read_text()
    assert shown == views.rviz(views.IMAGE_TOPIC), "run `make reference`"
    layout = (ROOT / "config/foxglove/segmentation.json").read_text()
    assert layout == views.foxglove(views.IMAGE_TOPIC, views.MODEL, classes), "run `make reference`"


def test_viewers_show_topics_that_exist():
    reference = (ROOT / "docs" / "reference.md").read_text()
    known = {*re.findall(r"^\| `(/[\w/]+)`", reference, re.M), f"/{CAMERA_TOPIC}"}
    rviz = yaml.safe_load((ROOT / "config/rviz/segmentation.rviz").read_text())
    displays = rviz["Visualization Manager"]["Displays"]
    shown = {display["Topic"]["Value"]: display["Topic"]["Reliability Policy"] for display in displays}
    layout = json.loads((ROOT / "config/foxglove/segmentation.json").read_text())
    images = {panel["imageMode"]["imageTopic"] for panel in layout["configById"].values() if "imageMode" in panel}
    plots = {path["value"] for panel in layout["configById"].values() for path in panel.get("paths", [])}
    for topic in {*shown, *images, *(path.split(".")[0] for path in plots)}:
        assert topic in known, topic
    # A camera may be best effort, and a subscriber that wants more hears nothing.
    assert shown[f"/{CAMERA_TOPIC}"] == "Best Effort"


def test_the_foxglove_layout_places_every_panel_once():
    layout = json.loads((ROOT / "config/foxglove/segmentation.json").read_text())

    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        assert node["direction"] in ("row", "column") and 0 < node["splitPercentage"] < 100
        return leaves(node["first"]) + leaves(node["second"])

    assert sorted(leaves(layout["layout"])) == sorted(layout["configById"])
    for name in layout["configById"]:
        assert re.fullmatch(r"(Image|Markdown|Plot|DiagnosticSummary|Parameters)!\w+", name)


def test_stats_that_the_layout_plots_are_published():
    from clustvit_ros.engine import Stats
    from clustvit_ros.engine.engine import FrameRecord

    pairs = FrameRecord(stats=Stats(1, 1.0, 1, 0.5, 1.0)).as_pairs()
    layout = (ROOT / "config/foxglove/segmentation.json").read_text()
    for key in re.findall(r'key==\\"(\w+)\\"', layout):
        assert key in pairs


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_one_palette_everywhere(model, views):
    from clustvit_ros.engine.masks import draw_overlay

    classes = load_config(model).classes
    palette = classes.palette()
    same_data = [name for name in class_set_names() if load_class_set(name).names == classes.names]
    for name in same_data:
        assert load_class_set(name) == classes, f"config/classes/{name}.yaml and {model.name} differ"
    # Node and demo: an opaque overlay shows the palette's colours, and the image where nothing is labelled.
    mask = np.arange(len(classes), dtype=np.uint8)[None].repeat(2, axis=0)
    image = np.full((*mask.shape, 3), 77, np.uint8)
    np.testing.assert_array_equal(draw_overlay(image, mask, palette, 1.0), palette[mask])
    unlabelled = np.full_like(mask, IGNORE_INDEX)
    np.testing.assert_array_equal(draw_overlay(image, unlabelled, palette, 1.0), image)
    # Viewers and model card.
    legend = views.legend(model.name, classes)
    card = (model / "README.md").read_text()
    for index, (name, (red, green, blue)) in enumerate(zip(classes.names, classes.colours, strict=True)):
        assert f"| {index} | {name} | `#{red:02x}{green:02x}{blue:02x}` |" in legend
        assert f"| {index} | {name} | {red}, {green}, {blue} |" in card


def test_a_bag_s_labels_tell_the_palette(tmp_path, make_toy_model):
    pytest.importorskip("rosbags", reason="needs rosbags")
    sys.path.insert(0, str(ROOT / "test" / "bags"))
    from recordings import camera_bag

    from clustvit_ros.bags import label_bag
    from clustvit_ros.bags.writing import read_about
    from clustvit_ros.engine import create_engine

    classes = ClassSet(("sky", "road"), ((1, 2, 250), (90, 80, 70)))
    engine = create_engine(str(make_toy_model(classes)), device="cpu")
    label_bag(camera_bag(tmp_path / "in", 1), tmp_path / "out", engine)
    about = read_about(tmp_path / "out")
    assert about is not None
    assert about["classes"] == [{"name": "sky", "colour": [1, 2, 250]}, {"name": "road", "colour": [90, 80, 70]}]


def anchors(page: Path) -> set[str]:
    """What links may follow `#` with: headings, as GitHub names them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ +(.*?) *$", text, re.M)
    headings = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return {f"{name}-{headings[:i].count(name)}" if name in headings[:i] else name for i, name in enumerate(headings)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    text = re.sub(r"`[^`\n]*`", "", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)", text):
        if re.match(r"https?://[\w.-]+(/|$)", target):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists() and page.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_what_documents_point_to_exists(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:config|scripts|docker|launch|docs|models)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    for command in re.findall(r"^clustvit-ros ([\w-]+)", text, re.M):
        from clustvit_ros.cli.main import COMMANDS

        assert command.replace("-", "_") in COMMANDS


def test_options_in_documents_are_options_of_their_commands():
    for path in [*DOCS, ROOT / "README.md"]:
        text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
        for line in re.findall(r"^clustvit-ros [\w-]+ .*$", text, re.M):
            words = line.split("#")[0].split()
            told = help_of(words[1])
            for option in (word for word in words if word.startswith("--")):
                assert option in told, f"{path.name}: {line}"


HELP: dict[str, str] = {}


def help_of(command: str) -> str:
    """What `--help` of a command says."""
    if command not in HELP:
        import contextlib
        import io

        from clustvit_ros.cli.main import main

        stream = io.StringIO()
        with contextlib.redirect_stdout(stream), contextlib.suppress(SystemExit):
            main([command, "--help"])
        HELP[command] = stream.getvalue()
    return HELP[command]


def test_pictures_are_small():
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    assert {path.suffix for path in pictures} <= {".png", ".jpg", ".json", ".webp"}
    for path in pictures:
        assert path.stat().st_size < (3_000_000 if path.suffix == ".webp" else 200_000), path
