# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Starts the segmentation node: `ros2 launch clustvit_ros segment.launch.py image_topic:=/camera/image_raw`.

Several cameras: `namespace:=front,rear` starts a process for each, with its own engine (`front/image`, `rear/image`);
`cameras:=front,rear` starts one process whose engine they share. The topics have the same names either way.
"""

import os

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.launch_description_entity import LaunchDescriptionEntity
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from clustvit_ros.dds import dds_environment
from clustvit_ros.paths import share_dir

# Launch arguments that are node parameters: left empty, the parameter file decides.
_PARAMETERS = {
    "model": (str, "Name of a shipped model, or path of a model folder."),
    "image_transport": (str, "raw, or compressed for JPEG and PNG on <image_topic>/compressed."),
    "engine": (str, "What runs the network: auto, torch, cuda_graph, tensorrt, onnxruntime or scripted."),
    "device": (str, "Where it runs: auto, cpu, cuda or cuda:N."),
    "precision": (str, "What the network computes in: auto, float32, float16, bfloat16 or int8."),
    "merge_threshold": (float, "0.0 merges all tokens (fastest), 1.0 none (plain ViT)."),
    "token_capacity": (int, "At most so many tokens are kept; 0 leaves it to the threshold."),
    "latency_budget_ms": (float, "A frame may take so many milliseconds; 0 is no budget."),
    "cameras": (str, "Cameras that share one process and engine, separated by commas; image_topic is not used."),
    "autostart": (bool, "Configure and activate at start; false waits for a lifecycle manager."),
    "use_sim_time": (bool, "Take the time from /clock."),
}


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and start the node."""
    default_file = str(share_dir() / "config" / "segment.yaml")
    arguments = [
        DeclareLaunchArgument("params_file", default_value=default_file, description="Parameter file of the node."),
        DeclareLaunchArgument("namespace", default_value="", description="Of node and topics; a, b: one node each."),
        DeclareLaunchArgument("image_topic", default_value="image", description="Camera image to segment."),
        DeclareLaunchArgument("points_topic", default_value="points", description="Cloud, for labelled points."),
        DeclareLaunchArgument("depth_topic", default_value="depth", description="Or an aligned depth image."),
        DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal."),
    ]
    for name, (_, description) in _PARAMETERS.items():
        described = f"{description} Empty: as the parameter file says."
        arguments.append(DeclareLaunchArgument(name, default_value="", description=described))
    # A variable of the launch, not of one node: a camera that is started with this launch needs the profile as well.
    transport = [SetEnvironmentVariable(name, value) for name, value in dds_environment(os.environ).items()]
    return LaunchDescription([*arguments, *transport, OpaqueFunction(function=_start_node)])


def _start_node(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    overrides = {}
    for name, (kind, _) in _PARAMETERS.items():
        text = LaunchConfiguration(name).perform(context)
        if text:
            # With its type, or launch would read a model called "2" as a number.
            overrides[name] = ParameterValue(_converted(name, kind, text), value_type=kind)
    namespaces = LaunchConfiguration("namespace").perform(context).split(",")
    return [
        Node(
            package="clustvit_ros",
            executable="segmentation_node",
            name="segmentation",
            namespace=namespace.strip(),
            parameters=[LaunchConfiguration("params_file"), *([overrides] if overrides else [])],
            remappings=[(name, LaunchConfiguration(f"{name}_topic")) for name in ("image", "points", "depth")],
            ros_arguments=["--log-level", LaunchConfiguration("log_level")],
            output="screen",
            emulate_tty=True,
        )
        for namespace in namespaces
    ]


def _converted(name: str, kind: type, text: str) -> bool | int | float | str:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"launch argument {name}: got {text!r}, expected true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"launch argument {name}: got {text!r}, expected a number") from None
