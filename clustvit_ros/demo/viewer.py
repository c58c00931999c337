# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Shows the overlay in a window, with legend, rate, tokens and budget; the node computes it because somebody looks."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import cv2
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.task import Future
from sensor_msgs.msg import Image

from clustvit_ros.classes import ClassEntry, ClassSet
from clustvit_ros.config import read_yaml
from clustvit_ros.errors import ConfigError
from clustvit_ros.images import decode_image
from clustvit_ros.measure.pictures import annotated
from clustvit_ros.node.parameter_server import ParameterServer
from clustvit_ros.node.process import run_node, spin_until_done
from clustvit_ros.paths import MODEL_FILE, find_model
from clustvit_ros.policy.parameter_spec import parameter

_TITLE = "clustvit_ros: segmentation/overlay (q closes)"
_MAX_PIXELS = 1 << 28


@dataclass(frozen=True)
class ViewerParameters:
    """What is looked at."""

    model: str = parameter("camvid_tiny", "The segmentation node's model, whose classes the legend names.")


class ViewerNode(Node):
    """Subscribes to `segmentation/overlay` and draws it.

    Raises:
        ConfigError: this OpenCV cannot open windows.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("viewer", **arguments)
        parameters = ParameterServer(self, ViewerParameters, lambda: "cannot change while it runs").current
        # Without PyTorch, which reads model folders elsewhere: this process stands beside the one that is measured.
        entries = read_yaml(find_model(parameters.model) / MODEL_FILE)["classes"]
        self._classes = ClassSet.of(ClassEntry(entry["name"], tuple(entry["colour"])) for entry in entries)
        self._arrivals_s: deque[float] = deque(maxlen=30)
        self._stats: dict[str, str] = {}
        try:
            cv2.namedWindow(_TITLE, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise ConfigError(
                "this OpenCV has no windows; install opencv-python in place of opencv-python-headless"
            ) from error
        self.done: Future = Future()
        """Set when the user closes the window."""
        self.create_subscription(Image, "segmentation/overlay", self._on_overlay, QoSProfile(depth=1))
        self.create_subscription(DiagnosticArray, "segmentation/stats", self._on_stats, QoSProfile(depth=1))

    def close(self) -> int:
        """Close the window; 0."""
        cv2.destroyAllWindows()
        return 0

    def draw(self, overlay: Any) -> Any:
        """An (H, W, 3) uint8 RGB overlay as the window shows it."""
        now_s = time.monotonic()
        self._arrivals_s.append(now_s)
        elapsed_s = now_s - self._arrivals_s[0]
        rate_hz = (len(self._arrivals_s) - 1) / elapsed_s if elapsed_s else 0.0
        names = ("engine_ms", "latency_budget_ms", "tokens_kept", "tokens_total")
        engine_ms, budget_ms, kept, total = (float(self._stats.get(name, 0)) for name in names)
        return annotated(overlay, self._classes, rate_hz, engine_ms, budget_ms, kept, int(total))

    def _on_stats(self, message: DiagnosticArray) -> None:
        self._stats = {pair.key: pair.value for pair in message.status[0].values}

    def _on_overlay(self, message: Image) -> None:
        shown = self.draw(decode_image(message, _MAX_PIXELS))
        cv2.imshow(_TITLE, cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
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
