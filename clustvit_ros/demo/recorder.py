# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Records what the segmentation node publishes: masks and overlays as pictures, latencies and statistics as JSON.

It subscribes to the camera only once it hears the masks' publisher, so that a camera that waits for two subscribers
(node and recorder) starts when nothing can be missed any more.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.task import Future
from sensor_msgs.msg import Image

from clustvit_ros.dds import CAMERA_TOPIC
from clustvit_ros.demo.recording import Manifest, Recording
from clustvit_ros.errors import DataError
from clustvit_ros.images import decode_image, write_image
from clustvit_ros.node.messages import stamp_ns
from clustvit_ros.node.parameter_server import ParameterServer
from clustvit_ros.node.process import run_node, spin_until_done
from clustvit_ros.policy.parameter_spec import parameter

SUMMARY_NAME = "recording.json"

_RECORD_QOS = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
_IMAGE_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
_CHECK_PERIOD_S = 0.1
# A frame's image and truth come while the engine begins with it: they are unpacked when it has usually ended.
_UNPACK_AFTER_S = 0.06
_UNPACK_PERIOD_S = 0.02
# Companions of the last expected mask (overlay, stats) are published right after it.
_SETTLE_S = 0.5
_MAX_PENDING_FILES = 256
_MAX_PIXELS = 1 << 28
# Images and truths are kept until their mask comes; a slow node leaves out many.
_MAX_WAITING = 64


@dataclass(frozen=True)
class RecorderParameters:
    """What to record, and until when; whichever end comes first ends it."""

    output_folder: str = parameter("recording", "Folder that gets masks/, overlays/ and recording.json.")
    manifest: str = parameter("", "The camera node's manifest; names the files after the pictures.")
    save_masks: bool = parameter(True, "Write every mask as PNG.")
    save_confidence: bool = parameter(False, "Write every confidence map as PNG.")
    save_images: bool = parameter(False, "Write every camera image as JPEG.")
    save_ground_truth: bool = parameter(False, "Write the simulated camera's true classes as PNG.")
    save_clusters: bool = parameter(False, "Write every cluster map as PNG; else none is computed.")
    overlay_every: int = parameter(
        1, "Write every n-th overlay as JPEG; 0 does not subscribe to it, so that none is computed.",
        minimum=0, maximum=1_000_000,
    )  # fmt: skip
    expected_masks: int = parameter(0, "End after so many masks; 0 has no such end.", minimum=0, maximum=2_147_483_647)
    duration_s: float = parameter(0.0, "End after this; 0 has no such end.", minimum=0.0, maximum=86_400.0, unit="s")
    idle_timeout_s: float = parameter(
        5.0, "End when no mask came for so long, after the first.", minimum=0.1, maximum=3600.0, unit="s"
    )
    start_timeout_s: float = parameter(120.0, "End when no mask comes at all.", minimum=0.1, maximum=86_400.0, unit="s")


class PictureWriter:
    """Writes pictures in a thread of its own, so that arrival times stay true."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[Path, np.ndarray] | None] = queue.Queue(_MAX_PENDING_FILES)
        self.failed: list[str] = []
        """Files that could not be written."""
        self._thread = threading.Thread(target=self._run, name="picture-writer", daemon=True)
        self._thread.start()

    def write(self, path: Path, pixels: np.ndarray) -> None:
        """Write (H, W) labels or (H, W, 3) RGB to `path`, soon."""
        self._jobs.put((path, pixels))

    def close(self) -> None:
        """Finish what is pending."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                write_image(*job)
            except DataError:
                self.failed.append(str(job[0]))


