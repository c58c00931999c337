# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Parameter files, names and clocks that are not what their writer meant: each is told, none ends in a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import ParameterType
from rcl_interfaces.srv import DescribeParameters
from rclpy.qos import qos_profile_sensor_data
from robot import Robot, header, integer, string
from sensor_msgs.msg import CompressedImage, Image

from clustvit_ros.node.messages import image_message, png_message

pytestmark = pytest.mark.ros

PIXELS = np.full((48, 64, 3), 200, np.uint8)


def parameter_file(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_values_that_nothing_takes_are_named_with_the_nearest_name(
    start_node: Callable[..., Any], tmp_path: Path
) -> None:
    files = {
        "typing_error": "/**:\n  ros__parameters:\n    merge_treshold: 0.3\n    xyz: 1\n"
        "    qos_overrides./given/imag.subscription.depth: 3\n",
        "other_node": "segmentaton:\n  ros__parameters:\n    merge_threshold: 0.3\n",
        "root": "segmentation:\n  ros__parameters:\n    merge_threshold: 0.3\n",
        "nested": "given:\n  segmentation:\n    ros__parameters:\n      token_capacity: 7\n",
        "empty": "{}\n",
        "wildcards": "/*/segmentation:\n  ros__parameters:\n    min_tokens: 3\nother:\n  ros__parameters:\n    a: 1\n",
    }
    arguments: list[str] = []
    for name, text in files.items():
        arguments += ["--params-file", parameter_file(tmp_path / f"{name}.yaml", text)]
    process = start_node(
        "node.node", "-r", "__ns:=/given", "-p", "engine:=scripted", "-p", "model:=mine", "-p",
        "segmentation:threads:=1", *arguments,
    )  # fmt: skip
    process.wait_for_output("active:")
    process.wait_for_output("imag.subscription.depth: has no effect")
    output = process.output
    assert "merge_treshold: has no effect, there is none of that name; did you mean merge_threshold?" in output
    assert "parameter xyz: has no effect, there is none of that name; `ros2 param list` shows all" in output
    assert "did you mean qos_overrides./given/image.subscription.depth?" in output
    assert "other_node.yaml: has no effect, it is for /segmentaton and this node is /given/segmentation" in output
    assert "root.yaml: has no effect, it is for /segmentation and this node is" in output
    assert "empty.yaml: has no effect, it is for no node and" in output
    assert "segmentation:threads:=1: has no effect, it is for segmentation and this node is /given/segm" in output
    assert "nested.yaml" not in output and "wildcards.yaml" not in output
    assert "model mine has no effect: the engine scripted runs none" in output
    assert process.stop() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("/image.subscription.reliability", "fast"), ("/image.subscription.depth", "many"),
     ("/segmentation/mask.publisher.history", "7")],
)  # fmt: skip
def test_an_override_of_qos_that_means_nothing_is_named(
    start_node: Callable[..., Any], tmp_path: Path, name: str, value: str
) -> None:
    text = f"/**:\n  ros__parameters:\n    engine: scripted\n    qos_overrides.{name}: {value}\n"
    process = start_node("node.node", "--params-file", parameter_file(tmp_path / "qos.yaml", text))
    assert process.wait() == 1
    assert f"got qos_overrides.{name} " in process.output
    assert "expected history keep_last or keep_all, depth a positive number, reliability" in process.output
    assert "Traceback" not in process.output


def test_an_integer_becomes_the_number_that_its_parameter_is(ros_client: Any, start_node: Callable[..., Any]) -> None:
    robot = Robot(ros_client, start_node, "/typed", "-p", "merge_threshold:=1", "-p", "input_timeout_s:=2")
    assert robot.set(integer("latency_budget_ms", 0))[0].successful
    assert robot.set_atomically(integer("overlay_alpha", 1)).successful
    names = ["merge_threshold", "input_timeout_s", "latency_budget_ms", "overlay_alpha", "token_capacity"]
    request = DescribeParameters.Request(names=names)
    found = ros_client.call(DescribeParameters, "/typed/segmentation/describe_parameters", request).descriptors
    double = ParameterType.PARAMETER_DOUBLE
    assert [one.type for one in found] == [double] * 4 + [ParameterType.PARAMETER_INTEGER]
    assert [robot.get(name).double_value for name in names[:4]] == [1.0, 2.0, 0.0, 1.0]
    assert robot.get("overlay_alpha").type == double


def test_simulated_time_that_never_comes_is_told(ros_client: Any, start_node: Callable[..., Any]) -> None:
    robot = Robot(ros_client, start_node, "/clockless", "-p", "use_sim_time:=true")
    diagnostics = ros_client.collect(DiagnosticArray, "/diagnostics")
    pairs = robot.observe(image_message(PIXELS, "rgb8", robot.now()))
    assert 0.0 <= float(pairs["age_ms"]) < 10_000.0
    robot.process.wait_for_output("use_sim_time is set and no time comes on /clock")
    robot.process.wait_for_output("first mask: ")
    assert "of another clock" not in robot.process.output

    def newest() -> Any:
        own = [each for each in diagnostics if each.status[0].name.startswith("clockless/")]
        return own[-1] if own else None

    ros_client.send_until(
        robot.camera, image_message(PIXELS, "rgb8", robot.now()),
        lambda: newest() is not None and "no time comes on /clock" in newest().status[0].message, "the diagnostics",
    )  # fmt: skip
    assert abs(newest().header.stamp.sec - robot.now().stamp.sec) < 60
    assert newest().status[0].level == b"\x01"


