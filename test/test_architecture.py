# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Which room may import which, read from the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "clustvit_ros"
FOUNDATION = {
    "errors", "config", "paths", "classes", "images", "compressed_images", "jpeg", "dds", "download", "released",
}  # fmt: skip
# The document is the rule: room -> rooms that it may import.
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
ALLOWED = {
    room: set(re.findall(r"`(\w+)`", allowed))
    for room, allowed in re.findall(r"^\| `(\w+)/` \|[^|]*\| ([^|]*) \|$", PAGE, re.M)
}
ROS_PACKAGES = {
    "rclpy", "sensor_msgs", "std_msgs", "diagnostic_msgs", "rcl_interfaces", "lifecycle_msgs", "vision_msgs",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]


def test_the_document_lists_the_rooms_and_foundations_that_there_are():
    assert set(ALLOWED) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == FOUNDATION
    assert all(f"`{name}`" in PAGE for name in FOUNDATION)
    for name in re.findall(rf"\b(?:{'|'.join(ALLOWED)})/\w+\.py\b", PAGE):
        assert (PACKAGE / name).exists(), name


def test_the_house_is_as_small_as_it_claims():
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) <= 144
    root = PACKAGE.parent
    files += [path for room in ("launch", "scripts", "test") for path in (root / room).rglob("*.py")]
    assert {path.name for path in files if len(path.read_text().splitlines()) > 400} == set()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(PACKAGE).parts[0]
    allowed = ALLOWED[room] | FOUNDATION | {room}
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "clustvit_ros" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in allowed, f"{room} must not import {name}"
        if room not in ("node", "demo"):
            assert parts[0] not in ROS_PACKAGES, f"{room} must not import {name}: rclpy belongs to node/ and demo/"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("[!_]*.py")), ids=lambda path: path.name)
def test_foundation_imports_no_room(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "clustvit_ros" and len(parts) > 1:
            assert parts[1] in FOUNDATION
        assert parts[0] not in ROS_PACKAGES | {"torch"}


def test_importing_the_package_loads_neither_torch_nor_rclpy():
    code = "import sys, clustvit_ros; sys.exit(bool({'torch', 'rclpy', 'cv2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_node_is_there_before_pytorch_is():
    """Importing PyTorch takes more than a second, which a node that starts anew after a fault does not have."""
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    code = "import sys, clustvit_ros.node.node, clustvit_ros.demo.camera; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_scripted_engine_needs_no_torch():
    code = (
        "import sys; from clustvit_ros.engine import create_engine; create_engine('', 'scripted');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_policy_has_no_device_and_no_ros():
    for path in (PACKAGE / "policy").glob("*.py"):
        assert not {"torch", "cv2", "rclpy"} & {name.split(".")[0] for name in imports(path)}