class RecorderNode(Node):
    """Subscribes to the node's outputs and keeps them.

    Raises:
        ConfigError: a parameter that cannot be used.
        OSError: the output folder cannot be made.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("recorder", **arguments)
        self._options = ParameterServer(self, RecorderParameters, lambda: "cannot change while recording").current
        self._folder = Path(self._options.output_folder).expanduser()
        extras = {
            "image": self._options.save_images,
            "ground_truth": self._options.save_ground_truth,
            "clusters": self._options.save_clusters,
        }
        for name in ("masks", "confidences", "overlays", *(kind for kind, wanted in extras.items() if wanted)):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        self._recording = Recording(Manifest(Path(self._options.manifest) if self._options.manifest else None))
        self._writer = PictureWriter()
        self._masked: set[int] = set()
        self._waiting: dict[int, list[tuple[str, Image]]] = {}
        self._packed: deque[tuple[float, str, bytes]] = deque()
        self._created_s = time.monotonic()
        self._last_mask_s: float | None = None
        self._ended_by = "signal"
        self.done: Future = Future()
        """Gets the reason why the recording ended."""
        self._mask_topic = self.create_subscription(Image, "segmentation/mask", self._on_mask, _RECORD_QOS).topic_name
        self.create_subscription(DiagnosticArray, "segmentation/stats", self._on_stats, _RECORD_QOS)
        if self._options.save_confidence:
            self.create_subscription(Image, "segmentation/confidence", self._on_confidence, _RECORD_QOS)
        if self._options.overlay_every:
            self.create_subscription(Image, "segmentation/overlay", self._on_overlay, _RECORD_QOS)
        if self._options.save_ground_truth:
            self.create_subscription(Image, "ground_truth", partial(self._pack, "ground_truth"), _RECORD_QOS, raw=True)
        if self._options.save_clusters:
            self.create_subscription(Image, "segmentation/clusters", partial(self._on_extra, "clusters"), _RECORD_QOS)
        self._image: Any = None
        self.create_timer(_CHECK_PERIOD_S, self._check, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.create_timer(_UNPACK_PERIOD_S, self._unpack, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.get_logger().info(f"recording {self._mask_topic} into {self._folder}")

    def close(self) -> int:
        """Write the summary.

        Returns:
            0 when at least one mask was recorded, else 1.
        """
        self._unpack(0.0)
        self._writer.close()
        summary = self._recording.summary(self._ended_by)
        summary["files_failed"] = self._writer.failed
        (self._folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        latency = summary["latency_ms"] or {}
        text = "".join(f", {name} {latency[name]:.1f} ms" for name in ("p50", "p95", "p99") if latency)
        self.get_logger().info(f"recorded {self._recording.masks} masks{text}; ended by {self._ended_by}")
        return 0 if self._recording.masks else 1

    def _on_image(self, message: bytes) -> None:
        self._recording.images += 1
        if self._options.save_images:
            self._pack("image", message)

    def _pack(self, kind: str, message: bytes) -> None:
        self._packed.append((time.monotonic(), kind, message))

    def _unpack(self, age_s: float = _UNPACK_AFTER_S) -> None:
        """Take what came with a frame, but not while the engine works on that frame and needs the cores."""
        while self._packed and time.monotonic() - self._packed[0][0] >= age_s:
            _, kind, message = self._packed.popleft()
            self._on_extra(kind, deserialize_message(message, Image))

    def _on_extra(self, kind: str, message: Image) -> None:
        stamp = stamp_ns(message)
        if stamp in self._masked:
            self._save_extra(kind, message)
            return
        self._waiting.setdefault(stamp, []).append((kind, message))
        while len(self._waiting) > _MAX_WAITING:
            # Of frames that the node dropped there will be no mask.
            del self._waiting[next(iter(self._waiting))]

    def _save_extra(self, kind: str, message: Image) -> None:
        stamp = stamp_ns(message)
        file = f"{kind}/{self._recording.file_stem(stamp)}{'.jpg' if kind == 'image' else '.png'}"
        pixels = decode_image(message, _MAX_PIXELS).copy() if kind == "image" else _pixels_of(message)
        self._writer.write(self._folder / file, pixels)
        self._recording.add_file(stamp, kind, file)

    def _on_mask(self, message: Image) -> None:
        arrival_ns = self.get_clock().now().nanoseconds
        stamp = stamp_ns(message)
        self._last_mask_s = time.monotonic()
        file = None
        if self._options.save_masks:
            file = f"masks/{self._recording.file_stem(stamp)}.png"
            self._writer.write(self._folder / file, _pixels_of(message))
        self._recording.add_mask(stamp, (arrival_ns - stamp) / 1e6, self._last_mask_s, file)
        self._masked.add(stamp)
        for kind, extra in self._waiting.pop(stamp, []):
            self._save_extra(kind, extra)

    def _on_confidence(self, message: Image) -> None:
        file = f"confidences/{self._recording.file_stem(stamp_ns(message))}.png"
        self._writer.write(self._folder / file, _pixels_of(message))

    def _on_overlay(self, message: Image) -> None:
        stamp = stamp_ns(message)
        file = None
        if self._recording.overlays % self._options.overlay_every == 0:
            file = f"overlays/{self._recording.file_stem(stamp)}.jpg"
            self._writer.write(self._folder / file, decode_image(message, _MAX_PIXELS).copy())
        self._recording.add_overlay(stamp, file)

    def _on_stats(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self._recording.add_stats(stamp_ns(message), {pair.key: pair.value for pair in status.values})

    def _check(self) -> None:
        if self._image is None and self.count_publishers(self._mask_topic):
            # Serialized messages are counted without the cost of unpacking a megabyte each.
            self._image = self.create_subscription(Image, CAMERA_TOPIC, self._on_image, _IMAGE_QOS, raw=True)
        now_s, options = time.monotonic(), self._options
        elapsed_s = now_s - self._created_s
        if self._last_mask_s is None:
            if elapsed_s > options.start_timeout_s:
                self._end(f"start_timeout_s: no mask on {self._mask_topic} within {options.start_timeout_s:g} s")
        elif options.expected_masks and self._recording.masks >= options.expected_masks:
            if now_s - self._last_mask_s > _SETTLE_S:
                self._end("expected_masks")
        elif now_s - self._last_mask_s > options.idle_timeout_s:
            self._end("idle_timeout_s")
        if options.duration_s and elapsed_s > options.duration_s:
            self._end("duration_s")

    def _end(self, reason: str) -> None:
        if not self.done.done():
            self._ended_by = reason
            self.done.set_result(0)


def _pixels_of(message: Image) -> np.ndarray:
    # Values as they are: `decode_image` would scale 16-bit labels like brightness.
    dtype = np.uint8 if message.encoding == "mono8" else np.uint16
    return np.frombuffer(message.data, dtype).reshape(message.height, message.width)


def main(arguments: list[str] | None = None) -> int:
    """Record until one of the ends is reached, or a signal comes; the summary is written in any case.

    Returns:
        0 when at least one mask was recorded, else 1.
    """
    return run_node("recorder", RecorderNode, spin_until_done, arguments)


if __name__ == "__main__":
    sys.exit(main())
