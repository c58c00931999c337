# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What `clustvit-ros doctor` finds around the node: shared memory, DDS profile, socket buffers, packages, the camera.

Nothing here imports what it examines: a broken package must not take the doctor with it.
"""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clustvit_ros.dds import (
    IMAGE_TOPIC,
    PROFILE_VARIABLES,
    SHARED_MEMORY,
    dds_environment,
    find_leftovers,
    node_environment,
)
from clustvit_ros.paths import share_dir


class Level(str, enum.Enum):
    """How bad a finding is."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        check: what was looked at, e.g. "shared memory".
        level: how bad it is.
        finding: what was found, in a sentence.
        remedy: what to do; empty only where nothing is wrong.
    """

    check: str
    level: Level
    finding: str
    remedy: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", Level(self.level))
        if self.level is not Level.OK and not self.remedy:
            raise ValueError(f"{self.check}: a finding of level {self.level.value} needs a remedy")


def as_text(findings: Sequence[Finding]) -> str:
    """A list for people."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.value:5}{finding.check}: {finding.finding}")
        if finding.remedy:
            lines.append(f"       -> {finding.remedy}")
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    lines.append(", ".join(f"{count} {level.value}" for level, count in counts.items()))
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """The same for programs: `ok`, and `findings` with check, level, finding and remedy."""
    content = {
        "ok": not any(finding.level is Level.FAIL for finding in findings),
        "findings": [{**asdict(finding), "level": finding.level.value} for finding in findings],
    }
    return json.dumps(content, indent=1)


# A participant with this package's profile takes 32 MB; camera, node and consumer are three.
_SEGMENT_MB, _SHARED_MEMORY_MB = 34, 128
# A full-HD colour image in UDP fragments; Linux starts with 212,992 bytes.
_SOCKET_BUFFER_BYTES = 8 << 20
_IMAGE_BYTES = 1920 * 1080 * 3


# Module, what people call it, its packages on PyPI (the one to install first), its Debian package.
_PACKAGES: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("numpy", "NumPy", ("numpy",), "python3-numpy"),
    ("cv2", "OpenCV", ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless"), "python3-opencv"),
    ("yaml", "PyYAML", ("pyyaml",), "python3-yaml"),
    ("safetensors", "safetensors", ("safetensors",), ""),
    ("simplejpeg", "simplejpeg", ("simplejpeg",), ""),
)


