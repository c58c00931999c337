# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What an installation puts where ROS 2 and pip users look for it."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXECUTABLES = ("segmentation_node", "camera_node")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """The package installed with pip, as a user would, but without its dependencies."""
    target = tmp_path_factory.mktemp("prefix")
    source = tmp_path_factory.mktemp("source") / "clustvit_ros"
    # A copy of what git would hand out: building in the checkout would leave build/ behind.
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        check=True,
    )  # fmt: skip
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
            (source / name).chmod((ROOT / name).stat().st_mode)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--ignore-installed",
         "--prefix", str(target), str(source)],
        check=True,
    )  # fmt: skip
    return target


def test_shared_files_lie_where_ros_looks(prefix):
    share = prefix / "share" / "clustvit_ros"
    for name in ("package.xml", "launch/segment.launch.py", "config/segment.yaml", "config/fastdds_shm.xml"):
        assert (share / name).is_file(), name
    assert (prefix / "share/ament_index/resource_index/packages/clustvit_ros").is_file()
    assert {path.parent.name for path in (ROOT / "models").glob("*/model.yaml")} == {
        path.parent.name for path in (share / "models").glob("*/model.safetensors")
    }


def test_executables_are_on_the_path_and_where_ros2_run_looks(prefix):
    for name in EXECUTABLES:
        for folder in ("bin", "lib/clustvit_ros"):
            assert os.access(prefix / folder / name, os.X_OK), f"{folder}/{name}"
    assert os.access(prefix / "bin/clustvit-ros", os.X_OK)


def test_the_installed_package_finds_its_own_share(prefix, tmp_path):
    site = next(prefix.glob("lib/python*/site-packages"))
    code = "from clustvit_ros.paths import share_dir; print(share_dir())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(prefix / "share" / "clustvit_ros"), found.stderr


def test_package_xml_agrees_with_setup_py():
    package = ET.parse(ROOT / "package.xml").getroot()
    assert package.get("format") == "3"
    assert package.findtext("license") == "Apache-2.0"
    assert "@" in package.find("maintainer").get("email")
    version = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert version.stdout.split()[-1] == package.findtext("version")
    assert package.findtext("export/build_type") == "ament_python"


def test_no_machine_or_workplace_in_tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".xml", ".sh", ".toml", ".cfg", ""} and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert "/" + "work/" not in text and "/" + "root/" not in text, name
