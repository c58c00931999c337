# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A camera for demonstrations and tests: publishes pictures, a video, a device or a simulated world as a driver would.

Pictures are decoded ahead in a thread of their own, so that the rate holds. A manifest says which picture became the
message of which stamp, so that masks can be compared with labels afterwards. The simulated camera also knows its
intrinsics, the true class of every pixel and its place; they are published with the stamp of their image.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.task import Future
from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField
from std_msgs.msg import Header

from clustvit_ros.dds import CAMERA_TOPIC
from clustvit_ros.demo.frame_source import FrameReader, SourceFrame, open_source
from clustvit_ros.errors import ConfigError
from clustvit_ros.node.messages import image_message
from clustvit_ros.node.parameter_server import ParameterServer
from clustvit_ros.node.process import run_node, spin_until_done
from clustvit_ros.policy.parameter_spec import parameter


def camera_info_message(size: tuple[int, int], focal_px: float, header: Header) -> CameraInfo:
    """Intrinsics of a pinhole camera without distortion, centred on its picture.

    Args:
        size: (height, width) in pixels.
        focal_px: focal length.
        header: copied as it is.
    """
    height, width = size
    # Pixel centres lie at whole numbers in ROS.
    cx, cy = (width - 1) / 2, (height - 1) / 2
    return CameraInfo(
        header=header, height=height, width=width, distortion_model="plumb_bob", d=[0.0] * 5,
        k=[focal_px, 0.0, cx, 0.0, focal_px, cy, 0.0, 0.0, 1.0],
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[focal_px, 0.0, cx, 0.0, 0.0, focal_px, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
    )  # fmt: skip


def cloud_message(points: np.ndarray, header: Header) -> PointCloud2:
    """An organised cloud: one point per pixel.

    Args:
        points: (H, W, 3) float32 metres, NaN where nothing is.
        header: copied as it is.
    """
    height, width = points.shape[:2]
    fields = [
        PointField(name=name, offset=4 * index, datatype=PointField.FLOAT32, count=1)
        for index, name in enumerate("xyz")
    ]
    message = PointCloud2(
        header=header, height=height, width=width, fields=fields, is_bigendian=False, point_step=12,
        row_step=12 * width, is_dense=bool(np.isfinite(points).all()),
    )  # fmt: skip
    # Filling the message's own array is one memory copy; assigning to `data` checks every byte, or copies twice.
    message.data.frombytes(np.ascontiguousarray(points, "<f4").data.cast("B"))
    return message


CAMERA_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
"""Sensor data, as camera drivers offer it."""

TRUTH_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
"""As the masks that the truth is compared with."""

_START_POLL_S = 0.05
# Best-effort messages still in flight are lost when their writer goes; so it stays a little.
_LINGER_S = 1.0


@dataclass(frozen=True)
class CameraNodeParameters:
    """What to publish, and how."""

    source: str = parameter(
        "/dev/video0", "Folder of pictures, video file, /dev/videoN or N, sim or sim:SEED.", accepts_integer=True
    )
    rate_hz: float = parameter(
        30.0, "Frames per second; a device gives fewer if it must.", minimum=0.01, maximum=1000.0, unit="Hz"
    )
    loop: bool = parameter(True, "Start over at the end of a folder or video.")
    count: int = parameter(0, "End after so many frames; 0 never ends by itself.", minimum=0, maximum=2_147_483_647)
    frame_id: str = parameter("camera_optical_frame", "Frame of the images' headers.")
    width: int = parameter(0, "Scale to this width; 0 keeps the source's.", minimum=0, maximum=65_535, unit="px")
    height: int = parameter(0, "Scale to this height; 0 keeps the source's.", minimum=0, maximum=65_535, unit="px")
    wait_for_subscribers: int = parameter(
        0, "Publish nothing before so many subscribers are there.", minimum=0, maximum=1000
    )
    wait_timeout_s: float = parameter(
        60.0, "Give up when they have not come by then.", minimum=0.0, maximum=86_400.0, unit="s"
    )
    start_delay_s: float = parameter(
        0.0, "Wait before the first frame, once the subscribers are there.", minimum=0.0, maximum=3600.0, unit="s"
    )
    loop_frames: int = parameter(
        0, "The simulated drive starts over after so many frames; 0 drives on.", minimum=0, maximum=2_147_483_647
    )
    time_lapse: float = parameter(
        1.0, "Simulated seconds per second, for the simulated camera.", minimum=0.01, maximum=100.0
    )
    publish_points: bool = parameter(False, "Publish the simulated camera's points as an organised cloud.")
    manifest: str = parameter("", "File that gets one JSON line per frame: stamp_ns, index, name.")


class TruthPublishers:
    """What only the simulated camera knows: `camera_info`, `ground_truth` (mono8 class ids) and `points`.

    Args:
        node: the publishers' owner.
        focal_px: focal length of the pinhole camera.
    """

    def __init__(self, node: Node, focal_px: float) -> None:
        self._focal_px = focal_px
        self._info = node.create_publisher(CameraInfo, "camera_info", CAMERA_QOS)
        self._labels = node.create_publisher(Image, "ground_truth", TRUTH_QOS)
        self._points = node.create_publisher(PointCloud2, "points", TRUTH_QOS)

    def publish(self, frame: SourceFrame, header: Header) -> None:
        """Publish what came with an image, under its header."""
        self._info.publish(camera_info_message(frame.pixels.shape[:2], self._focal_px, header))
        if frame.labels is not None and self._labels.get_subscription_count():
            self._labels.publish(image_message(frame.labels, "mono8", header))
        if frame.points is not None and self._points.get_subscription_count():
            self._points.publish(cloud_message(frame.points, header))


class CameraNode(Node):
    """Publishes the frames of a source on `image_raw`.

    Raises:
        ConfigError: a parameter that cannot be used.
        DataError: a source that cannot be used.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("camera", **arguments)
        parameters = ParameterServer(self, CameraNodeParameters, lambda: "cannot change while the camera runs").current
        if not parameters.source:
            raise ConfigError(
                "source: got nothing, expected a folder of pictures, a video file, /dev/videoN, N or sim:SEED"
            )
        if bool(parameters.width) != bool(parameters.height):
            raise ConfigError(f"width, height: got {parameters.width} and {parameters.height}, expected both or none")
        self._parameters_ = parameters
        self._left_out: set[str] = set()
        self._source = open_source(
            parameters.source, parameters.width, parameters.height, parameters.rate_hz / parameters.time_lapse,
            parameters.publish_points, parameters.loop_frames, self._leave_out,
        )  # fmt: skip
        size = (parameters.height, parameters.width) if parameters.width else None
        self._reader = FrameReader(self._source, parameters.loop, size, 0.5 / parameters.rate_hz)
        self._manifest: TextIO | None = None
        if parameters.manifest:
            # Kept open for the node's life; line by line, so that readers see whole entries at once.
            self._manifest = Path(parameters.manifest).open("w", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._publisher = self.create_publisher(
            Image, CAMERA_TOPIC, CAMERA_QOS, qos_overriding_options=QoSOverridingOptions.with_default_policies()
        )
        self._truths = TruthPublishers(self, self._source.focal_px) if self._source.focal_px else None
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._created_s = time.monotonic()
        self._ready_s: float | None = None
        self._first_s = self._last_s = 0.0
        self._last_stamp_ns = 0
        self._sent = 0
        self._late = 0
        self.done: Future = Future()
        """Gets the process's exit code."""
        self._timer = self.create_timer(_START_POLL_S, self._start, clock=self._steady)
        awaited = parameters.wait_for_subscribers
        self.get_logger().info(
            f"{self._source.description} at {parameters.rate_hz:g} Hz -> {self._publisher.topic_name}"
            + (f", once it has {awaited} subscribers" if awaited else "")
        )

    def close(self) -> int:
        """Stop reading, write out the manifest, and say what was sent.

        Returns:
            0: what went wrong is told by `done`.
        """
        self._reader.close()
        if self._manifest is not None:
            self._manifest.close()
        self.get_logger().info(self._summary())
        return 0

    def _summary(self) -> str:
        elapsed_s = self._last_s - self._first_s
        rate = f" in {elapsed_s:.1f} s ({(self._sent - 1) / elapsed_s:.1f} Hz)" if self._sent > 1 and elapsed_s else ""
        late = f", {self._late} times no frame was ready in time" if self._late and not self._source.live else ""
        left_out = f", {len(self._left_out)} files could not be read" if self._left_out else ""
        return f"sent {self._sent} frames{rate}{late}{left_out}"

    def _leave_out(self, problem: str) -> None:
        if problem not in self._left_out:  # each file is met again with every loop
            self._left_out.add(problem)
            self.get_logger().warning(f"left out: {problem}")

    def _start(self) -> None:
        parameters = self._parameters_
        if self._publisher.get_subscription_count() < parameters.wait_for_subscribers:
            if time.monotonic() - self._created_s > parameters.wait_timeout_s:
                self._finish(
                    f"{self._publisher.topic_name}: got {self._publisher.get_subscription_count()} subscribers within "
                    f"{parameters.wait_timeout_s:g} s, expected {parameters.wait_for_subscribers}; "
                    "do they run in the same ROS domain?"
                )
            return
        self._ready_s = self._ready_s or time.monotonic()
        if time.monotonic() - self._ready_s >= parameters.start_delay_s:
            self.destroy_timer(self._timer)
            self._timer = self.create_timer(1.0 / parameters.rate_hz, self._publish_next, clock=self._steady)
            self._publish_next()

    def _publish_next(self) -> None:
        try:
            frame = self._reader.next()
        except StopIteration:
            self._finish()
            return
        except Exception as error:  # whatever the reader met, in its own words
            self._finish(str(error))
            return
        if frame is None:
            self._late += self._sent > 0
            return
        stamp_ns = max(self.get_clock().now().nanoseconds, self._last_stamp_ns + 1)
        self._last_stamp_ns = stamp_ns
        header = Header(frame_id=self._parameters_.frame_id)
        header.stamp.sec, header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)
        if self._manifest is not None:
            # Before the message, so that whoever gets the mask finds the line.
            entry = {"stamp_ns": stamp_ns, "index": self._sent, "name": frame.name}
            self._manifest.write(json.dumps(entry) + "\n")
        if self._truths is not None:
            # Before the image, whose arrival begins the work that is measured: sent beside it, they would slow it.
            self._truths.publish(frame, header)
        self._publisher.publish(image_message(frame.pixels, "bgr8", header))
        self._last_s = time.monotonic()
        self._first_s = self._first_s or self._last_s
        self._sent += 1
        if self._sent == self._parameters_.count:
            self._finish()

    def _finish(self, error: str = "") -> None:
        self.destroy_timer(self._timer)
        if error:
            self.get_logger().fatal(error)
            self.done.set_result(1)
            return
        self._timer = self.create_timer(_LINGER_S, lambda: self.done.set_result(0), clock=self._steady)


def main(arguments: list[str] | None = None) -> int:
    """Publish until the source, the count or the user ends it.

    Returns:
        0, or 1 when the source or a parameter cannot be used or nobody subscribes in time.
    """
    return run_node("camera", CameraNode, spin_until_done, arguments)


if __name__ == "__main__":
    sys.exit(main())
