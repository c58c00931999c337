# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Leftovers of killed processes are found by their locks, and nothing else is touched."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from clustvit_ros.dds import find_leftovers, remove_leftovers


def segment(folder: Path, name: str) -> Path:
    """A segment and its lock file, as Fast DDS makes them."""
    path = folder / name
    path.write_bytes(bytes(20_000))
    (folder / f"{name}_el").touch()
    return path


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60.0)


def test_only_segments_without_an_owner_are_removed(tmp_path: Path) -> None:
    dead = [segment(tmp_path, name) for name in ("fastrtps_0123456789abcdef", "fastdds_fedcba9876543210")]
    owned = segment(tmp_path, "fastrtps_00000000000000aa")
    others = [segment(tmp_path, name) for name in ("fastrtps_port7400", "sem.fastrtps_port7400_mutex", "precious")]
    with (tmp_path / "fastrtps_00000000000000aa_el").open() as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        assert [leftover.segment for leftover in find_leftovers(tmp_path)] == sorted(dead)
        assert all(leftover.bytes_used >= 20_000 for leftover in find_leftovers(tmp_path))
        assert len(remove_leftovers(tmp_path)) == 2
    assert not any(path.exists() or path.with_name(path.name + "_el").exists() for path in dead)
    assert owned.exists() and all(path.exists() for path in others)
    assert len(remove_leftovers(tmp_path)) == 1, "once its owner is gone, it goes as well"


def test_what_was_made_just_now_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    segment(tmp_path, "fastrtps_0123456789abcdef")
    assert find_leftovers(tmp_path) == []


def test_links_are_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    os.symlink(target, tmp_path / "fastrtps_0123456789abcdef_el")
    assert remove_leftovers(tmp_path) == []
    assert target.exists()


def test_no_shared_memory_is_no_problem(tmp_path: Path) -> None:
    assert find_leftovers(tmp_path / "missing") == []
