# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The latency budget as a robot meets it: set and refused through the parameter service, seen in the statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParametersAtomically
from robot import Robot, double, integer, string

from clustvit_ros.node.messages import image_message

pytestmark = pytest.mark.ros

FULL_MS = 40.0
PIXELS = np.full((48, 64, 3), 200, np.uint8)  # 12 tokens; keeping one takes 12.5 ms, all of them 40


def boolean(name: str, value: bool) -> Parameter:
    return Parameter(name=name, value=ParameterValue(type=ParameterType.PARAMETER_BOOL, bool_value=value))


def p95(stats: list[dict[str, str]], name: str = "engine_ms") -> float:
    return float(np.percentile([float(pairs[name]) for pairs in stats], 95))


def wait_for_calibration(robot: Robot) -> None:
    while "slowdown" not in robot.stream(PIXELS, 1)[0]:
        pass


def set_budget(robot: Robot, budget_ms: float, **strings: str) -> float:
    """Set a budget, or the smallest that a busy machine holds now, as the refusal names it; what was set."""
    for _ in range(4):
        wanted = [double("latency_budget_ms", budget_ms), *(string(name, text) for name, text in strings.items())]
        result = robot.set_atomically(*wanted)
        if result.successful:
            return budget_ms
        budget_ms = float(result.reason.rpartition("at least ")[2])
    raise AssertionError(result.reason)


def calm(robot: Robot, budget_ms: float, name: str = "engine_ms", **expected: str) -> list[dict[str, str]]:
    """Settled frames that hold a budget. What a test machine does besides jumps: some stretch must be calm."""
    for _ in range(4):
        stats = robot.stream(PIXELS, 60, **expected)[30:]
        if p95(stats, name) <= budget_ms:
            break
    return stats


def calibrated(ros_client: Any, start_node: Callable[..., Any], namespace: str, *arguments: str) -> Robot:
    """A node that would keep every token, and has calibrated because of a budget that everything fits."""
    robot = Robot(
        ros_client, start_node, namespace, "-p", f"scripted_latency_ms:={FULL_MS}", "-p", "merge_threshold:=1.0",
        *arguments,
    )  # fmt: skip
    assert "slowdown" not in robot.stream(PIXELS, 5)[-1] and "calibrating" not in robot.process.output
    assert robot.set(double("latency_budget_ms", 60_000.0))[0].successful
    wait_for_calibration(robot)
    return robot


@pytest.fixture(scope="module")
def robot(ros_client: Any, start_node: Callable[..., Any]) -> Robot:
    """One whose budget may only merge."""
    return calibrated(ros_client, start_node, "/budget", "-p", "min_input_scale:=1.0")


@pytest.fixture(scope="module")
def wide(ros_client: Any, start_node: Callable[..., Any]) -> Robot:
    """One whose budget may shrink the input as well."""
    return calibrated(ros_client, start_node, "/wide")


@pytest.fixture(autouse=True)
def without_budget(robot: Robot) -> None:
    """Every test starts from the defaults."""
    result = robot.set_atomically(
        double("latency_budget_ms", 0.0), string("budget_reference", "inference"), double("merge_threshold", 1.0),
        string("deadline_policy", "publish_late"), integer("token_capacity", 0), integer("min_tokens", 0),
    )  # fmt: skip
    assert result.successful


def test_budget_is_held_within_thirty_frames(robot: Robot) -> None:
    free = robot.stream(PIXELS, 10, latency_budget_ms="0")
    assert {pairs["token_capacity"] for pairs in free} == {"12"}
    assert robot.set(integer("latency_budget_ms", 26))[0].successful  # below two thirds of what a frame takes
    stats = robot.stream(PIXELS, 60, latency_budget_ms="26")[30:]
    assert p95(stats) <= 26.0 < p95(free)
    assert all(int(pairs["token_capacity"]) <= int(pairs["token_ceiling"]) < 12 for pairs in stats)
    assert max(int(pairs["token_capacity"]) for pairs in stats) >= 3  # and does not hide at the bottom
    for pairs in stats:
        assert (pairs["budget_reference"], pairs["deadline_policy"]) == ("inference", "publish_late")
        assert float(pairs["predicted_ms"]) > 0 and float(pairs["slowdown"]) > 0
        assert pairs["budget_feasible"] == "true"
        assert (pairs["deadline_missed"] == "true") == (float(pairs["engine_ms"]) > 26.0)


def test_threshold_and_capacity_still_apply_under_the_ceiling(robot: Robot) -> None:
    assert robot.set_atomically(double("latency_budget_ms", 30.0), double("merge_threshold", 0.1)).successful
    assert {pairs["token_capacity"] for pairs in robot.stream(PIXELS, 5, merge_threshold="0.1")} == {"1"}
    assert robot.set_atomically(double("merge_threshold", 1.0), integer("token_capacity", 2)).successful
    assert {pairs["token_ceiling"] for pairs in robot.stream(PIXELS, 5, merge_threshold="1")} == {"2"}


