# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Requests and messages that rclpy itself stumbles over: every one is answered, and the node goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import (
    DescribeParameters,
    GetParameters,
    GetParameterTypes,
    ListParameters,
    SetParameters,
    SetParametersAtomically,
)
from robot import Robot, double, string
from rosgraph_msgs.msg import Clock

pytestmark = pytest.mark.ros

PIXELS = np.full((48, 64, 3), 200, np.uint8)


@pytest.fixture(scope="module")
def robot(ros_client: Any, start_node: Callable[..., Any]) -> Robot:
    robot = Robot(ros_client, start_node, "/hostile")
    robot.stream(PIXELS, 1)
    return robot


def call(robot: Robot, kind: Any, name: str, request: Any) -> Any:
    return robot.client.call(kind, f"/hostile/segmentation/{name}", request)


def alive(robot: Robot) -> None:
    assert robot.stream(PIXELS, 1)[0]["published"] == "true"


@pytest.mark.parametrize("kind", [*range(10), 10, 11, 77, 255])
def test_values_of_every_type_are_answered_one_by_one(robot: Robot, kind: int) -> None:
    rng = np.random.default_rng(kind)
    value = ParameterValue(
        type=kind, bool_value=True, integer_value=int(rng.integers(-(2**62), 2**62)), double_value=float("nan"),
        string_value="x" * int(rng.integers(0, 5000)), byte_array_value=[b"\x01"], bool_array_value=[True],
        integer_array_value=[1, 2], double_array_value=[0.5], string_array_value=["a", ""],
    )  # fmt: skip
    good = double("merge_threshold", 0.25 + kind / 1000)
    names = ["merge_threshold", "latency_budget_ms", "cameras", "no_such_parameter", ""]
    parameters = [good, *(Parameter(name=name, value=value) for name in names), good]
    results = call(robot, SetParameters, "set_parameters", SetParameters.Request(parameters=parameters)).results
    assert len(results) == len(parameters)
    assert results[0].successful and results[-1].successful
    assert all(result.reason for result in results if not result.successful)
    if kind > 9:
        assert all(f"type {kind}" in result.reason and "0 to 9" in result.reason for result in results[1:-1])
        request = SetParametersAtomically.Request(parameters=[double("merge_threshold", 0.9), parameters[1]])
        result = call(robot, SetParametersAtomically, "set_parameters_atomically", request).result
        assert not result.successful and f"merge_threshold: got a value of type {kind}" in result.reason
    assert robot.get("merge_threshold").double_value == pytest.approx(0.25 + kind / 1000)
    alive(robot)


@pytest.mark.parametrize("name", ["merge_exempt_classes", "merge_exempt_region", "class_groups", "cameras", "model"])
def test_a_parameter_cannot_be_deleted(robot: Robot, name: str) -> None:
    before = robot.get(name)
    nothing = Parameter(name=name, value=ParameterValue(type=ParameterType.PARAMETER_NOT_SET))
    result = robot.set(nothing)[0]
    assert not result.successful and f"{name}: cannot be deleted; set it to its default" in result.reason
    assert robot.get(name) == before
    assert name in call(robot, ListParameters, "list_parameters", ListParameters.Request()).result.names
    alive(robot)


def test_a_guard_survives_its_deletion(robot: Robot) -> None:
    assert robot.set(string("merge_exempt_region", "0.5 0 1 1"))[0].successful
    nothing = ParameterValue(type=ParameterType.PARAMETER_NOT_SET)
    assert not robot.set(Parameter(name="merge_exempt_region", value=nothing))[0].successful
    assert robot.get("merge_exempt_region").string_value == "0.5 0 1 1"


