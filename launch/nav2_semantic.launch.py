# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""An example for Nav2: the segmentation node and a costmap with the semantic layer, both brought up by Nav2's manager.

`ros2 launch clustvit_ros nav2_semantic.launch.py image_topic:=/camera/color/image_raw`. It needs nav2_costmap_2d,
nav2_lifecycle_manager and semantic_segmentation_layer, and a camera that publishes an organised cloud.
"""

import os
from pathlib import Path
from typing import Any

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from clustvit_ros.dds import CAMERA_TOPIC, IMAGE_TOPIC, dds_environment
from clustvit_ros.paths import share_dir


def generate_launch_description() -> LaunchDescription:
    """Start the segmentation node, a costmap, and the manager that configures and activates them in this order."""
    default_file = str(share_dir() / "config" / "nav2_semantic_layer.yaml")
    parameters = LaunchConfiguration("params_file")
    sim_time = {"use_sim_time": ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool)}
    return LaunchDescription(
        [
            DeclareLaunchArgument("params_file", default_value=default_file, description="Of node and costmap."),
            DeclareLaunchArgument("image_topic", default_value=CAMERA_TOPIC, description="Camera image to segment."),
            DeclareLaunchArgument("model", default_value="camvid_tiny", description="Name or folder of a model."),
            DeclareLaunchArgument(
                "class_groups",
                default_value="",
                description="Groups of the model's classes that the costmap knows; empty: as params_file has them.",
            ),
            DeclareLaunchArgument("use_sim_time", default_value="false", description="Take the time from /clock."),
            *(SetEnvironmentVariable(name, value) for name, value in dds_environment(os.environ).items()),
            OpaqueFunction(function=_check_file),
            OpaqueFunction(function=_segmentation, args=[parameters, sim_time]),
            Node(
                package="nav2_costmap_2d",
                executable="nav2_costmap_2d",
                # It names itself: /costmap/costmap.
                parameters=[parameters, sim_time],
                output="screen",
            ),
            Node(
                package="nav2_lifecycle_manager",
                executable="lifecycle_manager",
                name="lifecycle_manager_semantic",
                # The segmentation node makes no bond, so the manager must not wait for one.
                parameters=[
                    {
                        "autostart": True,
                        "bond_timeout": 0.0,
                        "node_names": ["segmentation", "costmap/costmap"],
                    },
                    sim_time,
                ],
                output="screen",
            ),
        ]
    )


def _segmentation(
    context: LaunchContext, params_file: LaunchConfiguration, sim_time: dict[str, ParameterValue]
) -> list[Node]:
    # The manager configures and activates it.
    arguments: dict[str, Any] = {"autostart": False, "model": LaunchConfiguration("model")}
    groups = LaunchConfiguration("class_groups").perform(context)
    if groups:
        arguments["class_groups"] = ParameterValue(groups, value_type=str)
    return [
        Node(
            package="clustvit_ros",
            executable="segmentation_node",
            name="segmentation",
            parameters=[params_file, arguments, sim_time],
            remappings=[(IMAGE_TOPIC, LaunchConfiguration("image_topic"))],
            output="screen",
        )
    ]


def _check_file(context: LaunchContext) -> None:
    file = LaunchConfiguration("params_file").perform(context)
    if not Path(file).is_file():
        raise ValueError(f"launch argument params_file: got {file!r}, expected a parameter file that exists")
