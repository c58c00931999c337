# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What the node may do, and what it does: SROS 2 policy, sockets, files, user."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray
from robot import header
from sensor_msgs.msg import Image

from clustvit_ros.classes import ClassSet
from clustvit_ros.dds import claim_domain, node_environment
from clustvit_ros.node.messages import image_message
from clustvit_ros.paths import share_dir, temporary_cache_dir

POLICY = share_dir() / "config" / "security" / "segmentation.policy.xml"
# Children and attributes of each element in sros2's policy schema, version 0.2.0.
SCHEMA = {
    "policy": ({"enclaves"}, {"version"}), "enclaves": ({"enclave"}, set()), "enclave": ({"profiles"}, {"path"}),
    "profiles": ({"profile"}, {"type"}), "profile": ({"topics", "services", "actions"}, {"ns", "node"}),
    "topics": ({"topic"}, {"publish", "subscribe"}), "services": ({"service"}, {"reply", "request"}),
    "topic": (set(), set()), "service": (set(), set()),
}  # fmt: skip
# In the policy, but there only with certain parameters or packages.
OPTIONAL = {
    "/image", "/image/compressed", "/image_raw", "/image_raw/compressed", "/camera_info", "/points", "/depth", "/clock",
    "/segmentation/mask/compressed", "/segmentation/label_info", "/segmentation/camera_info",
    "/segmentation/get_type_description",
}  # fmt: skip


def granted(kind: str, right: str) -> set[str]:
    """Resolved names that the policy grants `right` to."""
    names: set[str] = set()
    for profile in ElementTree.parse(POLICY).getroot().iter("profile"):
        space = profile.attrib["ns"].rstrip("/") + "/"
        for group in profile.findall(kind):
            if group.attrib.get(right) == "ALLOW":
                for item in group:
                    text = item.text or ""
                    name = text if text.startswith("/") else space + text
                    names.add(f"{space}{profile.attrib['node']}{text[1:]}" if text.startswith("~") else name)
    return names


def test_policy_follows_the_schema() -> None:
    root = ElementTree.parse(POLICY).getroot()
    assert (root.tag, root.attrib["version"]) == ("policy", "0.2.0")
    for element in root.iter():
        children, attributes = SCHEMA[element.tag]
        assert {child.tag for child in element} <= children
        assert set(element.attrib) <= attributes
        assert all(
            value == "ALLOW" for key, value in element.attrib.items() if key in ("publish", "subscribe", "reply")
        )
    assert not granted("services", "request"), "the node calls nobody"


def test_policy_is_valid_for_sros2() -> None:
    policy = pytest.importorskip("sros2.policy", reason="needs sros2")
    assert policy.load_policy(POLICY) is not None


def used(client: Any, namespace: str) -> dict[tuple[str, str], set[str]]:
    """Names that the node in a namespace uses, by kind and right, as they would be without the namespace."""
    listed = {
        ("topics", "publish"): client.node.get_publisher_names_and_types_by_node,
        ("topics", "subscribe"): client.node.get_subscriber_names_and_types_by_node,
        ("services", "reply"): client.node.get_service_names_and_types_by_node,
        ("services", "request"): client.node.get_client_names_and_types_by_node,
    }
    return {
        right: {name.removeprefix(namespace) for name, _types in names_and_types("segmentation", namespace)}
        for right, names_and_types in listed.items()
    }


@pytest.mark.ros
def test_policy_grants_what_a_running_node_uses_and_no_more(ros_client: Any, start_node: Any) -> None:
    def not_used() -> set[tuple[str, str, str]]:
        uses = used(ros_client, namespace)
        for right, names in uses.items():
            assert names <= granted(*right), f"{right}: not granted"
        return {(*right, name) for right in uses for name in granted(*right) - uses[right] - OPTIONAL}

    missing: set[tuple[str, str, str]] = set()
    # Discovery brings endpoints one by one, and on a busy machine it may lose one of them for good: three nodes get the
    # chance to be seen whole, each in a namespace that no other node has ever had.
    for namespace in ("/first", "/second", "/third"):
        process = start_node("node.node", "-r", f"__ns:={namespace}", "-p", "engine:=scripted")
        process.wait_for_output("active:")
        deadline_s = time.monotonic() + 30.0
        while time.monotonic() < deadline_s:
            ros_client.spin_for(1.0)
            if ("segmentation", namespace) not in ros_client.node.get_node_names_and_namespaces():
                continue
            missing = not_used()
            if not missing:
                ros_client.spin_for(1.0)  # what is used without a grant may be seen last
                assert not not_used()
                assert process.stop() == 0
                return
        process.stop()
    pytest.fail(f"granted, but not used: {missing or 'the node was not seen at all'}")