def test_a_refused_value_leaves_the_type_that_a_parameter_is_described_with(robot: Robot) -> None:
    names = ["merge_threshold", "fill_frames", "min_tokens"]

    def types() -> list[int]:
        request = DescribeParameters.Request(names=names)
        return [each.type for each in call(robot, DescribeParameters, "describe_parameters", request).descriptors]

    before = types()
    assert not any(result.successful for result in robot.set(*(string(name, "1") for name in names)))
    assert types() == before
    # rclpy itself refuses what is out of range, before anybody else is asked.
    assert not robot.set_atomically(string("fill_frames", "1"), double("merge_threshold", 7.0)).successful
    assert types() == before


def test_any_nodes_table_keeps_its_types(ros_client: Any) -> None:
    import rclpy.parameter

    from clustvit_ros.node.parameter_server import ParameterServer
    from clustvit_ros.policy.parameters import CameraParameters

    ParameterServer(ros_client.node, CameraParameters)
    result = ros_client.node.set_parameters([rclpy.parameter.Parameter("rotate", value="upright")])[0]
    assert not result.successful
    assert ros_client.node.describe_parameter("rotate").type == ParameterType.PARAMETER_INTEGER


def test_names_that_nothing_has_are_refused_by_name(robot: Robot) -> None:
    for name in ("", "no_such_parameter", "Merge_Threshold"):
        for result in (robot.set(double(name, 0.5))[0], robot.set_atomically(double(name, 0.5))):
            assert not result.successful and result.reason.startswith(f"{name!r}: there is no parameter of that name")
    result = robot.set_atomically(double("merge_threshold", 0.1), double("merge_threshold", 0.2))
    assert not result.successful and "merge_threshold: is there twice in one atomic request" in result.reason
    assert all(one.successful for one in robot.set(double("merge_threshold", 0.1), double("merge_threshold", 0.2)))
    assert robot.get("merge_threshold").double_value == 0.2
    alive(robot)


def test_the_order_of_values_in_a_request_does_not_matter(robot: Robot) -> None:
    assert robot.set(double("min_input_scale", 0.375), double("input_scale", 1.0))[0].successful
    results = robot.set(double("min_input_scale", 0.25), double("input_scale", 0.3))
    assert all(result.successful for result in results)
    results = robot.set(double("min_input_scale", 0.5), double("input_scale", 0.75))  # the first needs the second
    assert all(result.successful for result in results), results
    results = robot.set(double("min_input_scale", 0.9), double("merge_threshold", 0.3))
    assert [result.successful for result in results] == [False, True]
    robot.set(double("input_scale", 1.0), double("min_input_scale", 0.375))


@pytest.mark.parametrize(
    ("kind", "service"),
    [(DescribeParameters, "describe_parameters"), (GetParameters, "get_parameters"),
     (GetParameterTypes, "get_parameter_types")],
)  # fmt: skip
def test_names_that_nothing_has_are_answered(robot: Robot, kind: Any, service: str) -> None:
    call(robot, kind, service, kind.Request(names=["", "no such", "x" * 10_000, "merge_threshold"]))
    alive(robot)


def test_a_clock_before_its_beginning_ends_nothing(ros_client: Any, start_node: Callable[..., Any]) -> None:
    robot = Robot(ros_client, start_node, "/timeless", "-p", "use_sim_time:=true")
    publisher = ros_client.node.create_publisher(Clock, "/clock", 10)
    told, rounds = "a callback failed and was left out", 10
    # More than once: the publisher may have found the node before the node has found it.
    while told not in robot.process.output and rounds:
        rounds -= 1
        for seconds in (-1, -(2**31), 5, -7):
            message = Clock()
            message.clock.sec = seconds
            publisher.publish(message)
            ros_client.spin_for(0.2)
    robot.process.wait_for_output(told)
    assert robot.stream(PIXELS, 1)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_printed_and_nothing_is_started(option: str) -> None:
    command = [sys.executable, "-m", "clustvit_ros.node.node", option, "--ros-args", "-p", "engine:=scripted"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--params-file FILE" in done.stdout and "loading" not in done.stdout + done.stderr
