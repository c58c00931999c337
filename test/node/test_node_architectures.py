# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Another family in the running node: one parameter, the model, is all that changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

import torch
from robot import Robot, double, header, mask_of

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import create_engine
from clustvit_ros.networks import ModelConfig, build_network, network_config, save_model
from clustvit_ros.networks.model_folder import InputConfig
from clustvit_ros.node.messages import image_message

pytestmark = pytest.mark.ros

SMALL: dict[str, dict[str, Any]] = {
    "clustr_b1": {"embed_dims": [32, 32, 32, 32], "num_heads": [1, 1, 1, 1], "depths": [1, 1, 1, 1], "head_dim": 32},
    "cast_t": {"embed_dim": 48, "depth": 2, "head_depth": 1, "num_clusters": 4, "cluster_size": 6},
}


@pytest.mark.parametrize("architecture", SMALL)
def test_the_node_runs_it(
    architecture: str, tmp_path: Path, ros_client: Any, start_node: Callable[..., Any], rng: np.random.Generator
) -> None:
    overrides = {"image_size": [64, 96], **SMALL[architecture]}
    config = ModelConfig(
        name=architecture, architecture=architecture, network=network_config(architecture, overrides),
        classes=ClassSet.numbered(5), input=InputConfig(size=(64, 96)), overrides=overrides,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(tmp_path / architecture, config, build_network(config.network, 5))
    # The robot names the scripted engine; the last of two values counts.
    robot = Robot(
        ros_client, start_node, f"/{architecture}", "-p", f"model:={tmp_path / architecture}",
        "-p", "engine:=torch", "-p", "device:=cpu", "-p", "threads:=1",
    )  # fmt: skip
    pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    mask = mask_of(robot.segment(image_message(pixels, "rgb8", header(7))))
    expected = create_engine(str(tmp_path / architecture), "torch", "cpu").segment(pixels).mask[0]
    assert (mask == expected).mean() > 0.99
    idle = "merge_threshold has no effect: the model merges no tokens"
    for threshold in (0.3, 0.2):
        assert robot.set(double("merge_threshold", threshold))[0].successful
    robot.process.wait_for_output(idle)
    robot.set(double("min_agreement", 0.9))
    robot.process.wait_for_output("min_agreement has no effect: accuracy_check_period_s is 0, so that nothing is check")
    assert robot.process.output.count(idle) == 1, "told once"
    assert robot.segment(image_message(pixels, "rgb8", header(8))).height == 64
