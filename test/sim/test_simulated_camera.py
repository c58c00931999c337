# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The simulated camera: repeatable to the bit, and true about every pixel."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("panda3d", reason="needs panda3d (the 'sim' extra)")

from clustvit_ros.cli.main import main
from clustvit_ros.errors import ConfigError
from clustvit_ros.sim import SIM_CLASSES, SimulatedCamera
from clustvit_ros.training.dataset import LabelledImages
from clustvit_ros.training.layouts import open_data_set

SMALL = (120, 160)


def digest(seed: int, index: int) -> str:
    camera = SimulatedCamera(seed, SMALL)
    frame = camera.frame(index, points=True)
    camera.close()
    assert frame.labels is not None and frame.points is not None
    return hashlib.sha256(frame.image.tobytes() + frame.labels.tobytes() + frame.points.tobytes()).hexdigest()


def test_the_same_seed_gives_the_same_frames_in_another_process():
    code = "from test_simulated_camera import digest; print(digest(5, 40))"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=__file__.rpartition("/")[0], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == digest(5, 40)
    assert digest(5, 41) != digest(5, 40) != digest(6, 40)


def test_a_frame_does_not_depend_on_the_frames_before_it():
    camera = SimulatedCamera(3, SMALL)
    late = camera.frame(200)
    camera.frame(10)
    again = camera.frame(200)
    np.testing.assert_array_equal(late.image, again.image)
    np.testing.assert_array_equal(late.labels, again.labels)


def test_all_classes_occur_and_nothing_else():
    seen: set[int] = set()
    for seed in range(3):
        camera = SimulatedCamera(seed, SMALL, rate_hz=1.0)
        for index in range(0, 120, 8):
            seen |= set(np.unique(camera.frame(index).labels))
        camera.close()
    assert seen == set(range(len(SIM_CLASSES)))


def test_points_project_onto_their_pixels_and_the_road_is_flat():
    camera = SimulatedCamera(2, (240, 320))
    frame = camera.frame(0, points=True)
    assert frame.labels is not None and frame.points is not None
    sky = frame.labels == SIM_CLASSES.names.index("sky")
    assert np.isnan(frame.points[sky]).all() and np.isfinite(frame.points[~sky]).all()
    assert (frame.points[~sky][:, 2] > 0).all()
    rows, columns = np.nonzero(~sky)
    x, y, z = frame.points[~sky].T
    np.testing.assert_allclose(x / z * camera.focal_px, columns - 159.5, atol=0.01)
    np.testing.assert_allclose(y / z * camera.focal_px, rows - 119.5, atol=0.01)
    # What the rasteriser drew as road must lie in one plane, 1.9 m below the camera.
    road = frame.points[frame.labels == SIM_CLASSES.names.index("road")].astype(np.float64)
    normal = np.linalg.lstsq(road, np.ones(len(road)), rcond=None)[0]
    assert 1 / np.linalg.norm(normal) == pytest.approx(1.9, abs=0.03)
    np.testing.assert_allclose(road @ normal, 1.0, atol=0.002)


def test_labels_and_picture_show_the_same_edges():
    camera = SimulatedCamera(1, (240, 320))
    frame = camera.frame(0)
    assert frame.labels is not None
    grey = frame.image.astype(np.float64).mean(axis=2)
    step = np.abs(np.diff(grey, axis=0))
    edge = frame.labels[1:] != frame.labels[:-1]
    assert step[edge].mean() > 3 * step[~edge].mean()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"size": (8, 640)}, "size is 8x640"),
        ({"rate_hz": 0.0}, "rate is 0.0 Hz"),
    ],
)
def test_values_out_of_range_are_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        SimulatedCamera(**arguments)


def test_the_data_set_is_what_the_trainer_reads(tmp_path, capsys):
    def write(name: str) -> int:
        arguments = ["--count", "6", "--seed", "9", "--val-share", "0.3", "--size", "60x80"]
        return main(["sim-dataset", "--out", str(tmp_path / name), *arguments])

    assert write("a") == 0
    assert "4 training and 2 validation pictures" in capsys.readouterr().out
    for split, count in (("train", 4), ("val", 2)):
        folder = tmp_path / "a" / split
        data = LabelledImages(folder / "images", folder / "labels", len(SIM_CLASSES))
        assert len(data) == count
        assert data[0].image.shape == (60, 80, 3)
    # The same seed again: the same bytes; the same folder again: refused.
    assert write("b") == 0
    files = [path for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    assert len(files) == 14 and open_data_set(tmp_path / "a").classes == SIM_CLASSES
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert write("a") == 2
    assert "there is a train or val folder already" in capsys.readouterr().err
    assert main(["sim-dataset", "--out", str(tmp_path / "c"), "--count", "0"]) == 2
    assert "count is 0, expected at least 1" in capsys.readouterr().err
