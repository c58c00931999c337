"""Checks of the machine around the node: shared memory, DDS profile, socket buffers, Python packages.

Nothing here imports what it examines: a broken package must not take the doctor with it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path

from clustvit_ros.cli.findings import Finding, Level
from clustvit_ros.dds import PROFILE_VARIABLES, SHARED_MEMORY, dds_environment, find_leftovers
from clustvit_ros.engine.machine import machine_name
from clustvit_ros.paths import share_dir

# A participant with this package's profile takes 32 MB; camera, node and consumer are three.
_SEGMENT_MB, _SHARED_MEMORY_MB = 34, 128
# A full-HD colour image in UDP fragments; Linux starts with 212,992 bytes.
_SOCKET_BUFFER_BYTES = 8 << 20
_IMAGE_BYTES = 1920 * 1080 * 3


def check_packages() -> list[Finding]:
    """Python, NumPy, OpenCV and PyTorch as installed, without importing them."""
    findings = [Finding("python", Level.OK, f"{platform.python_version()} on {machine_name()}, {platform.machine()}")]
    for package, names, need in (
        ("NumPy", ("numpy",), True),
        ("OpenCV", ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless"), True),
    ):
        version = _version(names)
        spec = importlib.util.find_spec("cv2" if package == "OpenCV" else "numpy")
        if spec is None and need:
            remedy = f"apt install python3-{package.lower()}, or pip install {names[0]}"
            findings.append(Finding(package, Level.FAIL, "is not installed", remedy))
        else:
            findings.append(Finding(package, Level.OK, version or "installed by the system's packages"))
    return findings


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


def gpu_hardware(root: Path = Path("/")) -> str:
    """The NVIDIA GPU that the operating system knows; empty when it knows none."""
    board = machine_name(root)
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
