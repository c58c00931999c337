# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What README and family page say is what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from clustvit_ros.networks import load_config
from clustvit_ros.policy.parameters import PARAMETERS, as_markdown_table, camera_markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_main_parameters_are_declared_as_the_table_says_and_all_are_in_the_reference():
    declared = as_markdown_table().strip()
    rows = [line for line in section("Parameters").splitlines() if line.startswith("|")]
    assert len(rows) > 8 and set(rows) <= set(declared.splitlines())
    assert declared in (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def test_camera_parameter_table_is_the_declared_one():
    assert camera_markdown_table().strip() in (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def test_the_readme_is_short_and_its_pictures_are_light():
    assert len(README.splitlines()) <= 160
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / name).stat().st_size < 3_000_000


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
        terms, licence = row.strip("| ").rpartition("|")[2], load_config(model).licence
        for word in ("Apache-2.0", "non-commercial", "research"):
            assert (word in terms) == (word in licence), f"{model.name}: {terms} for {licence}"
        assert (model / "README.md").is_file()


@pytest.mark.parametrize("path", re.findall(r"`((?:config|scripts|test)/[\w/.]+)`", README))
def test_what_the_readme_points_to_exists(path):
    assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("family_table", ROOT / "scripts" / "family_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(name):
    page = (ROOT / "docs" / "family.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)[1].splitlines()


def test_operations_are_the_published_ones_within_half_a_percent(script):
    assert table("published") == script.published()
    for row in table("published")[2:]:
        title, difference, source = (row.split("|")[column].strip() for column in (1, 6, 8))
        if (title, source) != ("ViT-B, UPerNet", "SUIM"):  # 384.24 for 348.24: see the page
            assert abs(float(difference.rstrip("%"))) < 0.5, row


def test_sizes_are_what_the_script_counts(script):
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table("sizes")[2:]]
    assert len(rows) == 24
    for name, head, side, parameters, gflops, kept, merged, _ in (rows[1], rows[15]):
        size = next(key for key, value in script.NAMES.items() if name == f"ClustViT-{value}")
        network = {"head": head.lower(), **({"cluster_mlp_dim": 3072} if head == "UPerNet" else {})}
        pixels = int(side.split()[0])
        full = script.cost(f"clustvit_{size}", network, 150, pixels)
        fewer = script.cost(f"clustvit_{size}", network, 150, pixels, int(kept.split()[0]))
        assert (f"{full.parameters / 1e6:.2f}", f"{full.flops / 1e9:.1f}") == (parameters, gflops)
        assert f"{fewer.flops / 1e9:.1f}" == merged
