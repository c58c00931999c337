# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A running segmentation node with a camera for it, and the messages that tests send to nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import GetParameters, SetParameters, SetParametersAtomically
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from clustvit_ros.node.messages import image_message


def double(name: str, value: float) -> Parameter:
    return Parameter(name=name, value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value))


def integer(name: str, value: int) -> Parameter:
    return Parameter(name=name, value=ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value))


def string(name: str, value: str) -> Parameter:
    return Parameter(name=name, value=ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value))


def header(stamp_s: int, frame_id: str = "front/optical") -> Header:
    result = Header(frame_id=frame_id)
    result.stamp.sec, result.stamp.nanosec = stamp_s, 123_456_789
    return result


def mask_of(message: Image) -> np.ndarray:
    """The mask as a consumer that ignores `step` reads it."""
    return np.frombuffer(message.data, np.uint8).reshape(message.height, message.width)


class Robot:
    """A running node, a camera for it, and what it published."""

    def __init__(
        self, client: Any, start_node: Callable[..., Any], namespace: str, *arguments: str, transport: str = "raw"
    ) -> None:
        self.client, self.namespace = client, namespace
        self.process = start_node("node.node", "-r", f"__ns:={namespace}", "-p", "engine:=scripted", *arguments)
        if transport == "compressed":
            self.camera = client.image_publisher(f"{namespace}/image/compressed", CompressedImage)
        else:
            self.camera = client.image_publisher(f"{namespace}/image")
        self.masks: list[Image] = client.collect(Image, f"{namespace}/segmentation/mask")
        self.stats: list[DiagnosticArray] = client.collect(DiagnosticArray, f"{namespace}/segmentation/stats")

    def segment(self, message: Image) -> Image:
        """Send a frame and return its mask."""
        stamp = message.header.stamp
        self.client.send_until(
            self.camera, message, lambda: any(mask.header.stamp == stamp for mask in self.masks), f"mask of {stamp}"
        )
        return next(mask for mask in self.masks if mask.header.stamp == stamp)

    def stats_of(self, message: Image) -> dict[str, str]:
        """The statistics that belong to a mask."""
        self.client.spin_until(lambda: self.has_stats(message), "stats")
        return self._first_stats(message)

    def observe(self, message: Image) -> dict[str, str]:
        """Send a frame and return its statistics, those of the first time where it had to be sent again."""
        self.client.send_until(self.camera, message, lambda: self.has_stats(message), "statistics")
        return self._first_stats(message)

    def has_stats(self, message: Image) -> bool:
        """Whether a frame's statistics have arrived."""
        return any(entry.header.stamp == message.header.stamp for entry in self.stats)

    def _first_stats(self, message: Image) -> dict[str, str]:
        entry = next(entry for entry in self.stats if entry.header.stamp == message.header.stamp)
        return {pair.key: pair.value for pair in entry.status[0].values}

    def set(self, *parameters: Parameter) -> Any:
        """Set parameters one by one, as `ros2 param set` does; the results."""
        request = SetParameters.Request(parameters=list(parameters))
        return self.client.call(SetParameters, f"{self.namespace}/segmentation/set_parameters", request).results

    def set_atomically(self, *parameters: Parameter) -> Any:
        """Set parameters all at once; the result."""
        request = SetParametersAtomically.Request(parameters=list(parameters))
        service = f"{self.namespace}/segmentation/set_parameters_atomically"
        return self.client.call(SetParametersAtomically, service, request).result

    def get(self, name: str) -> ParameterValue:
        """A parameter's value."""
        request = GetParameters.Request(names=[name])
        return self.client.call(GetParameters, f"{self.namespace}/segmentation/get_parameters", request).values[0]

    def now(self) -> Header:
        """A header stamped now."""
        return Header(stamp=self.client.node.get_clock().now().to_msg(), frame_id="camera")

    def stream(self, pixels: np.ndarray, frames: int, **expected: str) -> list[dict[str, str]]:
        """Send fresh frames, one at a time, until so many of them were made with the `expected` settings.

        Returns:
            Statistics of those frames.
        """
        found: list[dict[str, str]] = []
        while len(found) < frames:
            pairs = self.observe(image_message(pixels, "rgb8", self.now()))
            if expected.items() <= pairs.items():
                found.append(pairs)
        return found
