# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What an installation puts where ROS 2 and pip users look for it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXECUTABLES = ("segmentation_node", "camera_node", "clustvit-ros")
ON_PATH = ("clustvit_segmentation_node", "clustvit_camera_node", "clustvit-ros")
"""Others may have a camera_node, too."""
SHIPPED = sorted((ROOT / "models").glob("*/model.safetensors"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git would hand out: building in the checkout would leave build/ behind."""
    source = tmp_path_factory.mktemp("source") / "clustvit_ros"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        check=True,
    )  # fmt: skip
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
            (source / name).chmod((ROOT / name).stat().st_mode)
    return source


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, source):
    """The package installed with pip, as a user would, but without its dependencies."""
    target = tmp_path_factory.mktemp("prefix")
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
    small = {path.parent.name for path in SHIPPED if path.stat().st_size < 13_000_000}
    assert {path.parent.name for path in (share / "models").glob("*/*")} == small
    assert sum(path.stat().st_size for path in prefix.rglob("*") if path.is_file()) < 40_000_000


def test_executables_are_on_the_path_and_where_ros2_run_looks(prefix):
    for folder, names in (("bin", ON_PATH), ("lib/clustvit_ros", EXECUTABLES)):
        for name in names:
            assert os.access(prefix / folder / name, os.X_OK), f"{folder}/{name}"
    assert {path.name for path in (prefix / "bin").iterdir()} == set(ON_PATH)
    assert all(first_line(prefix / "bin" / name) == f"#!{sys.executable}" for name in ON_PATH)


def with_first(folder):
    """The environment, a folder before what ROS 2's setup.bash has put on the path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def first_line(path):
    return path.read_text().splitlines()[0]


def test_what_setup_py_installs_runs_in_the_virtual_environment_that_is_active(tmp_path, source):
    """The command that `colcon build` uses; with `develop`, what is left are the scripts among the data files."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build"), "install", "--prefix",
         str(tmp_path / "install"), "--install-scripts", str(tmp_path / "install/lib/clustvit_ros"), "--record",
         str(tmp_path / "record"), "--single-version-externally-managed"],
        cwd=source, check=True, env=with_first(tmp_path), capture_output=True,
    )  # fmt: skip
    for name in EXECUTABLES:
        assert os.access(tmp_path / "install/lib/clustvit_ros" / name, os.X_OK)
        assert first_line(tmp_path / "install/lib/clustvit_ros" / name) == "#!/usr/bin/env python3"
        assert first_line(ROOT / "scripts/ros" / name) == "#!/usr/bin/env python3"
    models = (tmp_path / "install/share/clustvit_ros/models").glob("*/model.safetensors")
    assert {path.parent.name for path in models} == {path.parent.name for path in SHIPPED}


@pytest.mark.skipif(shutil.which("colcon") is None, reason="colcon is not installed")
@pytest.mark.parametrize("how", [[], ["--symlink-install"]])
def test_colcon_builds_executables_for_the_environment_that_is_active(tmp_path, source, how):
    shutil.copytree(source, tmp_path / "src" / "clustvit_ros")
    environ = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    for _ in range(2):  # what is there already must not be put back
        done = subprocess.run(["colcon", "build", *how], cwd=tmp_path, capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "install/clustvit_ros/lib/clustvit_ros"
    assert set(EXECUTABLES) <= {path.name for path in folder.iterdir()} <= {*EXECUTABLES, *ON_PATH}
    assert all(os.access(path, os.X_OK) and first_line(path) == "#!/usr/bin/env python3" for path in folder.iterdir())
    assert not (tmp_path / "install/clustvit_ros/bin").exists()


def test_the_installed_package_finds_its_own_share(prefix, tmp_path):
    site = next(prefix.glob("lib/python*/site-packages"))
    code = "from clustvit_ros.paths import share_dir; print(share_dir())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=with_first(site), capture_output=True,
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


@pytest.fixture
def set_up(tmp_path):
    """Runs scripts/set_up.sh on an environment whose Python only notes what it is asked to do."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        'case "$*" in *"import torch"*) exit 1;; *version_info*) echo 3.11;; esac\n'
    )
    python.chmod(0o755)

    def run(**given):
        bare = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        environ = {**bare, "TORCH": "torch==2.13.0", **given}
        command = ["bash", str(ROOT / "scripts" / "set_up.sh"), str(tmp_path / ".venv"), "ros,test"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return done, (tmp_path / "asked").read_text()

    return run


@pytest.mark.skipif(
    platform.machine() != "x86_64" or Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None,
    reason="needs an x86-64 machine without an NVIDIA driver",
)
def test_gigabytes_for_a_gpu_that_is_not_there_are_announced_before_they_come(set_up):
    done, asked = set_up()
    assert done.returncode == 0, done.stderr
    offer = done.stdout.index("TORCH_INDEX=https://download.pytorch.org/whl/cpu")
    assert "5.8 GB" in done.stdout and offer < done.stdout.index("installing torch==2.13.0")
    assert "--index-url" not in asked and "install --disable-pip-version-check -e .[ros,test]" in asked


def test_the_chosen_torch_and_its_index_are_installed_and_kept(set_up, tmp_path):
    done, asked = set_up(TORCH="torch==2.9.1", TORCH_INDEX="https://example.org/cpu")
    assert done.returncode == 0 and "5.8 GB" not in done.stdout
    assert "--index-url https://example.org/cpu torch==2.9.1" in asked
    assert (tmp_path / ".venv" / ".torch").read_text() == "torch==2.9.1\n"


def test_another_python_than_the_environment_s_is_refused(set_up, tmp_path):
    other = tmp_path / "python3.12"
    other.write_text("#!/bin/sh\necho 3.12\n")
    other.chmod(0o755)
    done, asked = set_up(PYTHON=str(other))
    assert done.returncode == 1 and "has Python 3.11" in done.stderr and "make clean" in done.stderr
    assert "pip install" not in asked


def test_a_python_that_is_too_new_is_refused_with_a_word(tmp_path):
    other = tmp_path / "python3.14"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "find_python.sh"), str(other)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "Needed: Python 3.10 to 3.13" in done.stderr


def test_package_xml_names_what_is_imported():
    """Of ROS's packages; some come with others, and rosdep has no key for PyTorch."""
    declared = {element.text for element in ET.parse(ROOT / "package.xml").getroot().findall("exec_depend")}
    sources = [path for room in ("clustvit_ros", "launch") for path in (ROOT / room).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M))
    ros = {name for name in imported if re.fullmatch(r"rclpy|launch|launch_ros|\w+_msgs|\w+_interfaces", name)}
    assert ros <= declared | {"builtin_interfaces"}
    assert {name for name in declared if name and not name.startswith("python3-")} <= ros