def test_budget_from_stamp_counts_what_passes_outside_the_engine(robot: Robot) -> None:
    budget_ms = set_budget(robot, 38.0, budget_reference="stamp")
    stats = calm(robot, budget_ms, "age_ms", budget_reference="stamp")
    assert p95(stats, "age_ms") <= budget_ms
    assert all(float(pairs["overhead_ms"]) > 0 for pairs in stats)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            [double("latency_budget_ms", 5.0)],
            ["latency_budget_ms: got 5, but 1 of 12 tokens, the fastest", "at least 1"],
        ),
        (
            [integer("min_tokens", 9), double("latency_budget_ms", 20.0)],
            ["latency_budget_ms: got 20, but 9 of 12 tokens, the fastest", "expected 0 (off) or at least"],
        ),
        ([double("latency_budget_ms", float("nan"))], ["latency_budget_ms", "0.0", "60000.0", "nan"]),
        ([integer("latency_budget_ms", -1)], ["latency_budget_ms: got -1", "0.0 to 60000.0 ms"]),
        ([string("latency_budget_ms", "fast")], ["'fast' (string)", "0.0 to 60000.0 ms"]),
        ([string("budget_reference", "arrival")], ["'arrival'", "one of inference, stamp"]),
        ([string("deadline_policy", "skip")], ["'skip'", "one of publish_late, drop"]),
        ([integer("deadline_policy", 1)], ["1 (integer)", "one of publish_late, drop"]),
        ([double("min_tokens", 4.0)], ["4.0 (double)", "0 to 1048576 tokens"]),
        ([integer("recalibrate", 1)], ["1 (integer)", "expected a bool"]),
    ],
)
def test_refusals_name_what_is_possible_and_change_nothing(
    robot: Robot, parameters: list[Parameter], words: list[str]
) -> None:
    before = [robot.get(parameter.name) for parameter in parameters]
    result = robot.set_atomically(*parameters)
    assert not result.successful
    for word in words:
        assert word in result.reason
    assert [robot.get(parameter.name) for parameter in parameters] == before


def test_late_masks_are_dropped_and_counted(robot: Robot) -> None:
    assert robot.set_atomically(
        double("latency_budget_ms", 5000.0), string("budget_reference", "stamp"), string("deadline_policy", "drop")
    ).successful
    punctual = robot.stream(PIXELS, 1, deadline_policy="drop")[0]
    assert (punctual["published"], punctual["deadline_missed"]) == ("true", "false")
    late = image_message(PIXELS, "rgb8", robot.now())
    late.header.stamp.sec -= 10
    pairs = robot.observe(late)
    assert (pairs["published"], pairs["deadline_missed"]) == ("false", "true")
    assert int(pairs["frames_late"]) == int(punctual["frames_late"]) + 1
    assert int(pairs["deadline_misses"]) == int(punctual["deadline_misses"]) + 1
    assert robot.stream(PIXELS, 1, deadline_policy="drop")[0]["published"] == "true"
    assert not [mask for mask in robot.masks if mask.header.stamp == late.header.stamp]


def test_a_storm_of_changes_loses_no_frame_and_mixes_no_settings(robot: Robot) -> None:
    client = robot.client.node.create_client(SetParametersAtomically, "/budget/segmentation/set_parameters_atomically")
    robot.client.spin_until(client.service_is_ready, "parameter service")
    frames, futures = [], []
    for number in range(1, 1001):
        request = SetParametersAtomically.Request(
            parameters=[
                double("merge_threshold", number / 1000), double("confidence_threshold", number / 1000),
                integer("min_tokens", number), double("latency_budget_ms", 1000.0 + number),
                string("deadline_policy", ("publish_late", "drop")[number % 2]),
            ]
        )  # fmt: skip
        futures.append(client.call_async(request))
        if number % 40 == 0:
            frames.append(image_message(PIXELS, "rgb8", robot.now()))
            robot.camera.publish(frames[-1])
        if number % 8 == 0:  # a service keeps the newest ten requests
            robot.client.spin_until(lambda: all(future.done() for future in futures), "answers")
    assert all(future.result().result.successful for future in futures)
    robot.client.node.destroy_client(client)
    robot.stream(PIXELS, 1, min_tokens="1000")
    assert robot.set(double("confidence_threshold", 0.0))[0].successful

    storm = [robot.stats_of(frame) for frame in frames if robot.has_stats(frame)]
    assert len({pairs["min_tokens"] for pairs in storm}) > 3  # frames were made in the midst of it
    for pairs in storm:
        number = int(pairs["min_tokens"])
        assert float(pairs["merge_threshold"]) == float(pairs["confidence_threshold"]) == number / 1000
        assert float(pairs["latency_budget_ms"]) == 1000.0 + number
        assert pairs["deadline_policy"] == ("publish_late", "drop")[number % 2]
    counts = {key: int(value) for key, value in storm[-1].items() if key.startswith("frames_")}
    # One may wait, and one arrive. The very first ones may have been sent before their masks had a subscriber.
    assert counts.pop("frames_received") - sum(counts.values()) in (0, 1, 2)
    assert (storm[-1]["frames_failed"], storm[-1]["frames_rejected"]) == ("0", "0")


