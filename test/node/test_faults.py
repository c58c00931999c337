# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What happens to cameras, clocks, consumers and devices in the field, to a node in its own process over DDS."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from robot import Robot, double, header, mask_of
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.errors import EngineError
from clustvit_ros.node.messages import image_message
from clustvit_ros.node.process import RESTART_CODE

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module")
def robot(ros_client: Any, start_node: Callable[..., Any]) -> Robot:
    return Robot(ros_client, start_node, "/faults", "-p", "input_timeout_s:=0.5")


def pixels_of(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def check(robot: Robot, pixels: np.ndarray, message: Image) -> None:
    mask = robot.segment(message)
    assert mask.header == message.header
    np.testing.assert_array_equal(mask_of(mask), pixels[..., 1] >> 6)


def test_a_camera_that_changes_its_size_and_encoding(robot: Robot, rng: np.random.Generator) -> None:
    stamp_s = 100
    for size in ((48, 64), (480, 640), (1, 1), (37, 61), (720, 1280), (48, 64)):
        for encoding in ("rgb8", "bgr8"):
            stamp_s += 1
            pixels = pixels_of(rng, *size)
            stored = pixels if encoding == "rgb8" else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
            check(robot, pixels, image_message(stored, encoding, header(stamp_s)))
    grey = pixels_of(rng, 48, 64)[..., 0]
    mask = robot.segment(image_message(grey, "mono8", header(150)))
    np.testing.assert_array_equal(mask_of(mask), grey >> 6)


def test_a_camera_that_stops_and_starts_again(robot: Robot, rng: np.random.Generator) -> None:
    reports: list[DiagnosticArray] = robot.client.collect(DiagnosticArray, "/diagnostics")

    def said(level: bytes, text: str) -> bool:
        return any(
            status.level == level and text in status.message
            for report in reports for status in report.status if status.name.startswith("faults")
        )  # fmt: skip

    pixels = pixels_of(rng, 48, 64)
    check(robot, pixels, image_message(pixels, "rgb8", header(200)))
    robot.client.spin_until(lambda: said(b"\2", "no image on /faults/image for"), "the report of silence")
    robot.client.node.destroy_publisher(robot.camera)
    robot.camera = robot.client.image_publisher("/faults/image")
    check(robot, pixels, image_message(pixels, "rgb8", header(201)))
    robot.process.wait_for_output("images arrive again on /faults/image")


def test_stamps_may_jump_as_they_like(robot: Robot, rng: np.random.Generator) -> None:
    pixels = pixels_of(rng, 48, 64)
    for stamp_s in (2**31 - 1, 300, -(2**31), -1, 1, 299):
        check(robot, pixels, image_message(pixels, "rgb8", header(stamp_s)))


def test_consumers_come_and_go(robot: Robot, rng: np.random.Generator) -> None:
    client, pixels = robot.client, pixels_of(rng, 48, 64)
    for turn in range(5):
        overlays: list[Image] = []
        subscription = client.node.create_subscription(Image, "/faults/segmentation/overlay", overlays.append, 5)
        frame = image_message(pixels, "rgb8", header(400 + turn))
        client.send_until(robot.camera, frame, lambda overlays=overlays: bool(overlays), "overlay")
        client.node.destroy_subscription(subscription)
        check(robot, pixels, image_message(pixels, "rgb8", header(450 + turn)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("minutes", [2.5, 10.0])
def test_memory_stays_while_consumers_and_parameters_change(
    ros_client: Any, start_node: Callable[..., Any], make_toy_model: Callable[..., Path], rng: np.random.Generator,
    minutes: float,
) -> None:  # fmt: skip
    namespace = f"/minutes_{minutes:g}".replace(".", "_")
    model = make_toy_model(ClassSet.numbered(4))
    arguments = ("-p", "engine:=torch", "-p", f"model:={model}", "-p", "device:=cpu", "-p", "latency_budget_ms:=200.0")
    robot = Robot(ros_client, start_node, namespace, *arguments)
    images = rng.integers(0, 256, (8, 240, 320, 3), dtype=np.uint8)
    robot.observe(image_message(images[0], "rgb8", robot.now()))
    outputs = {"confidence": Image, "overlay": Image, "clusters": Image, "mask/compressed": CompressedImage}
    client = ros_client.node.create_client(SetParameters, f"{namespace}/segmentation/set_parameters")
    ros_client.spin_until(client.service_is_ready, "the service")
    start_s, resident_mb, joined, sent = time.monotonic(), [], [], 0
    while (passed_s := time.monotonic() - start_s) < 60.0 * minutes:
        if passed_s * 30 >= sent:
            robot.camera.publish(image_message(images[sent % 8], "rgb8", robot.now()))
            sent += 1
            if sent % 150 == 0:  # every five seconds others consume, and something is asked for
                for subscription in joined:
                    ros_client.node.destroy_subscription(subscription)
                names = [name for name in outputs if rng.random() < 0.5]
                joined = [
                    ros_client.node.create_subscription(
                        outputs[name], f"{namespace}/segmentation/{name}", lambda message: None, 5
                    )
                    for name in names
                ]  # fmt: skip
                values = [double("merge_threshold", float(rng.random())), double("no_such_parameter", 1.0)]
                client.call_async(SetParameters.Request(parameters=values * 5))
                robot.masks.clear()
                robot.stats.clear()
                resident_mb.append(robot.process.resident_kb() / 1024)
        ros_client.spin_for(0.002)
    settled, last = np.median(resident_mb[len(resident_mb) // 3 :][:5]), np.median(resident_mb[-5:])
    assert abs(last - settled) < 8.0, [round(each) for each in resident_mb]
    print(f"{minutes:g} min: {settled:.1f} MB, at the end {last:.1f} MB")


def test_simulated_time_that_jumps(ros_client: Any, start_node: Callable[..., Any], rng: np.random.Generator) -> None:
    robot = Robot(ros_client, start_node, "/simulated", "-p", "use_sim_time:=true")
    clock = ros_client.node.create_publisher(Clock, "/clock", 10)
    ros_client.spin_until(lambda: clock.get_subscription_count() > 0, "subscriber of /clock")
    pixels = pixels_of(rng, 48, 64)
    for index, now_s in enumerate((0, 1000, 1001, 5, 2**31 - 2, 6)):  # a bag that starts over, and a broken clock
        time_message = Clock()
        time_message.clock.sec = now_s
        for _ in range(3):
            clock.publish(time_message)
            ros_client.spin_for(0.02)
        frame = image_message(pixels, "rgb8", header(10_000 + index))
        mask = robot.segment(frame)
        assert mask.header == frame.header
    ros_client.node.destroy_publisher(clock)
    assert "Traceback" not in robot.process.output
    assert robot.process.stop() == 0


class FailingNode:
    """A node in this process whose engine fails while `failure` is set."""

    def __init__(self, namespace: str) -> None:
        from clustvit_ros.node.node import SegmentationNode

        self.failure: Exception | None = None
        self.engines = 0
        self.node = SegmentationNode(
            self.make, 0.2, namespace=namespace, parameter_overrides=[Parameter("input_timeout_s", value=60.0)]
        )
        assert self.node.autostart()
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self.executor.spin, daemon=True)
        self.thread.start()

    def make(self, _parameters: Any, device: str) -> ScriptedEngine:
        self.engines += 1
        if device == "cpu":
            return ScriptedEngine(device="cpu (fallback)")
        if self.failure is not None:
            raise self.failure
        return ScriptedEngine(device="cuda:0 (scripted)", failure=lambda _call: self.failure)

    def close(self) -> None:
        self.executor.shutdown()
        self.thread.join(10.0)
        self.node.close()
        self.node.destroy_node()


@pytest.fixture
def failing(ros_client: Any) -> Iterator[FailingNode]:
    node = FailingNode("/failing")
    yield node
    node.close()


def test_a_gpu_that_fails_and_comes_back(ros_client: Any, failing: FailingNode, rng: np.random.Generator) -> None:
    masks: list[Image] = ros_client.collect(Image, "/failing/segmentation/mask")
    reports: list[DiagnosticArray] = ros_client.collect(DiagnosticArray, "/diagnostics")
    camera = ros_client.image_publisher("/failing/image")
    pixels = pixels_of(rng, 48, 64)

    def segment() -> None:
        before = len(masks)
        stamp = ros_client.node.get_clock().now().to_msg()
        frame = image_message(pixels, "rgb8", Header(stamp=stamp, frame_id="camera"))
        ros_client.send_until(camera, frame, lambda: len(masks) > before, "mask")
        np.testing.assert_array_equal(mask_of(masks[-1]), pixels[..., 1] >> 6)

    def status() -> Any:
        own = [s for report in reports for s in report.status if s.name.startswith("failing")]
        return own[-1] if own else None

    def reported(level: bytes, *texts: str) -> bool:
        now = status()
        return now is not None and now.level == level and all(text in now.message for text in texts)

    segment()
    ros_client.spin_until(lambda: reported(b"\0", "segmenting"), "a good report")
    busy = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    failing.failure = EngineError(f"cuda:0 failed on an image: {busy}")
    segment()  # the frame that meets the fault gets its mask as well
    ros_client.spin_until(
        lambda: reported(b"\2", "engine runs on the CPU", busy, "coming back"),
        "the fault in diagnostics",
    )
    assert {pair.key: pair.value for pair in status().values}["device"] == "cpu (fallback)"
    failing.failure = None

    def healthy() -> bool:
        segment()
        return reported(b"\0", "segmenting")

    ros_client.spin_until(healthy, "the way back")
    assert {pair.key: pair.value for pair in status().values}["device"] == "cuda:0 (scripted)"
    assert {pair.key: pair.value for pair in status().values}["frames_failed"] == "0"


def test_a_process_that_lost_its_gpu_for_good_says_so_and_ends_to_be_started_again(
    ros_client: Any, start_node: Callable[..., Any], rng: np.random.Generator
) -> None:
    process = start_node(Path(__file__).parent / "lost_node.py", "-r", "__ns:=/lost", "-p", "input_timeout_s:=60.0")
    reports: list[DiagnosticArray] = ros_client.collect(DiagnosticArray, "/diagnostics")
    ros_client.collect(Image, "/lost/segmentation/mask")  # a node that nobody listens to segments nothing
    camera = ros_client.image_publisher("/lost/image")
    frame = image_message(pixels_of(rng, 48, 64), "rgb8", Header())
    told = "this process can use its GPU no more, and ends to be started again: CUDA error: an illegal memory access"

    def reported() -> bool:
        return any(s.level == b"\2" and told in s.message for report in reports for s in report.status)

    ros_client.send_until(camera, frame, reported, "the end in diagnostics")
    assert process.wait() == RESTART_CODE == 75
    assert told in process.output and "Traceback" not in process.output


def test_a_killed_node_leaves_nothing_that_hinders_the_next(
    ros_client: Any, start_node: Callable[..., Any], rng: np.random.Generator
) -> None:
    pixels = pixels_of(rng, 48, 64)
    for turn in range(3):
        robot = Robot(ros_client, start_node, "/killed")
        check(robot, pixels, image_message(pixels, "rgb8", header(600 + turn)))
        robot.process.kill()
