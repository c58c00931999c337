# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""ROS 2's linters find nothing, where they are installed: `ament_flake8` takes its settings from setup.cfg."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Docstrings are Google's, with what differs on purpose: nouns say what a thing is (D401), names of products keep their
# letters (D403), and what a name or type says is not said again (D1, D417).
PEP257 = ["--convention", "google", "--add-ignore", *(f"D10{n}" for n in range(8)), "D401", "D403", "D417"]


def tracked(*patterns: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


@pytest.mark.parametrize(
    ("linter", "options", "patterns"),
    [
        ("ament_copyright", [], ["*.py"]),
        ("ament_flake8", ["--config", "setup.cfg"], ["*.py"]),
        ("ament_pep257", PEP257, ["*.py"]),
        ("ament_xmllint", [], ["*.xml"]),
    ],
)
def test_ament_linters_find_nothing(linter, options, patterns, monkeypatch, capsys):
    main = pytest.importorskip(f"{linter}.main", reason=f"needs {linter}, of a ROS 2 installation").main
    if linter == "ament_xmllint" and shutil.which("xmllint") is None:
        pytest.skip("needs xmllint")
    monkeypatch.chdir(ROOT)
    code = main([*tracked(*patterns), *options])
    assert code == 0, capsys.readouterr()