def test_recalibration_on_demand_ends_by_itself(robot: Robot) -> None:
    assert robot.process.output.count("calibrating 8 operating points for 64x48 images") == 1
    assert robot.set(boolean("recalibrate", True))[0].successful
    while robot.get("recalibrate").bool_value:
        robot.stream(PIXELS, 5)
    assert robot.process.output.count("calibrating 8 operating points for 64x48 images") == 2
    assert robot.process.output.count("latency of 64x48 images: 1 of 12 tokens 1") == 2
    assert robot.set(boolean("recalibrate", True))[0].successful
    robot.stream(PIXELS, 1)
    while robot.get("recalibrate").bool_value:
        robot.client.spin_for(0.1)
    assert robot.set(boolean("recalibrate", True))[0].successful
    robot.client.spin_for(2.5)
    assert robot.get("recalibrate").bool_value, "nothing is done before a frame comes"
    assert robot.set(boolean("recalibrate", False))[0].successful


def test_an_infeasible_start_value_is_reported_with_the_minimum(
    ros_client: Any, start_node: Callable[..., Any]
) -> None:
    arguments = ("-p", f"scripted_latency_ms:={FULL_MS}", "-p", "merge_threshold:=1.0", "-p", "latency_budget_ms:=2")
    arguments += ("-p", "min_input_scale:=1.0")
    robot = Robot(ros_client, start_node, "/tight", *arguments)
    diagnostics = ros_client.collect(DiagnosticArray, "/diagnostics")
    first = robot.stream(PIXELS, 1)[0]
    assert (first["budget_state"], first["token_ceiling"]) == ("calibrating", "1")
    wait_for_calibration(robot)
    last = robot.stream(PIXELS, 1)[0]
    assert (last["budget_state"], last["budget_feasible"], last["token_ceiling"]) == ("infeasible", "false", "1")
    robot.process.wait_for_output("latency_budget_ms: got 2, but 1 of 12 tokens, the fastest allowed, take up to 1")

    def told() -> bool:
        statuses = [status for array in diagnostics for status in array.status if status.name.startswith("tight")]
        return any("latency_budget_ms 2 cannot be held now" in status.message for status in statuses)

    ros_client.spin_until(told, "diagnostics of an infeasible budget")
    pairs = {pair.key: pair.value for status in diagnostics[-1].status for pair in status.values}
    assert int(pairs["deadline_misses"]) > 0 or int(last["deadline_misses"]) > 0


def test_a_budget_far_below_what_merging_saves_is_held_by_smaller_inputs(wide: Robot) -> None:
    budget_ms = set_budget(wide, 8.0)  # a fifth; one token at full size takes 12.5
    assert budget_ms < 11.0
    stats = calm(wide, budget_ms, latency_budget_ms=f"{budget_ms:g}")
    assert p95(stats) <= budget_ms
    # After spikes of a busy machine it is called infeasible for a while.
    states = {pairs["budget_state"] for pairs in stats}
    assert "held" in states and states <= {"held", "infeasible"}
    assert all(float(pairs["input_scale"]) < 1.0 and pairs["input_size"] != "48x64" for pairs in stats)
    assert {pairs["mask_size"] for pairs in stats} == {"48x64"}
    assert wide.set(double("latency_budget_ms", 60.0))[0].successful
    assert {pairs["input_size"] for pairs in wide.stream(PIXELS, 20, latency_budget_ms="60")[10:]} == {"48x64"}
    assert wide.set(double("latency_budget_ms", 0.0))[0].successful


def test_the_input_shrinks_without_a_budget_too_and_bounds_are_checked_together(wide: Robot) -> None:
    assert wide.set(double("latency_budget_ms", 0.0))[0].successful
    refused = wide.set(double("input_scale", 0.25))[0]
    assert not refused.successful
    assert "min_input_scale: got 0.375 with input_scale 0.25, expected 0.25 to 0.25; set both" in refused.reason
    for name, value in (("input_scale", 0.2), ("input_scale", 1.5), ("min_input_scale", 0.0)):
        result = wide.set(double(name, value))[0]
        assert not result.successful and name in result.reason and "0.25" in result.reason and "1.0" in result.reason
    assert wide.set_atomically(double("input_scale", 0.5), double("min_input_scale", 0.25)).successful
    pairs = wide.stream(PIXELS, 2, input_scale="0.5")[-1]
    assert (pairs["input_size"], pairs["mask_size"], pairs["budget_state"]) == ("32x32", "48x64", "off")
    assert wide.set_atomically(double("input_scale", 1.0), double("min_input_scale", 0.375)).successful


def test_a_budget_that_changes_all_the_time_is_followed(wide: Robot) -> None:
    for wanted_ms in (30.0, 9.0, 18.0, 12.0, 25.0):
        budget_ms = set_budget(wide, wanted_ms)
        stats = wide.stream(PIXELS, 20, latency_budget_ms=f"{budget_ms:g}")
        assert sum(float(pairs["engine_ms"]) <= budget_ms for pairs in stats) >= 16
    assert wide.set(double("latency_budget_ms", 0.0))[0].successful
