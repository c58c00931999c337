# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The script that shows a budget holding, with an engine whose latency is scripted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'train'")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "budget_step.py"


@pytest.mark.slow
@pytest.mark.ros
def test_a_budget_of_60_percent_holds_and_comes_back_after_load(tmp_path: Path) -> None:
    arguments = [
        "--engine", "scripted", "--load-s", "6", "--json", tmp_path / "step.json", "--plot", tmp_path / "step.png",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=os.environ, text=True, capture_output=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "step.json").read_text())
    assert all(result["checks"].values())
    assert result["settled_p95_ms"] <= result["budget_ms"] == pytest.approx(0.6 * result["full_ms"], abs=0.1)
    kept = {
        phase: {entry["capacity"] for entry in result["series"] if entry["phase"] == phase}
        for phase in ("full", "budget")
    }
    assert max(kept["budget"]) < min(kept["full"])
    assert (tmp_path / "step.png").stat().st_size > 10_000
