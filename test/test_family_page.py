# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The comparison page, and the published figures it stands on."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
