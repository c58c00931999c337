# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The environment of a process: what Fast DDS and OpenMP need, and what killed processes leave in shared memory.

Fast DDS holds an exclusive lock on `<segment>_el` for as long as the owner of `<segment>` lives, and deletes both when
the owner ends. After `kill -9` they stay, 32 MB for each participant with this package's profile: two kills fill the
64 MB that Docker gives a container, and the next process cannot create its own. What nobody locks belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import random
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clustvit_ros.paths import share_dir

CAMERA_TOPIC = "image_raw"
"""A camera's images, relative to its namespace, as drivers publish them (usb_cam, v4l2_camera)."""
IMAGE_TOPIC = "image"
"""What the segmentation node subscribes to where nothing is remapped; the launch files remap it to a camera's."""

PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
"""Where Fast DDS looks for its profile: the first in 2.x (Humble, Jazzy), the second from 3.0 on (Kilted)."""

_FAST_DDS_2_DISTRIBUTIONS = ("humble", "iron", "jazzy")

# Set by the launcher of the PyPI wheels of ROS 2 when it has restarted Python with the library path.
_WHEELS_MARKER = "_ROS_WHEELS_BOOTSTRAP_COMPLETE"


# A domain's ports are 7400 + 250 * domain and the 249 after it; of these domains, none that Linux hands to others.
_DOMAINS, _FIRST_PORT, _PORTS = range(1, 101), 7400, 250
_claims: list[socket.socket] = []


def claim_domain() -> int:
    """A ROS domain that nobody on this machine uses, and that nobody else who asks here gets while this process lives.

    Returns:
        1..100; one in use only when all are.
    """
    used = set()
    for table in ("/proc/net/udp", "/proc/net/udp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                used.add((int(line.split()[1].rpartition(":")[2], 16) - _FIRST_PORT) // _PORTS)
    domains = random.sample(_DOMAINS, len(_DOMAINS))
    for domain in domains:
        claim = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):  # somebody has claimed it
            claim.bind(f"\0clustvit_ros_domain_{domain}")  # a name that ends with the process, and leaves no file
            if domain not in used:
                _claims.append(claim)
                return domain
        claim.close()
    return domains[0]


def dds_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that make Fast DDS use this package's profile.

    Args:
        environ: the environment as it is.

    Returns:
        What to add: empty where the user chose a profile or another middleware.
    """
    if any(environ.get(name) for name in PROFILE_VARIABLES):
        return {}
    if "fastrtps" not in environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp"):
        return {}
    profile = str(share_dir() / "config" / "fastdds_shm.xml")
    return dict.fromkeys(_variables_in_use(environ), profile)


def _variables_in_use(environ: Mapping[str, str]) -> tuple[str, ...]:
    # Newer Fast DDS warns at every start about the old name, older Fast DDS does not know the new one.
    old, new = PROFILE_VARIABLES
    distribution = environ.get("ROS_DISTRO")
    if distribution:
        return (old,) if distribution in _FAST_DDS_2_DISTRIBUTIONS else (new,)
    # The PyPI wheels set no ROS_DISTRO, but bring Fast DDS as a Python package under its name of the time.
    if importlib.util.find_spec("fastrtps"):
        return (old,)
    return (new,) if importlib.util.find_spec("fastdds") else PROFILE_VARIABLES


def node_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment to start a ROS process with.

    The PyPI wheels of ROS 2 restart Python once and leave a marker that keeps the next Python from doing so, be it the
    right one or not; the child gets neither the marker nor the library path that goes with it.

    Args:
        environ: the environment as it is; it is not changed.

    Returns:
        A whole environment, this package's Fast DDS profile in it unless the user chose another.
    """
    child = dict(environ)
    if child.pop(_WHEELS_MARKER, None):
        kept = [part for part in child.get("LD_LIBRARY_PATH", "").split(os.pathsep) if not part.startswith(sys.prefix)]
        child["LD_LIBRARY_PATH"] = os.pathsep.join(part for part in kept if part)
    child.update(dds_environment(child))
    return child


SHARED_MEMORY = Path("/dev/shm")
_LOCK_OF_SEGMENT = re.compile(r"(?:fastrtps|fastdds)_[0-9a-f]{16}_el")
# A lock file exists for a moment before it is locked.
_SETTLED_S = 2.0


@dataclass(frozen=True)
class Leftover:
    """A segment whose owner is gone.

    Args:
        segment: its file.
        bytes_used: memory that it takes.
    """

    segment: Path
    bytes_used: int


def find_leftovers(folder: Path = SHARED_MEMORY) -> list[Leftover]:
    """Segments of this user that no living process owns."""
    return [leftover for lock in _locks(folder) if (leftover := _examine(lock, remove=False)) is not None]


def remove_leftovers(folder: Path = SHARED_MEMORY) -> list[Leftover]:
    """Delete them.

    Returns:
        What was deleted.
    """
    return [leftover for lock in _locks(folder) if (leftover := _examine(lock, remove=True)) is not None]


def _locks(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder) if _LOCK_OF_SEGMENT.fullmatch(name))
    except OSError:
        return []


def _examine(lock: Path, remove: bool) -> Leftover | None:
    segment = lock.with_name(lock.name.removesuffix("_el"))
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone by now, or another user's
        return None
    try:
        status = os.fstat(handle)
        if status.st_uid != os.getuid() or time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED_S:
            return None
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the handle is closed
        bytes_used = 0
        with contextlib.suppress(OSError):
            bytes_used = segment.stat().st_blocks * 512
        if remove:
            segment.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        return Leftover(segment, bytes_used)
    except OSError:  # locked: its owner lives
        return None
    finally:
        os.close(handle)


def bound_spinning(count: int = 10_000) -> None:
    """Let OpenMP threads that wait for each other spin briefly, then sleep, unless the user chose otherwise.

    GNU OpenMP spins for milliseconds, a whole time slice when another process has the core. Frames of 65 ms on two
    cores, one of them taken by another process: 1.5 s at a count of 100,000, 0.28 s at 10,000, 0.16 s at 3,000. On an
    idle machine 3,000 is too short: threads sleep between two operations of a frame, and its 95th percentile rises
    from 78 to 105 ms. Only has an effect before PyTorch is imported.

    Args:
        count: of a loop that takes some 15 ns.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(count))
