# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Camera, segmentation and, on request, RViz: `ros2 launch clustvit_ros demo.launch.py source:=FOLDER rviz:=true`."""

import os

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from clustvit_ros.dds import CAMERA_TOPIC, dds_environment
from clustvit_ros.paths import share_dir

# Arguments of this file alone; those of segment.launch.py can be given as well and go through to it.
_ARGUMENTS = {
    "source": ("/dev/video0", "Folder of pictures, video file, /dev/videoN or N."),
    "rate_hz": ("10.0", "Frames per second of a folder or video."),
    "loop": ("true", "Start over at the end of a folder or video."),
    "namespace": ("", "Of nodes and topics; a, b: a camera and a node each."),
    "image_topic": (CAMERA_TOPIC, "What the camera publishes and the node segments."),
    "rviz": ("false", "Open RViz with camera, overlay and confidence."),
}


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, start the camera and include segment.launch.py."""
    share = share_dir()
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in _ARGUMENTS.items()
    ]
    # Before any node: the process that publishes the images needs the room most.
    transport = [SetEnvironmentVariable(name, value) for name, value in dds_environment(os.environ).items()]
    segmentation = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(share / "launch" / "segment.launch.py")),
        launch_arguments={name: LaunchConfiguration(name) for name in ("namespace", "image_topic")}.items(),
    )
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        arguments=["-d", str(share / "config" / "rviz" / "segmentation.rviz")],
        condition=IfCondition(LaunchConfiguration("rviz")),
        output="log",
    )
    cameras = OpaqueFunction(function=_start_cameras)
    return LaunchDescription([*arguments, *transport, cameras, segmentation, rviz])


def _start_cameras(context: LaunchContext) -> list[Node]:
    image_topic = LaunchConfiguration("image_topic").perform(context)
    beside = f"{image_topic.rpartition('/')[0]}/camera_info" if "/" in image_topic else "camera_info"
    return [
        Node(
            package="clustvit_ros",
            executable="camera_node",
            name="camera",
            namespace=namespace.strip(),
            parameters=[
                {
                    # With its type, or launch would read device "0" as a number.
                    "source": ParameterValue(LaunchConfiguration("source"), value_type=str),
                    "rate_hz": ParameterValue(LaunchConfiguration("rate_hz"), value_type=float),
                    "loop": ParameterValue(LaunchConfiguration("loop"), value_type=bool),
                }
            ],
            remappings=[(CAMERA_TOPIC, image_topic), ("camera_info", beside)],
            output="screen",
        )
        for namespace in LaunchConfiguration("namespace").perform(context).split(",")
    ]
