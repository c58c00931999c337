# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The launch file: always compiled, and run where `launch` is installed."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from clustvit_ros.paths import share_dir
from clustvit_ros.policy.parameters import PARAMETERS

FILE = share_dir() / "launch" / "segment.launch.py"
DEMO = share_dir() / "launch" / "demo.launch.py"
NAV2 = share_dir() / "launch" / "nav2_semantic.launch.py"


def load(file: Path) -> Any:
    """Import the launch file as a module."""
    spec = importlib.util.spec_from_file_location("segment_launch", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of(file: Path, table_name: str) -> set[str]:
    """The keys of a table at the top level of a launch file, read without running it."""
    tree = ast.parse(file.read_text())
    compile(tree, str(file), "exec")
    table = next(
        node.value for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == table_name
    )  # fmt: skip
    assert isinstance(table, ast.Dict)
    return {ast.literal_eval(key) for key in table.keys if key is not None}


def test_parameters_of_the_launch_file_exist_on_the_node() -> None:
    names = keys_of(FILE, "_PARAMETERS")
    assert names - {"use_sim_time"} <= {spec.name for spec in PARAMETERS}
    wanted = (
        "model engine device image_transport merge_threshold latency_budget_ms use_sim_time autostart output_size "
        "precision threads confidence_threshold input_scale"
    )
    assert set(wanted.split()) <= names


def test_the_demo_s_camera_arguments_are_parameters_of_the_camera() -> None:
    from clustvit_ros.demo.camera import CameraNodeParameters

    names = keys_of(DEMO, "_ARGUMENTS") - {"namespace", "image_topic", "rviz"}
    assert names <= {field.name for field in dataclasses.fields(CameraNodeParameters)}


def test_the_demo_starts_camera_and_segmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("launch_ros", reason="needs launch_ros")
    from launch import LaunchContext
    from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
    from launch_ros.actions import Node

    entities = load(DEMO).generate_launch_description().entities
    declared = {entity.name: entity for entity in entities if isinstance(entity, DeclareLaunchArgument)}
    assert set(declared) == {"source", "rate_hz", "loop", "namespace", "image_topic", "rviz"}
    assert all(entity.description for entity in declared.values())
    assert declared["image_topic"].default_value[0].text == "image_raw"
    assert sum(isinstance(entity, Node) for entity in entities) == 1  # RViz
    assert sum(isinstance(entity, IncludeLaunchDescription) for entity in entities) == 1
    module = load(DEMO)
    monkeypatch.setattr(module, "Node", dict)
    context = LaunchContext()
    context.launch_configurations.update({"namespace": "front, rear", "image_topic": "/cam/image_raw"})
    cameras = module._start_cameras(context)
    assert [camera["namespace"] for camera in cameras] == ["front", "rear"]
    assert cameras[0]["remappings"] == [("image_raw", "/cam/image_raw"), ("camera_info", "/cam/camera_info")]


@pytest.mark.parametrize("groups", ["", "traversable: smooth_trail; obstacle: obstacle; sky: sky"])
def test_another_model_brings_its_own_groups_to_the_costmap(groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("launch_ros", reason="needs launch_ros")
    from launch import LaunchContext

    module = load(NAV2)
    monkeypatch.setattr(module, "Node", dict)
    context = LaunchContext()
    context.launch_configurations.update({"class_groups": groups})
    (node,) = module._segmentation(context, "nav2.yaml", {})
    file, arguments, _ = node["parameters"]
    assert file == "nav2.yaml" and arguments["autostart"] is False
    assert ("class_groups" in arguments) == bool(groups)


class Launched:
    """segment.launch.py under a real launch service, with other processes in the node's place.

    Args:
        arguments: launch arguments, as on the command line.
        code: Python that each process runs instead.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: str, *arguments: str) -> None:
        pytest.importorskip("launch_ros", reason="needs launch_ros")
        from launch import LaunchDescription, LaunchDescriptionSource, LaunchService
        from launch.actions import ExecuteProcess, IncludeLaunchDescription, LogInfo

        module = load(FILE)
        self.nodes: list[dict[str, Any]] = []
        self.told: list[str] = []

        def node(**options: Any) -> Any:
            self.nodes.append(options)
            return ExecuteProcess(cmd=[sys.executable, "-c", code], output="screen")

        def info(msg: str) -> Any:
            self.told.append(msg)
            return LogInfo(msg=msg)

        monkeypatch.setattr(module, "Node", node)
        monkeypatch.setattr(module, "LogInfo", info)
        monkeypatch.setattr(module, "_RESPAWN_DELAY_S", 0.1)
        source = LaunchDescriptionSource(module.generate_launch_description())
        pairs = [tuple(argument.split(":=")) for argument in arguments]
        service = LaunchService(argv=list(arguments), noninteractive=True)
        service.include_launch_description(
            LaunchDescription([IncludeLaunchDescription(source, launch_arguments=pairs)])
        )
        self.return_code = service.run()


def test_a_crash_is_followed_by_another_start_and_a_refusal_by_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Killed at the first start, a fault at the second, told to end at the third.
    code = f"""
import os, signal, sys
starts = open({str(tmp_path / "starts")!r}, "a+")
starts.write("x"); starts.flush(); starts.seek(0); count = len(starts.read())
if count == 1: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(70 if count == 2 else 0)
"""
    launched = Launched(monkeypatch, code)
    assert (launched.return_code, len(launched.nodes)) == (0, 3)
    assert "exit code -9 and is started again" in launched.told[0] and "exit code 70" in launched.told[1]
    refused = Launched(monkeypatch, "raise SystemExit(1)")
    assert (refused.return_code, len(refused.nodes)) == (1, 1)
    left = Launched(monkeypatch, "raise SystemExit(70)", "respawn:=false")
    assert (left.return_code, len(left.nodes)) == (1, 1)


def test_arguments_that_mean_nothing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Launched(monkeypatch, "", "merge_treshold:=0.3", "colour:=red", "threads:=2", "output_size:=model")
    assert launched.told == [
        "launch argument colour: has no effect, segment.launch.py has none; `--show-args` lists all",
        "launch argument merge_treshold: has no effect, segment.launch.py has none; did you mean merge_threshold?",
    ]
    values = {name: value.value for name, value in launched.nodes[0]["parameters"][1].items()}
    assert values == {"threads": 2, "output_size": "model"}
    missing = Launched(monkeypatch, "", "params_file:=/nowhere/segment.yaml")
    assert (missing.return_code, missing.nodes) == (1, [])


def test_cameras_have_the_topics_of_drivers_in_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Launched(monkeypatch, "", "cameras:=front, rear")
    remapped = dict(launched.nodes[0]["remappings"])
    assert (remapped["front/image"], remapped["rear/image"]) == ("front/image_raw", "rear/image_raw")


def test_arguments_become_parameters_only_when_given(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("launch_ros", reason="needs launch_ros")
    from launch import LaunchContext
    from launch.actions import DeclareLaunchArgument

    module = load(FILE)
    monkeypatch.setattr(module, "Node", dict)
    context = LaunchContext()
    for entity in module.generate_launch_description().entities:
        if isinstance(entity, DeclareLaunchArgument):
            assert entity.description
            entity.execute(context)

    def nodes() -> list[dict[str, Any]]:
        return [entity for entity in module._start_nodes(context) if isinstance(entity, dict)]

    monkeypatch.setattr(module, "OnProcessExit", lambda **options: None)
    monkeypatch.setattr(module, "RegisterEventHandler", lambda handler: handler)
    (plain,) = nodes()
    context.launch_configurations["merge_threshold"] = "1"
    (tuned,) = nodes()
    assert len(plain["parameters"]) == 1
    assert plain["name"] == "segmentation"
    assert [value.value for value in tuned["parameters"][1].values()] == [1.0]
    context.launch_configurations["namespace"] = "front, rear"
    assert [node["namespace"] for node in nodes()] == ["front", "rear"]
    context.launch_configurations["merge_threshold"] = "low"
    with pytest.raises(ValueError, match="merge_threshold: got 'low', expected a number"):
        module._start_nodes(context)
