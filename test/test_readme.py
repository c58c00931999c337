# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The README is the contract: its tables are held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clustvit_ros.networks import load_config
from clustvit_ros.policy.parameters import PARAMETERS, as_markdown_table, camera_markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_parameter_table_is_the_declared_one():
    assert as_markdown_table().strip() in section("Parameters")


def test_camera_parameter_table_is_the_declared_one():
    assert camera_markdown_table().strip() in section("Several cameras")


def test_parameter_file_sets_only_declared_parameters_to_their_defaults():
    import yaml

    content = yaml.safe_load((ROOT / "config" / "segment.yaml").read_text())["/**"]["ros__parameters"]
    defaults = {spec.name: spec.default for spec in PARAMETERS}
    assert content.items() <= defaults.items()


def test_models_table_states_what_the_models_state():
    table = section("Models")
    models = sorted(path.parent for path in (ROOT / "models").glob("*/model.yaml"))
    assert models, "no model is shipped"
    for model in models:
        row = next((line for line in table.splitlines() if line.startswith(f"| [`{model.name}`]")), None)
        assert row is not None, f"{model.name} is missing from the README's models"
        assert f"{load_config(model).scores['miou']:.1f}" in row
        assert (model / "README.md").is_file()


@pytest.mark.parametrize(
    "path", re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"`((?:config|scripts|test)/[\w/.]+)`", README)
)
def test_what_the_readme_points_to_exists(path):
    assert (ROOT / path).exists(), path
