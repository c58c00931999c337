"""The environment that ROS processes need: a Fast DDS profile with room for images, no traces of the parent's own."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping

from clustvit_ros.paths import share_dir

PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
"""Where Fast DDS looks for its profile: the first in 2.x (Humble, Jazzy), the second from 3.0 on (Kilted)."""

_FAST_DDS_2_DISTRIBUTIONS = ("humble", "iron", "jazzy")

# Set by the launcher of the PyPI wheels of ROS 2 when it has restarted Python with the library path.
_WHEELS_MARKER = "_ROS_WHEELS_BOOTSTRAP_COMPLETE"


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
