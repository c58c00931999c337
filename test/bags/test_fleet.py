# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Many bags on a local Ray: damage, a killed worker, and a second run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rosbags", reason="needs rosbags")

from recordings import camera_bag, replay, truncate

from clustvit_ros.bags import LabelOptions
from clustvit_ros.bags.fleet import DAMAGED, FAILED, LABELLED, BagLabeller, FleetOptions, label_bags
from clustvit_ros.classes import ClassSet
from clustvit_ros.cli.label_bag import _targets
from clustvit_ros.cli.main import main
from clustvit_ros.errors import ConfigError

SCRIPTED = {"model": "", "engine": "scripted"}


def test_a_worker_turns_errors_into_outcomes_and_goes_on(tmp_path):
    worker = BagLabeller(SCRIPTED, LabelOptions(), restart=False)
    bad = worker({"source": str(tmp_path / "nowhere"), "target": str(tmp_path / "a")})
    assert bad["status"] == FAILED and "there is no such bag" in bad["reason"]
    source = camera_bag(tmp_path / "in", 3)
    good = worker({"source": str(source), "target": str(tmp_path / "b")})
    assert (good["status"], good["frames"], good["finished_before"]) == (LABELLED, 3, False)
    again = worker({"source": str(source), "target": str(tmp_path / "b")})
    assert (again["status"], again["finished_before"]) == (LABELLED, True)
    truncate(camera_bag(tmp_path / "cut", 10), 0.5)
    cut = worker({"source": str(tmp_path / "cut"), "target": str(tmp_path / "c")})
    assert cut["status"] == DAMAGED and "cut.mcap" in cut["reason"]


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"cpus_per_worker": 0}, {"retries": -1}, {"gpus_per_worker": -0.5}])
def test_options_are_checked(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: got"):
        FleetOptions(**wrong)


def test_outputs_lie_beside_the_bags_or_in_folders_like_theirs(tmp_path):
    bags = [tmp_path / "robot_1" / "drive", tmp_path / "robot_2" / "drive", tmp_path / "robot_2" / "lone.mcap"]
    (tmp_path / "robot_2").mkdir()
    bags[2].touch()
    assert _targets(bags, None) == [
        tmp_path / "robot_1" / "drive_segmentation",
        tmp_path / "robot_2" / "drive_segmentation",
        tmp_path / "robot_2" / "lone_segmentation",
    ]
    out = tmp_path / "out"
    assert _targets(bags, out) == [
        out / "robot_1" / "drive_segmentation",
        out / "robot_2" / "drive_segmentation",
        out / "robot_2" / "lone_segmentation",
    ]
    assert _targets(bags[:1], out) == [out / "drive_segmentation"]
    (tmp_path / "robot_2" / "lone.db3").touch()
    with pytest.raises(ConfigError, match="several bags would be labelled into"):
        _targets([bags[2], tmp_path / "robot_2" / "lone.db3"], None)


def test_no_bags_is_an_error(tmp_path, capsys):
    assert main(["label-bags", str(tmp_path / "**"), "--engine", "scripted"]) == 2
    assert "no bags found" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ray_here():
    """A local Ray of two CPUs, which `label_bags` finds."""
    ray = pytest.importorskip("ray", reason="needs ray, extra 'fleet'")
    pytest.importorskip("pyarrow", reason="needs ray[data], extra 'fleet'")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_bags_spread_over_workers_and_failures_are_tried_again(ray_here, tmp_path):
    sources = [camera_bag(tmp_path / f"bag_{number}", 3) for number in range(3)]
    truncate(sources[1], 0.5)
    (tmp_path / "gone").mkdir()
    bags = [(source, tmp_path / "out" / source.name) for source in [*sources, tmp_path / "gone"]]
    told = []
    outcomes = label_bags(bags, SCRIPTED, fleet=FleetOptions(workers=2, retries=2), progress=told.append)
    assert [outcome.status for outcome in outcomes] == [LABELLED, DAMAGED, LABELLED, FAILED]
    assert sorted(outcome.source for outcome in told) == sorted(str(source) for source, _ in bags)
    assert "no bag" in outcomes[3].reason
    again = label_bags(bags, SCRIPTED, fleet=FleetOptions(workers=2, retries=0))
    assert [outcome.finished_before for outcome in again] == [True, True, True, False]


@pytest.mark.slow
def test_twenty_bags_one_damaged_and_one_worker_killed(tmp_path, make_toy_model):
    pytest.importorskip("ray", reason="needs ray, extra 'fleet'")
    model = make_toy_model(ClassSet(("sky", "road"), ((0, 0, 255), (90, 90, 90))))
    frames, folder = 60, tmp_path / "fleet"
    for number in range(20):
        camera_bag(folder / f"bag_{number:02d}", frames, ("mcap", "sqlite3")[number % 2], (96, 128))
    truncate(folder / "bag_07", 0.5)
    command = [
        sys.executable, "-m", "clustvit_ros.cli.main", "label-bags", str(folder / "**"), "--ray", "local",
        "--workers", "2", "--model", str(model), "--device", "cpu", "--json", str(tmp_path / "outcomes.json"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = kill_a_worker(folder, process)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 1, out + err
    assert "19 labelled, 1 damaged" in out
    assert f"damaged: {folder / 'bag_07'}" in err
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert killed not in {outcome["worker"] for outcome in outcomes[-5:]}
    for outcome in outcomes:
        masks = replay(Path(outcome["target"]))["/segmentation/mask"]
        assert len({mask.timestamp_ns for mask in masks}) == len(masks) == outcome["frames"]
        if outcome["status"] == LABELLED:
            assert len(masks) == frames
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.stdout.count("finished before") == 20 and "; 0 images" in second.stdout
    assert second.returncode == 1  # one bag is damaged still


def kill_a_worker(folder: Path, process: subprocess.Popen[str]) -> int:
    """End the worker that first has written something, in the middle of its bag."""
    deadline = time.monotonic() + 150.0
    while time.monotonic() < deadline and process.poll() is None:
        for lock in folder.glob("*.partial/lock"):
            *_, pid = lock.read_text().split() or [""]
            if pid.isdecimal():
                os.kill(int(pid), signal.SIGKILL)
                return int(pid)
        time.sleep(0.01)
    raise AssertionError("no worker began")
