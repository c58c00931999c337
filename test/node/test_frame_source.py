# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Folders and videos as camera sources, and what is said about sources that are none."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from clustvit_ros.demo.frame_source import open_source
from clustvit_ros.errors import DataError


def picture(value: int) -> np.ndarray:
    return np.full((16, 24, 3), value, np.uint8)


def test_folder_gives_its_pictures_by_name_again_and_again(tmp_path: Path) -> None:
    for value in (30, 10, 20):
        cv2.imwrite(str(tmp_path / f"{value}.png"), picture(value))
    (tmp_path / "notes.txt").write_text("no picture")
    source = open_source(str(tmp_path))
    for _ in range(2):
        frames = list(source)
        assert [frame.name for frame in frames] == ["10.png", "20.png", "30.png"]
        assert [int(frame.pixels[0, 0, 0]) for frame in frames] == [10, 20, 30]


def test_folder_of_a_data_set_means_its_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), picture(1))
    assert [frame.name for frame in open_source(str(tmp_path))] == ["a.png"]


def test_video_gives_every_frame_each_time(tmp_path: Path) -> None:
    file = tmp_path / "drive.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (24, 16))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no Motion-JPEG")
    for value in (0, 100, 200):
        writer.write(picture(value))
    writer.release()
    source = open_source(str(file))
    for _ in range(2):
        frames = list(source)
        assert [frame.name for frame in frames] == ["drive_000000", "drive_000001", "drive_000002"]
        assert [frame.pixels.mean() for frame in frames] == pytest.approx([0, 100, 200], abs=9)


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not there; expected a folder .* /dev/videoN, N, a stream .* or sim:SEED"):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="holds no pictures"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="/dev/video999 does not exist"):
        open_source("/dev/video999")
    text = tmp_path / "notes.txt"
    text.write_text("no video")
    with pytest.raises(DataError, match="cannot be read as a video"):
        open_source(str(text))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png: cannot be read as an image"):
        list(open_source(str(tmp_path)))


def test_a_simulated_drive_that_starts_over_is_the_same_and_rendered_once() -> None:
    pytest.importorskip("panda3d", reason="needs panda3d (the 'sim' extra)")
    source = open_source("sim:5", 64, 48, loop_frames=3)
    first, again = list(source), list(source)
    assert [frame.name for frame in again] == [f"sim_5_00000{index}" for index in range(3)]
    assert all(one.pixels is other.pixels for one, other in zip(first, again, strict=True))
    assert not np.array_equal(first[0].pixels, first[1].pixels)
