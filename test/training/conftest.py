# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A small made-up data set whose colours tell the classes, and recipes for it."""

from __future__ import annotations

import contextlib
import copy
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import yaml

from clustvit_ros.cli.main import main

CLASSES = ("sky", "road", "car")
RECIPE: dict[str, Any] = {
    "name": "toy",
    "architecture": "clustvit_t",
    "network": {"stem": "conv", "embed_dim": 48, "depth": 3, "injection_point": 1, "head_depth": 1},
    "classes": [{"name": name, "colour": [index, 0, 0]} for index, name in enumerate(CLASSES)],
    "input": {"size": [64, 96]},
    "augmentation": {"crop_size": [48, 64], "scale": [0.7, 1.4]},
    "schedule": {
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 0.002,
        "validate_every": 2,
        "precision": "float32",
        "merge_after": 0.0,
        "kept_fractions": [1.0, 0.5],
    },
}


def write_split(folder: Path, count: int, seed: int, size: tuple[int, int] = (64, 96)) -> None:
    """Sky above, road below, a car across the horizon."""
    rng = np.random.default_rng(seed)
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for index in range(count):
        image, labels = scene(rng, size)
        cv2.imwrite(str(folder / "images" / f"{index:03}.png"), image[..., ::-1])
        cv2.imwrite(str(folder / "labels" / f"{index:03}.png"), labels)


def scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An RGB image and its labels."""
    height, width = size
    labels = np.zeros(size, np.uint8)
    horizon = int(rng.integers(height // 3, 2 * height // 3))
    labels[horizon:] = 1
    x = int(rng.integers(0, width - width // 4))
    labels[horizon - height // 8 : horizon + height // 8, x : x + width // 4] = 2
    colours = np.array([[120, 160, 200], [90, 90, 90], [220, 30, 30]])
    noisy = colours[labels] + rng.integers(-20, 21, (*size, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Folder with {train,val}/{images,labels}, 10 and 3 of them."""
    root = tmp_path_factory.mktemp("scenes")
    write_split(root / "train", 10, 0)
    write_split(root / "val", 3, 1)
    return root


@pytest.fixture
def write_recipe(tmp_path):
    """Writes the recipe with sections updated, and gives its path."""

    def write(**sections: Any) -> Path:
        recipe = copy.deepcopy(RECIPE)
        for name, value in sections.items():
            if isinstance(value, dict) and isinstance(recipe.get(name), dict):
                recipe[name].update(value)
            else:
                recipe[name] = value
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.fixture
def train(scenes):
    """Runs `clustvit-ros train` on the CPU and gives its exit code."""

    def run(recipe: Path, out: Path, *arguments: str, data: Path = scenes, draws: bool = False) -> int:
        command = ["train", str(recipe), "--data", str(data), "--out", str(out), "--device", "cpu", *arguments]
        # Drawing takes a fifth of a toy's training.
        with contextlib.nullcontext() if draws else mock.patch("clustvit_ros.cli.train.draw_log"):
            return main(command)

    return run


@pytest.fixture(scope="session")
def toy_run(scenes, tmp_path_factory) -> Path:
    """The run folder of `RECIPE`, trained to its end; to be read only."""
    root = tmp_path_factory.mktemp("toy")
    (root / "toy.yaml").write_text(yaml.safe_dump(RECIPE))
    command = ["train", str(root / "toy.yaml"), "--data", str(scenes), "--out", str(root / "run"), "--device", "cpu"]
    assert main(command) == 0
    return root / "run"


@pytest.fixture
def finished(toy_run, tmp_path) -> Path:
    """A run folder of its own for a test, `run`, as training `write_recipe()` to its end leaves it."""
    return shutil.copytree(toy_run, tmp_path / "run")
