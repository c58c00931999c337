# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The made-up data set of `toys`, recipes for it, and runs of them."""

from __future__ import annotations

import contextlib
import copy
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from toys import RECIPE, write_split

from clustvit_ros.cli.main import main


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