def sockets_of(pid: int) -> dict[str, int]:
    """How many sockets of each protocol a process holds; TCP ones that listen count as `listen`."""
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(handle) if handle.is_symlink() else ""
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    counts = {"tcp": 0, "udp": 0, "listen": 0}
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes:
                counts[protocol[:3]] += 1
                counts["listen"] += protocol.startswith("tcp") and fields[3] == "0A"
    return counts


@pytest.fixture
def bare_node() -> Iterator[int]:
    """The process id of an rclpy node that does nothing."""
    code = "import rclpy; rclpy.init(); node = rclpy.create_node('bare'); print('ready', flush=True); rclpy.spin(node)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=node_environment(os.environ), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and "ready" in process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.mark.ros
def test_the_node_opens_no_port_of_its_own(start_node: Any, bare_node: int) -> None:
    process = start_node("node.node", "-p", "engine:=scripted")
    process.wait_for_output("active:")
    own = sockets_of(process.pid)
    assert own["listen"] == 0
    assert own == sockets_of(bare_node), "more sockets than rclpy itself opens"
    assert process.stop() == 0


# Runs the node and writes down every file that Python opens for writing, makes, moves or deletes.
WATCHED = """
import runpy, sys
log = open(sys.argv.pop(1), "w", buffering=1)
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        if isinstance(arguments[1], str) and set(arguments[1]) & set("wax+") or (arguments[2] or 0) & 3:
            log.write(f"{arguments[0]!s}\\n")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "shutil.rmtree"):
        log.write(f"{arguments[0]!s}\\n")
sys.addaudithook(watch)
sys.argv[0] = "node"
open(sys.argv.pop(1), "w").close()  # what the watch must see; a calibration is kept only where nothing else computes
runpy.run_module("clustvit_ros.node.node", run_name="__main__")
"""


@pytest.mark.ros
def test_files_are_written_below_the_cache_folder_only(
    ros_client: Any, tmp_path: Path, make_toy_model: Any, rng: np.random.Generator
) -> None:
    model, probe = make_toy_model(ClassSet.numbered(3)), tmp_path / "cache" / "clustvit_ros" / "probe"
    probe.parent.mkdir(parents=True)
    for name in ("home", "work", "tmp"):
        (tmp_path / name).mkdir()
    environ = {
        **node_environment(os.environ), "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"), "ROS_LOG_DIR": str(tmp_path / "log"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # PyTorch sets it for its children when this process imports it
    arguments = ["--ros-args", "-r", "__ns:=/files", "-p", f"model:={model}", "-p", "device:=cpu"]
    arguments += ["-p", "latency_budget_ms:=1000.0"]
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(tmp_path / "opened.txt"), str(probe), *arguments], env=environ,
        cwd=tmp_path / "work", stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        masks = ros_client.collect(Image, "/files/segmentation/mask")
        camera = ros_client.image_publisher("/files/image")
        pixels = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
        stats = ros_client.collect(DiagnosticArray, "/files/segmentation/stats")

        def calibrated() -> bool:
            return bool(masks) and any(pair.key == "slowdown" for pair in stats[-1].status[0].values)

        ros_client.send_until(
            camera, image_message(pixels, "rgb8", header(5)), lambda: bool(stats) and calibrated(),
            "a mask after calibration",
        )  # fmt: skip
    finally:
        process.terminate()
        assert process.wait(20.0) == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "opened.txt"]
    allowed = (tmp_path / "cache" / "clustvit_ros", tmp_path / "log")
    assert all(any(folder in path.parents for folder in allowed) for path in written), written
    opened = [Path(line) for line in (tmp_path / "opened.txt").read_text().splitlines() if not line.isdigit()]
    # Leftovers of killed processes are deleted there.
    strangers = [path for path in opened if tmp_path / "cache" not in (path, *path.parents)]
    strangers = [path for path in strangers if Path("/dev") not in path.parents]
    assert not strangers
    assert probe in opened, "the watch sees what is written"


