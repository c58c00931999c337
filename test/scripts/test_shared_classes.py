# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A model scored on labels of other classes, by what both mean."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import create_engine

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "shared_classes.py"
SWAPPED = {0: 1, 1: 0, 2: 2}  # what the model calls 0 is the data's second class


def score(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def scene(make_toy_model, tmp_path):
    """A model, and images whose labels are what it says of them, in another order of classes."""
    model = make_toy_model(ClassSet.numbered(3))
    engine, rng = create_engine(str(model)), np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "data/val" / kind).mkdir(parents=True)
    for index in range(2):
        image = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (128, 96), interpolation=cv2.INTER_CUBIC)
        said = engine.segment(image).mask[0]
        cv2.imwrite(str(tmp_path / f"data/val/images/{index}.png"), image[..., ::-1])
        labels = np.vectorize(SWAPPED.get)(said).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"data/val/labels/{index}.png"), labels)
    (tmp_path / "data/dataset.yaml").write_text(
        "classes: [second, first, third]\nsplits:\n  val: {images: val/images, labels: val/labels}\n"
    )
    return model, tmp_path / "data", [cv2.imread(str(tmp_path / f"data/val/labels/{i}.png"), 0) for i in range(2)]


def test_the_same_things_by_other_names_are_right(scene):
    model, data, labels = scene
    names = ClassSet.numbered(3).names
    groups = f"a: {names[0]}; b: {names[1]}, {names[2]}"
    done = score(model, "--data", data, "--model-groups", groups, "--data-groups", "a: first; b: second, third")
    assert done.returncode == 0, done.stderr
    present = {name for name, ids in (("a", [1]), ("b", [0, 2])) if np.isin(labels, ids).any()}
    found = dict(re.findall(r"([ab]) ([\d.]+|nan)", done.stdout.split("(")[1]))
    assert "mIoU 100.00 on 2 images" in done.stdout
    assert {name for name, iou in found.items() if iou == "100.0"} == present
    # The other way round everything is wrong.
    groups = f"a: {names[1]}, {names[2]}; b: {names[0]}"
    done = score(model, "--data", data, "--model-groups", groups, "--data-groups", "a: first; b: second, third")
    assert "mIoU 0.00 on 2 images" in done.stdout


def test_what_cannot_be_compared_is_refused(scene):
    model, data, _ = scene
    names = ClassSet.numbered(3).names
    done = score(model, "--data", data, "--model-groups", f"a: {names[0]}", "--data-groups", "c: first")
    assert done.returncode == 1 and "--data-groups: got c, expected the model's: a" in done.stderr
    done = score(model, "--data", data, "--model-groups", "a: nothing", "--data-groups", "a: first")
    assert done.returncode == 1 and "the model has no class 'nothing'" in done.stderr
    done = score(model, "--data", data, "--model-groups", "a", "--data-groups", "a: first")
    assert done.returncode == 1 and "got 'a', expected GROUP: CLASS" in done.stderr
