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
from pathlib import Path
from typing import Any

import pytest

from clustvit_ros.paths import share_dir
from clustvit_ros.policy.parameters import PARAMETERS

FILE = share_dir() / "launch" / "segment.launch.py"
DEMO = share_dir() / "launch" / "demo.launch.py"


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
    wanted = "model engine device image_transport merge_threshold latency_budget_ms use_sim_time autostart"
    assert set(wanted.split()) <= names


def test_the_demo_s_camera_arguments_are_parameters_of_the_camera() -> None:
    from clustvit_ros.demo.camera import CameraNodeParameters

    names = keys_of(DEMO, "_ARGUMENTS") - {"namespace", "rviz"}
    assert names <= {field.name for field in dataclasses.fields(CameraNodeParameters)}


def test_the_demo_starts_camera_and_segmentation() -> None:
    pytest.importorskip("launch_ros", reason="needs launch_ros")
    from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
    from launch_ros.actions import Node

    entities = load(DEMO).generate_launch_description().entities
    declared = {entity.name: entity for entity in entities if isinstance(entity, DeclareLaunchArgument)}
    assert set(declared) == {"source", "rate_hz", "loop", "namespace", "rviz"}
    assert all(entity.description for entity in declared.values())
    assert declared["source"].default_value is None
    assert sum(isinstance(entity, Node) for entity in entities) == 2
    assert sum(isinstance(entity, IncludeLaunchDescription) for entity in entities) == 1


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
    (plain,) = module._start_node(context)
    context.launch_configurations["merge_threshold"] = "1"
    (tuned,) = module._start_node(context)
    assert len(plain["parameters"]) == 1
    assert plain["name"] == "segmentation"
    assert [value.value for value in tuned["parameters"][1].values()] == [1.0]
    context.launch_configurations["namespace"] = "front, rear"
    assert [node["namespace"] for node in module._start_node(context)] == ["front", "rear"]
    context.launch_configurations["merge_threshold"] = "low"
    with pytest.raises(ValueError, match="merge_threshold: got 'low', expected a number"):
        module._start_node(context)