def test_stamps_of_another_clock_are_told_as_such(ros_client: Any, start_node: Callable[..., Any]) -> None:
    robot = Robot(ros_client, start_node, "/foreign")
    robot.segment(image_message(PIXELS, "rgb8", header(5)))
    robot.process.wait_for_output("its image's stamp is of another clock, ")
    assert "ms after the image's stamp" not in robot.process.output


def test_topics_follow_the_nodes_name(ros_client: Any, start_node: Callable[..., Any]) -> None:
    start_node("node.node", "-r", "__node:=seg2", "-r", "__ns:=/renamed", "-p", "engine:=scripted")
    masks = ros_client.collect(Image, "/renamed/seg2/mask")
    camera = ros_client.image_publisher("/renamed/image")
    frame = image_message(PIXELS, "rgb8", header(7))
    ros_client.send_until(camera, frame, lambda: bool(masks), "a mask")
    assert ros_client.node.count_publishers("/renamed/segmentation/mask") == 0


def test_a_camera_that_publishes_compressed_images_alone_is_hinted_at(
    ros_client: Any, start_node: Callable[..., Any]
) -> None:
    camera = ros_client.node.create_publisher(CompressedImage, "/jpeg/image/compressed", qos_profile_sensor_data)
    arguments = ("-r", "__ns:=/jpeg", "-p", "engine:=scripted", "-p", "input_timeout_s:=2.0")
    process = start_node("node.node", *arguments)
    process.wait_for_output(
        "nobody publishes there, but on /jpeg/image/compressed; set image_transport:=compressed"
    )
    process.stop()
    process = start_node("node.node", *arguments, "-r", "image:=/jpeg/image/compressed")
    process.wait_for_output("expected sensor_msgs/msg/Image; set image_transport:=compressed or remap `image`")
    process.stop()
    process = start_node(
        "node.node", *arguments, "-r", "image:=/jpeg/image/compressed", "-p", "image_transport:=compressed"
    )
    process.wait_for_output("active: /jpeg/image/compressed -> /jpeg/segmentation/mask")
    masks = ros_client.collect(Image, "/jpeg/segmentation/mask")
    frame = png_message(PIXELS, "rgb8", header(9))
    ros_client.send_until(camera, frame, lambda: bool(masks), "a mask")
    ros_client.node.destroy_publisher(camera)


def test_frames_that_get_lost_on_the_way_are_told_by_the_gaps_in_their_stamps(
    ros_client: Any, start_node: Callable[..., Any]
) -> None:
    robot = Robot(ros_client, start_node, "/lossy")
    diagnostics = ros_client.collect(DiagnosticArray, "/diagnostics")
    rng = np.random.default_rng(3)

    def told() -> bool:
        own = [one.status[0].message for one in diagnostics if one.status[0].name.startswith("lossy/")]
        return any("% of the camera's frames do not arrive" in message for message in own)

    start_s = robot.now().stamp.sec
    for beat in range(2000):
        if rng.random() < 0.65:
            continue  # lost
        message = image_message(PIXELS, "rgb8", header(start_s + beat // 5))
        message.header.stamp.nanosec = beat % 5 * 200_000_000 + int(rng.integers(0, 5_000_000))
        robot.camera.publish(message)
        ros_client.spin_for(0.02)
        if told():
            break
    assert told()
    assert "export FAST" in robot.process.output and "fastdds_shm.xml" in robot.process.output


def test_a_thermal_camera_in_the_dark_of_16_bits_is_told(ros_client: Any, start_node: Callable[..., Any]) -> None:
    robot = Robot(ros_client, start_node, "/thermal")
    diagnostics = ros_client.collect(DiagnosticArray, "/diagnostics")
    values = np.random.default_rng(4).normal(7_700.0, 120.0, (48, 64)).astype("<u2")
    told = "thermal/image: intensity_range: got 0 65535, of which 16-bit pictures use 0."

    def newest() -> str:
        own = [one.status[0].message for one in diagnostics if one.status[0].name.startswith("thermal/")]
        return own[-1] if own else ""

    def send_until(condition: Callable[[], bool]) -> None:
        for _ in range(300):
            message = image_message(values.view(np.uint8).reshape(48, 128), "mono8", robot.now())
            message.encoding, message.width = "mono16", 64
            robot.camera.publish(message)
            ros_client.spin_for(0.05)
            if condition():
                return
        raise AssertionError(newest())

    send_until(lambda: "next to nothing is seen in them; set auto" in newest())
    assert robot.process.output.count(told) == 1
    assert robot.set(string("intensity_range", "auto"))[0].successful
    send_until(lambda: newest() == "segmenting")
    assert robot.process.output.count(told) == 1
