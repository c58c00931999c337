# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The example for Nav2: its two sides name the same classes, and the node takes its parameters as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from clustvit_ros.classes import load_class_set
from clustvit_ros.engine.masks import group_classes
from clustvit_ros.paths import share_dir
from clustvit_ros.policy.parameter_spec import build
from clustvit_ros.policy.parameters import SegmentationParameters

FILE = share_dir() / "config" / "nav2_semantic_layer.yaml"


@pytest.fixture
def content() -> dict[str, Any]:
    return {name: node["ros__parameters"] for name, node in yaml.safe_load(FILE.read_text()).items()}


def test_the_layer_knows_every_class_that_the_node_publishes(content: dict[str, Any]) -> None:
    check_groups(content, "camvid", content["/**/segmentation"])


def test_the_guide_s_groups_of_an_offroad_model_are_the_layer_s(content: dict[str, Any]) -> None:
    guide = (share_dir() / "docs" / "guide.md").read_text()
    check_groups(content, "ycor", {"class_groups": guide.split('class_groups:="')[1].split('"')[0]})


def check_groups(content: dict[str, Any], classes: str, values: dict[str, Any]) -> None:
    parameters = build(SegmentationParameters, values)
    grouping = group_classes(load_class_set(classes), parameters.class_groups)
    assert grouping.ungrouped == ()
    camera = content["/**/costmap"]["semantic_layer"]["camera"]
    known = [name for kind in camera["class_types"] for name in camera[kind]["classes"]]
    assert sorted(known) == sorted(grouping.classes.names)
    for kind in camera["class_types"]:
        assert 0 <= camera[kind]["base_cost"] <= camera[kind]["max_cost"] <= 254


def test_the_layer_subscribes_to_what_the_node_publishes(content: dict[str, Any]) -> None:
    camera = content["/**/costmap"]["semantic_layer"]["camera"]
    topics = [camera[f"{name}_topic"] for name in ("segmentation", "confidence", "labels")]
    assert topics == ["/segmentation/mask", "/segmentation/confidence", "/segmentation/label_info"]


def test_the_launch_file_compiles() -> None:
    file = share_dir() / "launch" / "nav2_semantic.launch.py"
    compile(file.read_text(), str(file), "exec")


@pytest.mark.ros
def test_the_node_starts_with_it(start_node: Callable[..., Any]) -> None:
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    pytest.importorskip("torch", reason="needs PyTorch")
    process = start_node("node.node", "--params-file", str(FILE), "-p", "device:=cpu", "-p", "input_timeout_s:=0.1")
    process.wait_for_output("active: /image -> /segmentation/mask")
    assert "11 classes become traversable, obstacle, sky" in process.output
    assert "are in no group" not in process.output
    assert process.stop() == 0
