# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`scripts/frame_trace.py`: what it counts, and that a frame's way is as short as the design says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "frame_trace.py"
sys.path.insert(0, str(SCRIPT.parent))
from frame_trace import Call, as_tree, count  # noqa: E402 (a script, no package)

CALLS = [
    Call(1, "node/camera.py", "_on_image", 0), Call(1, "engine/worker.py", "put", 1),
    Call(2, "node/frame.py", "handle", 0), Call(2, "images.py", "decode_image", 1),
    Call(2, "node/frame.py", "_publish", 1), Call(2, "node/frame.py", "_publish", 1),
]  # fmt: skip


def test_files_rooms_and_threads_are_counted():
    assert count(CALLS) == {"files": 4, "functions": 5, "calls": 6, "room_changes": 4, "hand_overs": 1}
    assert as_tree(CALLS, 5).splitlines()[2:] == [
        "--- another thread", "node/frame.py: handle", "  images.py: decode_image", "  node/frame.py: _publish x 2"
    ]  # fmt: skip


@pytest.mark.ros
@pytest.mark.parametrize(
    ("budget_ms", "files", "room_changes"),
    [("0", "25", "20"), pytest.param("60000", "27", "27", marks=pytest.mark.slow)],
)
def test_a_frame_goes_a_short_way(tmp_path, budget_ms, files, room_changes):
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    pytest.importorskip("torch", reason="needs PyTorch")
    pytest.importorskip("panda3d", reason="needs the simulated camera")
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "trace.json"), "--max-files", files]
    command += ["--max-room-changes", room_changes, "--max-hand-overs", "1", "--budget-ms", budget_ms]
    command += ["--frames", "60" if budget_ms != "0" else "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    counts = json.loads((tmp_path / "trace.json").read_text())
    assert counts["hand_overs"] == 1 and counts["calls"] > 100
    assert {"node/frame.py", "policy/policy.py", "engine/worker.py"} <= set(counts["by_file"])