@pytest.mark.ros
def test_no_root_is_needed(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("is not root, so every other test shows it")
    tmp_path.chmod(0o777)
    environ = {
        **node_environment(os.environ), "HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent/cache",
        "ROS_LOG_DIR": str(tmp_path), "ROS_DOMAIN_ID": str(claim_domain()),
    }  # fmt: skip
    command = [sys.executable, "-m", "clustvit_ros.node.node", "--ros-args", "-p", "engine:=scripted"]
    try:
        process = subprocess.Popen(
            command, env=environ, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            user=65534, group=65534, extra_groups=[],
        )  # fmt: skip
    except PermissionError:
        pytest.skip("this checkout or its Python is root's alone")
    try:
        assert process.stdout is not None
        lines: list[str] = []
        deadline_s = time.monotonic() + 20.0
        while time.monotonic() < deadline_s and not any("active:" in line for line in lines):
            line = process.stdout.readline()
            if not line:
                break
            lines.append(line)
        if any("Permission denied" in line or "No module named" in line for line in lines):
            pytest.skip("this checkout is root's alone")
        assert any("active:" in line for line in lines), "".join(lines)
    finally:
        process.terminate()
        process.wait(20.0)
    assert process.returncode == 0


@pytest.mark.ros
@pytest.mark.parametrize(
    ("engine", "kind"),
    [("torch", "under a file"), ("torch", "dangling link"), ("torch", "no such folder"),
     ("onnxruntime", "under a file")],
)  # fmt: skip
def test_a_home_that_cannot_be_written_hinders_no_engine(
    start_node: Any, make_toy_model: Any, tmp_path: Path, engine: str, kind: str
) -> None:
    toy_model = make_toy_model(ClassSet.numbered(3))
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    (tmp_path / "tmp").mkdir()
    home = {"under a file": "/dev/null/home", "dangling link": f"{tmp_path}/dangling", "no such folder": "/proc/home"}
    # Whatever names another place would hide what is tested.
    given = {"HOME": home[kind], "TMPDIR": f"{tmp_path}/tmp", "XDG_CACHE_HOME": "", "ROS_LOG_DIR": "", "ROS_HOME": "",
             "TORCHINDUCTOR_CACHE_DIR": ""}  # fmt: skip
    process = start_node(
        "node.node", "-p", f"engine:={engine}", "-p", f"model:={toy_model}", "-p", "device:=cpu", environ=given
    )
    process.wait_for_output("active:")
    temporary = tmp_path / "tmp" / f"clustvit_ros-{os.getuid()}"
    assert f"exported files are kept in {temporary}" in process.output
    assert "no log file is written (failed to initialize logging: Failed to create log directory" in process.output
    assert bool(list(temporary.rglob("*.onnx"))) == (engine == "onnxruntime")
    assert temporary.stat().st_mode & 0o077 == 0
    assert process.stop() == 0


def test_a_temporary_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = tmp_path / f"clustvit_ros-{os.getuid()}"
    (tmp_path / "theirs").mkdir()
    for plant in (lambda: planted.symlink_to(tmp_path / "theirs"), lambda: planted.mkdir(0o777)):
        plant()
        planted.is_symlink() or planted.chmod(0o777)
        folder = temporary_cache_dir()
        assert folder.is_dir() and folder != planted and folder.stat().st_mode & 0o077 == 0
        planted.unlink() if planted.is_symlink() else planted.rmdir()
    assert temporary_cache_dir() == planted


def test_onnx_runtime_tells_nobody(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")
    environ = {key: value for key, value in os.environ.items() if key not in ("CI", "XDG_CACHE_HOME")}
    code = "from clustvit_ros.engine.onnx_session import import_onnxruntime; import_onnxruntime().get_device()"
    subprocess.run([sys.executable, "-c", code], env={**environ, "HOME": str(tmp_path)}, check=True, timeout=60)
    assert not list(tmp_path.rglob("*")), "it keeps an identifier of the device, and sends what it knows"