def check_packages(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> list[Finding]:
    """Python, and what the node cannot do without: each is imported in a process of its own, beside the others."""
    findings = [Finding("python", Level.OK, f"{platform.python_version()} on {_machine_name()}, {platform.machine()}")]
    with ThreadPoolExecutor() as pool:
        return findings + list(pool.map(lambda package: _check_import(package, run), _PACKAGES))


def _check_import(
    package: tuple[str, str, tuple[str, ...], str], run: Callable[..., subprocess.CompletedProcess[str]]
) -> Finding:
    module, title, names, debian = package
    if module == "simplejpeg" and importlib.util.find_spec(module) is None:
        told = "is not installed: damaged JPEG frames cannot be told from good ones"
        return Finding(title, Level.WARN, told, "pip install simplejpeg")
    if importlib.util.find_spec(module) is None:
        apt = f"apt install {debian}, or " if debian else ""
        return Finding(title, Level.FAIL, "is not installed", f"{apt}pip install {names[0]}")
    code = f"import {module}; print({module}.__version__)"
    try:
        done = run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        remedy = f"pip install --force-reinstall {names[0]}"
        return Finding(title, Level.FAIL, "is not loaded within a minute", remedy)
    if done.returncode == 0:
        return Finding(title, Level.OK, done.stdout.strip())
    reason = (done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"])[-1]
    return Finding(title, Level.FAIL, f"cannot be imported: {reason}", import_remedy(done.stderr, names[0]))


def import_remedy(said: str, package: str) -> str:
    """What helps against an import that fails.

    Args:
        said: the error, with what was printed before it.
        package: name on PyPI of what was imported.
    """
    if re.search(r"NumPy 1\.x|_ARRAY_API|numpy\.core\.multiarray|numpy\.dtype size changed|numpy\._core", said):
        return f"it was built for another NumPy: pip install --upgrade {package}, or pip install 'numpy<2'"
    library = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object", said)
    if library and package.startswith("opencv"):
        return (
            "pip uninstall opencv-python opencv-contrib-python, then pip install 'opencv-python-headless<5' (needs no "
            f"screen), or apt install libgl1 libglib2.0-0 ({library[1]})"
        )
    if library:
        return f"install the library {library[1]}, or another build: pip install --force-reinstall {package}"
    missing = re.search(r"No module named '([\w.]+)'", said)
    if missing:
        return f"pip install {missing[1].partition('.')[0]}"
    return f"pip install --force-reinstall {package}"


def check_cv_bridge(
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run, present: bool | None = None
) -> list[Finding]:
    """cv_bridge's compiled part breaks under NumPy 2; this package does without, others may not."""
    present = importlib.util.find_spec("cv_bridge") is not None if present is None else present
    if not present:
        return [Finding("cv_bridge", Level.OK, "is not installed, and is not needed")]
    code = (
        "from cv_bridge import CvBridge; from sensor_msgs.msg import Image;"
        "CvBridge().imgmsg_to_cv2(Image(height=1, width=1, step=3, encoding='rgb8', data=[1, 2, 3]), 'bgr8')"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 0:
        return [Finding("cv_bridge", Level.OK, "converts an image")]
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return [
        Finding(
            "cv_bridge", Level.WARN, f"does not work with NumPy {_version(('numpy',)) or '?'}: {reason}",
            "this node decodes images without it; for other nodes: pip install 'numpy<2', or build vision_opencv anew",
        )
    ]  # fmt: skip


def check_shared_memory(folder: Path = SHARED_MEMORY) -> list[Finding]:
    """Room for Fast DDS's segments, and what killed processes left there."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return [
            Finding(
                "shared memory", Level.FAIL, f"{folder} cannot be used ({error.strerror})",
                "mount it: mount -t tmpfs -o size=512m tmpfs /dev/shm; in Docker: --shm-size=512m",
            )
        ]  # fmt: skip
    total_mb, free_mb = (status.f_frsize * blocks / 1e6 for blocks in (status.f_blocks, status.f_bavail))
    size = f"{folder} has {free_mb:.0f} MB free of {total_mb:.0f} MB"
    grow = "mount -o remount,size=512m /dev/shm; in Docker: --shm-size=512m"
    if free_mb < _SEGMENT_MB:
        findings = [Finding("shared memory", Level.FAIL, f"{size}: too little for one more ROS process", grow)]
    elif total_mb < _SHARED_MEMORY_MB:
        findings = [Finding("shared memory", Level.WARN, f"{size}: too little for camera, node and consumer", grow)]
    else:
        findings = [Finding("shared memory", Level.OK, size)]
    leftovers = find_leftovers(folder)
    if leftovers:
        megabytes = sum(leftover.bytes_used for leftover in leftovers) / 1e6
        findings.append(
            Finding(
                "leftover segments", Level.WARN,
                f"{len(leftovers)} segments ({megabytes:.0f} MB) of killed processes are still there",
                "clustvit-ros doctor --clean, or start any node of this package: it deletes them",
            )
        )  # fmt: skip
    else:
        findings.append(Finding("leftover segments", Level.OK, "none"))
    return findings


def check_dds(environ: Mapping[str, str] = os.environ, rclpy_present: bool | None = None) -> list[Finding]:
    """Which middleware, and whether its profile has room for images."""
    present = importlib.util.find_spec("rclpy") is not None if rclpy_present is None else rclpy_present
    if not present:
        return [
            Finding(
                "ROS 2", Level.WARN, "rclpy is not installed here, the node cannot run",
                "source /opt/ros/<distribution>/setup.bash, or install this package with its 'ros' extra",
            )
        ]  # fmt: skip
    domain = environ.get("ROS_DOMAIN_ID") or "0"
    distribution = environ.get("ROS_DISTRO") or "wheels"
    findings = [Finding("ROS 2", Level.OK, f"{distribution}, domain {domain}")]
    middleware = environ.get("RMW_IMPLEMENTATION") or "rmw_fastrtps_cpp"
    if "fastrtps" not in middleware:
        return [*findings, Finding("DDS profile", Level.OK, f"{middleware}: this package's profile is for Fast DDS")]
    chosen = next((environ[name] for name in PROFILE_VARIABLES if environ.get(name)), "")
    if not chosen:
        name = next(iter(dds_environment(environ)))
        profile = share_dir() / "config" / "fastdds_shm.xml"
        return [
            *findings,
            Finding(
                "DDS profile", Level.WARN,
                "none is in force here: a camera driver started from this shell has 0.5 MB of shared memory, less than "
                "one 640x480 image, and loses frames (this package's launch file and demo set their own)",
                f"export {name}={profile} where the camera driver starts",
            ),
        ]  # fmt: skip
    return [*findings, _check_profile(Path(chosen))]


def _check_profile(path: Path) -> Finding:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        return Finding(
            "DDS profile", Level.FAIL, f"{path} cannot be read ({error}): Fast DDS ignores it",
            f"correct the path, e.g. {share_dir() / 'config' / 'fastdds_shm.xml'}",
        )  # fmt: skip
    sizes = [int(n.text or 0) for n in root.iter() if n.tag.endswith("segment_size") and (n.text or "").isdigit()]
    if not sizes or max(sizes) < _IMAGE_BYTES:
        found = f"{max(sizes)} bytes" if sizes else "no segment_size, so 549,408 bytes"
        return Finding(
            "DDS profile", Level.WARN, f"{path}: {found} of shared memory, less than one full-HD image",
            "set segment_size to 33554432 for the SHM transport, as this package's config/fastdds_shm.xml does",
        )  # fmt: skip
    return Finding("DDS profile", Level.OK, f"{path}, segments of {max(sizes) / 1e6:.0f} MB")


def check_sockets(root: Path = Path("/")) -> list[Finding]:
    """Receive buffers, which matter for images that come from another machine."""
    path = root / "proc/sys/net/core/rmem_max"
    try:
        size = int(path.read_text())
    except (OSError, ValueError):
        return [Finding("socket buffers", Level.OK, "net.core.rmem_max cannot be read here")]
    if size < _SOCKET_BUFFER_BYTES:
        return [
            Finding(
                "socket buffers", Level.WARN,
                f"net.core.rmem_max is {size} bytes: images from another machine (UDP) may lose fragments; on one "
                "machine shared memory is used",
                "sudo sysctl -w net.core.rmem_max=33554432, and in /etc/sysctl.d/60-ros.conf to keep it",
            )
        ]  # fmt: skip
    return [Finding("socket buffers", Level.OK, f"net.core.rmem_max is {size} bytes")]


def _machine_name(root: Path = Path("/")) -> str:
    try:
        from clustvit_ros.engine.machine import machine_name
    except Exception:  # whatever a broken NumPy raises: the package around it needs one, which is told elsewhere
        return platform.machine()
    return machine_name(root)


def gpu_hardware(root: Path = Path("/")) -> str:
    """The NVIDIA GPU that the operating system knows; empty when it knows none."""
    board = _machine_name(root)
    if re.search(r"jetson|nvidia", board, re.IGNORECASE) or (root / "etc/nv_tegra_release").exists():
        return board
    driver = root / "proc/driver/nvidia"
    gpus = sorted((driver / "gpus").glob("*/information")) if driver.exists() else []
    for information in gpus:
        found = re.search(r"Model:\s*(.+)", information.read_text(errors="replace"))
        if found:
            return found[1].strip()
    return "an NVIDIA GPU" if driver.exists() or (root / "dev/nvidia0").exists() else ""


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


_LARGEST_AGE_S = 1.0
_MAX_SUGGESTIONS = 5


def check_camera(topic: str, seconds: float, max_pixels: int, required: bool) -> list[Finding]:
    """Listen to `topic` in a process of its own.

    Args:
        topic: name of an image topic.
        seconds: how long to listen.
        max_pixels: the node's `max_image_pixels`.
        required: the user named the topic, so that no camera there is a failure.
    """
    command = [sys.executable, "-m", "clustvit_ros.demo.topic_probe", topic, str(seconds), str(max_pixels)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60.0 + 3 * seconds, check=False,
            env=node_environment(os.environ),
        )  # fmt: skip
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return [Finding("camera", Level.FAIL, "the topic could not be examined in time", f"run `{' '.join(command)}`")]
    except (ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        return [Finding("camera", Level.FAIL, f"the topic could not be examined: {said}", f"run `{' '.join(command)}`")]
    return judge_camera(found, required)


def judge_camera(found: dict[str, Any], required: bool) -> list[Finding]:
    """Findings about what `ros.topic_probe` saw."""
    topic, publishers = found["topic"], found["publishers"]
    if not publishers:
        others = ", ".join(found.get("image_topics", [])[:_MAX_SUGGESTIONS])
        elsewhere = f"images are on {others}: remap with image_topic:=<topic>" if others else "start the camera driver"
        level = Level.FAIL if required else Level.WARN
        remedy = f"{elsewhere}; name a topic with --topic; check ROS_DOMAIN_ID on both sides"
        return [Finding("camera", level, f"nobody publishes on {topic}", remedy)]
    kinds = sorted({publisher["type"] for publisher in publishers})
    wrong = [kind for kind in kinds if kind not in ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")]
    if wrong:
        remedy = f"remap `{IMAGE_TOPIC}` to a topic of sensor_msgs/msg/Image"
        return [Finding("camera", Level.FAIL, f"{topic} carries {', '.join(wrong)}", remedy)]
    findings = []
    if len(publishers) > 1:
        names = ", ".join(publisher["node"] for publisher in publishers)
        remedy = "stop all but one of them, or the node sees their frames mixed"
        findings.append(Finding("camera", Level.WARN, f"{topic} has {len(publishers)} publishers: {names}", remedy))
    qos = ", ".join(sorted({f"{p['reliability'].lower()}, {p['durability'].lower()}" for p in publishers}))
    findings.append(
        Finding("camera QoS", Level.OK, f"{topic} offers {qos}; the node asks for best effort, volatile, which matches")
    )
    if not found["messages"]:
        remedy = (
            "check that the camera runs (ros2 topic hz), that its driver has this package's DDS profile, and that "
            "/dev/shm has room"
        )
        return [*findings, Finding("camera", Level.FAIL, f"nothing arrives on {topic}, though it is published", remedy)]
    if found["errors"]:
        remedy = "set the driver's encoding, or convert with image_proc; the README lists the encodings"
        text = f"{topic} cannot be segmented: {found['errors'][0]}"
        return [*findings, Finding("camera", Level.FAIL, text, remedy)]
    height, width = found["size"]
    rate = f" at {found['rate_hz']:.1f} Hz" if "rate_hz" in found else ""
    text = f"{width}x{height} {found['encoding']}{rate} on {topic}"
    if "CompressedImage" in kinds[0]:
        text += "; start the node with image_transport:=compressed and the topic's name without /compressed"
    findings.append(Finding("camera", Level.OK, text))
    if not found["stamped"]:
        remedy = "configure the driver to stamp its images: consumers synchronise on stamps"
        findings.append(Finding("camera stamps", Level.WARN, "images come without a time stamp", remedy))
    elif abs(found["age_s"]) > _LARGEST_AGE_S:
        remedy = "synchronise the clocks (chrony, ptp), or set use_sim_time where a bag is replayed"
        text = f"images are {found['age_s']:.1f} s old when they arrive"
        findings.append(Finding("camera stamps", Level.WARN, text, remedy))
    return findings
