# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Shows the overlay in a window; the node computes it only because somebody looks."""

from __future__ import annotations

import sys
from typing import Any

import cv2
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.task import Future
from sensor_msgs.msg import Image

from clustvit_ros.errors import ConfigError
from clustvit_ros.images import decode_image
from clustvit_ros.node.process import run_node, spin_until_done

_TITLE = "clustvit_ros: segmentation/overlay (q closes)"
_MAX_PIXELS = 1 << 28


class ViewerNode(Node):
    """Subscribes to `segmentation/overlay` and draws it.

    Raises:
        ConfigError: this OpenCV cannot open windows.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("viewer", **arguments)
        try:
            cv2.namedWindow(_TITLE, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise ConfigError(
                "this OpenCV has no windows; install opencv-python in place of opencv-python-headless"
            ) from error
        self.done: Future = Future()
        """Set when the user closes the window."""
        self.create_subscription(Image, "segmentation/overlay", self._on_overlay, QoSProfile(depth=1))

    def close(self) -> int:
        """Close the window; 0."""
        cv2.destroyAllWindows()
        return 0

    def _on_overlay(self, message: Image) -> None:
        cv2.imshow(_TITLE, cv2.cvtColor(decode_image(message, _MAX_PIXELS), cv2.COLOR_RGB2BGR))
        if cv2.waitKey(1) & 0xFF == ord("q") and not self.done.done():
            self.done.set_result(0)


def main(arguments: list[str] | None = None) -> int:
    """Show overlays until the window is closed.

    Returns:
        0, or 1 when there can be no window.
    """
    return run_node("viewer", ViewerNode, spin_until_done, arguments)


if __name__ == "__main__":
    sys.exit(main())
