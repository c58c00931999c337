# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Starts the segmentation node: `ros2 launch clustvit_ros segment.launch.py image_topic:=/camera/image_raw`.

Several cameras: `namespace:=front,rear` starts a process for each, with its own engine (`front/image_raw`,
`rear/image_raw`);
`cameras:=front,rear` starts one process whose engine they share. The topics have the same names either way.

A node that crashes or is killed is started again (`respawn:=false` leaves it ended). One that refuses its
configuration is not, and makes `ros2 launch` return 1 where nothing else keeps that running.
"""

import difflib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    TimerAction,
)
from launch.event_handlers import OnProcessExit, OnShutdown
from launch.events import Shutdown
from launch.events.process import ProcessExited
from launch.launch_description_entity import LaunchDescriptionEntity
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from clustvit_ros.dds import CAMERA_TOPIC, IMAGE_TOPIC, dds_environment
from clustvit_ros.paths import share_dir

# Launch arguments that are node parameters: left empty, the parameter file decides.
_PARAMETERS = {
    "model": (str, "Name of a shipped model, or path of a model folder."),
    "image_transport": (str, "raw, or compressed for JPEG and PNG on <image_topic>/compressed."),
    "engine": (str, "What runs it: auto, torch, cuda_graph, tensorrt, onnxruntime, onnxruntime_tensorrt or scripted."),
    "device": (str, "Where it runs: auto, cpu, cuda or cuda:N."),
    "precision": (str, "What the network computes in: auto, float32, float16, bfloat16 or int8."),
    "threads": (int, "CPU threads of the engine; 0: as many as other processes leave cores."),
    "merge_threshold": (float, "0.0 merges all tokens (fastest), 1.0 none (plain ViT)."),
    "token_capacity": (int, "At most so many tokens are kept; 0 leaves it to the threshold."),
    "input_scale": (float, "Share of the sides of the model's input at which images are segmented, 0.25 to 1."),
    "latency_budget_ms": (float, "A frame may take so many milliseconds; 0 is no budget."),
    "confidence_threshold": (float, "Pixels less confident than this become 255 (unlabelled)."),
    "output_size": (str, "Size of the mask: input, model, or a fixed one such as 480x640."),
    "cameras": (str, "Cameras that share one process and engine, separated by commas; image_topic is not used."),
    "autostart": (bool, "Configure and activate at start; false waits for a lifecycle manager."),
    "use_sim_time": (bool, "Take the time from /clock."),
}


_ARGUMENTS = {
    "params_file": (str(share_dir() / "config" / "segment.yaml"), "Parameter file of the node."),
    "namespace": ("", "Of node and topics; a, b: one node each."),
    "image_topic": (CAMERA_TOPIC, "Camera image to segment."),
    "points_topic": ("points", "Cloud, for labelled points."),
    "depth_topic": ("depth", "Or an aligned depth image."),
    "log_level": ("info", "debug, info, warn, error or fatal."),
    "respawn": ("true", "Start a node that crashed again; one that refuses its configuration stays ended."),
}
_RESPAWN_DELAY_S = 1.0
_RESTARTS_PER_MINUTE = 3
_REFUSED = 1  # the node's exit code then; a crash has another


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and start the node."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in _ARGUMENTS.items()
    ]
    for name, (_, description) in _PARAMETERS.items():
        described = f"{description} Empty: as the parameter file says."
        arguments.append(DeclareLaunchArgument(name, default_value="", description=described))
    # A variable of the launch, not of one node: a camera that is started with this launch needs the profile as well.
    transport = [SetEnvironmentVariable(name, value) for name, value in dds_environment(os.environ).items()]
    return LaunchDescription([*arguments, *transport, OpaqueFunction(function=_start_nodes)])


def _start_nodes(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    overrides = {}
    for name, (kind, _) in _PARAMETERS.items():
        text = LaunchConfiguration(name).perform(context)
        if text:
            # With its type, or launch would read a model called "2" as a number.
            overrides[name] = ParameterValue(_converted(name, kind, text), value_type=kind)
    file = LaunchConfiguration("params_file").perform(context)
    if not Path(file).is_file():
        raise ValueError(f"launch argument params_file: got {file!r}, expected a parameter file that exists")
    respawn = _converted("respawn", bool, LaunchConfiguration("respawn").perform(context))
    cameras = re.findall(r"\w+", LaunchConfiguration("cameras").perform(context))
    failures: list[str] = []

    def node(namespace: str) -> Node:
        return Node(
            package="clustvit_ros",
            executable="segmentation_node",
            name="segmentation",
            namespace=namespace,
            parameters=[file, *([overrides] if overrides else [])],
            remappings=[
                (IMAGE_TOPIC, LaunchConfiguration("image_topic")),
                *((f"{name}/{IMAGE_TOPIC}", f"{name}/{CAMERA_TOPIC}") for name in cameras),
                *((name, LaunchConfiguration(f"{name}_topic")) for name in ("points", "depth")),
            ],
            ros_arguments=["--log-level", LaunchConfiguration("log_level")],
            output="screen",
            emulate_tty=True,
        )

    def report(event: Shutdown, context: LaunchContext) -> None:
        # The only way to a return code; not while other processes wait for their handlers of this event.
        if failures and event.reason == "idle":
            raise RuntimeError("; ".join(failures))

    entities = [*_hints(context), RegisterEventHandler(OnShutdown(on_shutdown=report))]
    for namespace in LaunchConfiguration("namespace").perform(context).split(","):
        entities += _watched(lambda name=namespace.strip(): node(name), bool(respawn), failures)
    return entities


def _watched(
    make: Callable[[], Node], respawn: bool, failures: list[str], restarts: tuple[float, ...] = ()
) -> list[LaunchDescriptionEntity]:
    """A node, and what happens when its process ends.

    Args:
        make: makes the node anew.
        respawn: whether to start it again after a crash.
        failures: gets a sentence when it ended for good and was not told to.
        restarts: monotonic seconds of its latest restarts.
    """
    node = make()

    def on_exit(event: ProcessExited, context: LaunchContext) -> list[LaunchDescriptionEntity] | None:
        if context.is_shutdown or event.returncode == 0:
            return None
        if event.returncode != _REFUSED and respawn:
            now_s = time.monotonic()
            latest = restarts[-_RESTARTS_PER_MINUTE:]
            full = len(latest) == _RESTARTS_PER_MINUTE
            delay_s = max(latest[0] + 60.0 - now_s, _RESPAWN_DELAY_S) if full else _RESPAWN_DELAY_S
            told = LogInfo(
                msg=f"segmentation_node ended with exit code {event.returncode} and is started again in {delay_s:.0f} s"
            )
            again = _watched(make, respawn, failures, (*latest, now_s + delay_s))
            return [told, TimerAction(period=delay_s, actions=again)]
        failures.append(f"segmentation_node ended with exit code {event.returncode}; its log says why")
        return None

    return [RegisterEventHandler(OnProcessExit(target_action=node, on_exit=on_exit)), node]


def _hints(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """Names the arguments of the command line that this file does not have, with the nearest one that it has."""
    own = {*_PARAMETERS, *_ARGUMENTS}
    given = {text.partition(":=")[0] for text in context.argv if ":=" in text}
    # A file that includes this one has arguments of its own.
    included = bool(set(context.launch_configurations) - own - given)
    hints = []
    for name in sorted(given - own):
        nearest = difflib.get_close_matches(name, own, 1)
        if nearest or not included:
            remedy = f"did you mean {nearest[0]}?" if nearest else "`--show-args` lists all"
            hints.append(LogInfo(msg=f"launch argument {name}: has no effect, segment.launch.py has none; {remedy}"))
    return hints


def _converted(name: str, kind: type, text: str) -> bool | int | float | str:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"launch argument {name}: got {text!r}, expected true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"launch argument {name}: got {text!r}, expected a number") from None
