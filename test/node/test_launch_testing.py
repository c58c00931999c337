# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Camera and node under `launch`, tested with `launch_testing` where it is installed (it comes with ROS 2 from apt).

Everywhere else plain processes over DDS are tested: see test_segmentation_node.py and test_faults.py.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
pytest.importorskip("launch_testing", reason="needs launch_testing")
pytest.importorskip("launch.actions", reason="needs launch")

import cv2
import launch_testing
import numpy as np
import rclpy
from launch import LaunchDescription
from launch.actions import ExecuteProcess
from launch_testing.actions import ReadyToTest
from launch_testing.asserts import assertExitCodes
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import Image

from clustvit_ros.dds import node_environment

NAMESPACE = "/launched"


def process(module: str, *parameters: str) -> ExecuteProcess:
    """A node of this package."""
    arguments = [part for parameter in parameters for part in ("-p", parameter)]
    return ExecuteProcess(
        cmd=[sys.executable, "-m", f"clustvit_ros.{module}", "--ros-args", "-r", f"__ns:={NAMESPACE}",
             "-r", "image:=image_raw", *arguments],
        env=node_environment(os.environ),
        output="screen",
    )


@pytest.mark.launch_test
def generate_test_description() -> tuple[LaunchDescription, dict[str, Any]]:
    """Camera and node; the picture that the camera shows is for the tests."""
    folder = Path(tempfile.mkdtemp(prefix="clustvit_ros_test_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    picture = np.random.default_rng(7).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "picture.png"), picture)
    node = process("node.node", "engine:=scripted")
    camera = process("demo.camera", f"source:='{folder}'", "rate_hz:=20.0")
    return LaunchDescription([node, camera, ReadyToTest()]), {"node": node, "picture": picture}


class TestWhileItRuns(unittest.TestCase):
    """Between the start and the end of the processes."""

    def test_masks_are_those_of_the_picture(self, picture: np.ndarray) -> None:
        context = rclpy.Context()
        rclpy.init(context=context)
        client = rclpy.create_node("launch_client", context=context)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(client)
        masks: list[Image] = []
        try:
            client.create_subscription(Image, f"{NAMESPACE}/segmentation/mask", masks.append, 5)
            for _ in range(400):
                executor.spin_once(timeout_sec=0.05)
                if len(masks) >= 5:
                    break
        finally:
            client.destroy_node()
            rclpy.try_shutdown(context=context)
        self.assertGreaterEqual(len(masks), 5)
        expected = picture[..., 1] >> 6
        for mask in masks:
            np.testing.assert_array_equal(np.frombuffer(mask.data, np.uint8).reshape(48, 64), expected)

    def test_the_node_says_that_it_is_active(self, proc_output: Any, node: ExecuteProcess) -> None:
        proc_output.assertWaitFor("active:", process=node, timeout=20)


@launch_testing.post_shutdown_test()
class TestAfterShutdown(unittest.TestCase):
    """Once launch has interrupted everything."""

    def test_every_process_ended_cleanly(self, proc_info: Any) -> None:
        assertExitCodes(proc_info)
