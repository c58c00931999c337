# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The environment of ROS processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from clustvit_ros import dds
from clustvit_ros.dds import PROFILE_VARIABLES, claim_domain, dds_environment, node_environment
from clustvit_ros.paths import share_dir

PROFILE = str(share_dir() / "config" / "fastdds_shm.xml")


@pytest.mark.parametrize(
    ("distribution", "variable"),
    [("humble", PROFILE_VARIABLES[0]), ("jazzy", PROFILE_VARIABLES[0]), ("kilted", PROFILE_VARIABLES[1])],
)
def test_profile_is_set_under_the_distributions_name(distribution: str, variable: str) -> None:
    assert dds_environment({"ROS_DISTRO": distribution}) == {variable: PROFILE}


def test_profile_is_set_without_a_distribution() -> None:
    added = dds_environment({})
    assert added
    assert set(added) <= set(PROFILE_VARIABLES)


@pytest.mark.parametrize("chosen", [{PROFILE_VARIABLES[0]: "/my.xml"}, {PROFILE_VARIABLES[1]: "/my.xml"}])
def test_the_users_profile_stays(chosen: dict[str, str]) -> None:
    assert dds_environment(chosen) == {}


def test_other_middleware_gets_no_profile() -> None:
    assert dds_environment({"RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp"}) == {}
    assert dds_environment({"RMW_IMPLEMENTATION": "rmw_fastrtps_cpp"})


def test_children_start_without_the_parents_marker() -> None:
    libraries = os.pathsep.join([f"{sys.prefix}/lib", "/opt/vendor/lib"])
    environ = {"_ROS_WHEELS_BOOTSTRAP_COMPLETE": "1", "LD_LIBRARY_PATH": libraries, "HOME": "/home/robot"}
    child = node_environment(environ)
    assert "_ROS_WHEELS_BOOTSTRAP_COMPLETE" not in child
    assert child["LD_LIBRARY_PATH"] == "/opt/vendor/lib"
    assert child["HOME"] == "/home/robot"
    assert environ["_ROS_WHEELS_BOOTSTRAP_COMPLETE"] == "1"


def test_segment_holds_several_full_hd_images() -> None:
    root = ElementTree.parse(Path(PROFILE)).getroot()
    sizes = [int(node.text or 0) for node in root.iter() if node.tag.endswith("segment_size")]
    assert sizes == [32 * 1024 * 1024]
    assert sizes[0] > 4 * 1920 * 1080 * 3


def test_a_domain_is_nobody_else_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of a process which only uses it, nor one that somebody has claimed; free again with its claimant."""
    used, claimed, free = 140, 141, 142
    monkeypatch.setattr(dds, "_DOMAINS", range(used, free + 1))
    code = f"from clustvit_ros import dds; dds._DOMAINS = range({claimed}, {claimed + 1});"
    claimant = subprocess.Popen(
        [sys.executable, "-c", f"{code} print(dds.claim_domain(), flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert claimant.stdout is not None and claimant.stdout.readline() == f"{claimed}\n"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        user.bind(("127.0.0.1", 7400 + 250 * used + 11))
        assert claim_domain() == free
    claimant.communicate("")
    assert {claim_domain(), claim_domain()} == {used, claimed}
