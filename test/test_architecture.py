"""Which room may import which, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "clustvit_ros"
FOUNDATION = {
    "errors",
    "config",
    "classes",
    "paths",
    "dds",
    "image_files",
    "image_encodings",
    "compressed_images",
    "shared_memory",
    "openmp",
}
ALLOWED = {
    "modeling": set(),
    "training": {"modeling"},
    "runtime": {"modeling"},
    "control": set(),
    "ros": {"runtime", "control", "sim"},
    "sim": set(),
    "bags": {"runtime"},
    "cli": {"modeling", "training", "runtime", "control", "sim", "bags"},
}
ROS_PACKAGES = {
    "rclpy",
    "sensor_msgs",
    "std_msgs",
    "diagnostic_msgs",
    "rcl_interfaces",
    "lifecycle_msgs",
    "vision_msgs",
}


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


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(PACKAGE).parts[0]
    allowed = ALLOWED[room] | FOUNDATION | {room}
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "clustvit_ros" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in allowed, f"{room} must not import {name}"
        if room != "ros":
            assert parts[0] not in ROS_PACKAGES, f"{room} must not import {name}: rclpy belongs to ros/"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
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
    code = "import sys, clustvit_ros.ros.node, clustvit_ros.ros.camera; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_scripted_engine_needs_no_torch():
    code = (
        "import sys; from clustvit_ros.runtime import create_engine; create_engine('', 'scripted');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_control_is_pure():
    for path in (PACKAGE / "control").glob("*.py"):
        assert not {"torch", "cv2", "rclpy", "time"} & {name.split(".")[0] for name in imports(path)}
