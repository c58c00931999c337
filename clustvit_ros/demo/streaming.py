# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A camera at full rate, and the consumer of its masks: measures what the consumer holds (streaming mIoU).

The drive is rendered before it begins, so that the renderer takes no time from the node. The same frames are sent three
times: one by one, each once the mask of the one before is there (`fresh`), then at the camera's rate without filling
(`held`) and with it (`filled`). Everything is scored afterwards; see `measure/streaming.py` for what counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from clustvit_ros.dds import CAMERA_TOPIC
from clustvit_ros.demo.camera import CAMERA_QOS, TRUTH_QOS
from clustvit_ros.demo.frame_source import open_source, sim_seed
from clustvit_ros.demo.parameter_client import ParameterClient
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.measure.metrics import ConfusionMatrix
from clustvit_ros.node.messages import image_message, stamp_ns
from clustvit_ros.node.parameter_server import ParameterServer
from clustvit_ros.node.process import run_node
from clustvit_ros.paths import replacing
from clustvit_ros.policy import percentile
from clustvit_ros.policy.parameter_spec import parameter

# Frames sent before those that count, of the same drive: until the node knows how long its engine takes.
_WARM_UP_FRAMES = 30


@dataclass(frozen=True)
class StreamingParameters:
    """What to drive, and how fast."""

    source: str = parameter("sim", "sim or sim:SEED.", accepts_integer=True)
    rate_hz: float = parameter(30.0, "Frames per second.", minimum=0.5, maximum=240.0, unit="Hz")
    frames: int = parameter(90, "Frames that count.", minimum=2, maximum=1000)
    fresh: bool = parameter(True, "Score every frame's own mask, too, which takes as long as the engine needs.")
    output: str = parameter("streaming.json", "File that gets the figures.")
    timeout_s: float = parameter(
        60.0, "Give up when the node is not there, or silent for so long.", minimum=0.1, maximum=3600.0, unit="s"
    )


class StreamingNode(Node):
    """Sends, listens, scores.

    Raises:
        ConfigError: a parameter that cannot be used.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("streaming", **arguments)
        self._options = ParameterServer(self, StreamingParameters, lambda: "cannot change while it runs").current
        if sim_seed(self._options.source) is None:
            raise ConfigError(f"source: got {self._options.source!r}, expected sim or sim:SEED, whose truth is known")
        self._executor: SingleThreadedExecutor | None = None
        self._masks: list[tuple[int, float, Image]] = []
        self._stats: dict[int, dict[str, str]] = {}
        self._camera = self.create_publisher(Image, CAMERA_TOPIC, CAMERA_QOS)
        self.create_subscription(Image, "segmentation/mask", self._on_mask, TRUTH_QOS)
        self.create_subscription(DiagnosticArray, "segmentation/stats", self._on_stats, 50)

    def close(self) -> int:
        """Nothing to stop; 0."""
        return 0

    def run(self, executor: SingleThreadedExecutor) -> int:
        """Go through all phases and write them.

        Returns:
            0.

        Raises:
            ClustvitError: the node is not there, or fell silent.
        """
        self._executor = executor
        options = self._options
        frames = self._render(options.frames + _WARM_UP_FRAMES)
        self._wait(lambda: self._camera.get_subscription_count() > 0, f"a node that subscribes to {CAMERA_TOPIC}")
        segmentation, phases = ParameterClient(self, executor, "segmentation", options.timeout_s), {}
        if options.fresh:
            segmentation.assign(fill_frames=False)
            phases["fresh"] = self._score(frames, *self._one_by_one(frames))
        for name, fill in (("held", False), ("filled", True)):
            segmentation.assign(fill_frames=fill)
            phases[name] = self._score(frames, *self._at_rate(frames))
            text = ", ".join(f"{key} {value}" for key, value in phases[name].items())
            self.get_logger().info(f"{name}: {text}")
        segmentation.assign(fill_frames=False)
        report = {"source": options.source, "rate_hz": options.rate_hz, "frames": options.frames, **phases}
        with replacing(Path(options.output)) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return 0

    def _render(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        source = open_source(self._options.source, rate_hz=self._options.rate_hz, loop_frames=count)
        frames: list[tuple[np.ndarray, np.ndarray]] = []
        for frame in source:
            assert frame.labels is not None
            frames.append((frame.pixels, frame.labels))
            if len(frames) == count:
                break
        return frames

    def _one_by_one(self, frames: list[tuple[np.ndarray, np.ndarray]]) -> tuple[list[int], list[float]]:
        stamps, times = [], []
        for pixels, _ in frames[_WARM_UP_FRAMES:]:
            deadline_s = time.monotonic() + self._options.timeout_s
            while True:  # best effort: a frame may be lost
                stamps_s = self._send(pixels)
                patience_s = time.monotonic() + 2.0
                self._spin_until(lambda: self._has_mask(stamps_s[0]) or time.monotonic() > patience_s)  # noqa: B023
                if self._has_mask(stamps_s[0]):
                    break
                if time.monotonic() > deadline_s:
                    raise ClustvitError(f"no mask within {self._options.timeout_s:g} s; the node's output says more")
            stamps.append(stamps_s[0])
            times.append(time.monotonic())
        return stamps, times

    def _at_rate(self, frames: list[tuple[np.ndarray, np.ndarray]]) -> tuple[list[int], list[float]]:
        """Stamps of the frames that count, and when each was sent, with the end of the last one's period."""
        self._masks.clear()
        stamps, times = [], []
        period_s = 1.0 / self._options.rate_hz
        start_s = time.monotonic()
        for index, (pixels, _) in enumerate(frames):
            self._spin_until(lambda: time.monotonic() >= start_s + index * period_s)  # noqa: B023
            stamp, sent_s = self._send(pixels)
            if index >= _WARM_UP_FRAMES:
                stamps.append(stamp)
                times.append(sent_s)
        end_s = time.monotonic() + 1.0
        self._spin_until(lambda: time.monotonic() >= end_s)  # what is on its way arrives
        return stamps, times

    def _send(self, pixels: np.ndarray) -> tuple[int, float]:
        header = Header(stamp=self.get_clock().now().to_msg(), frame_id="camera")
        message = image_message(pixels, "bgr8", header)
        sent_s = time.monotonic()
        self._camera.publish(message)
        return stamp_ns(message), sent_s

    def _score(
        self, frames: list[tuple[np.ndarray, np.ndarray]], stamps: list[int], times: list[float]
    ) -> dict[str, Any]:
        truths = [labels for _, labels in frames[_WARM_UP_FRAMES:]]
        masks = sorted(self._masks, key=lambda mask: mask[1])
        own = {stamp: at_s for stamp, at_s, _ in masks}
        matrix, unscored = ConfusionMatrix(int(max(labels.max() for labels in truths)) + 1), 0
        period_s = times[1] - times[0] if len(times) > 1 else 1.0 / self._options.rate_hz
        for index, labels in enumerate(truths):
            end_s = times[index + 1] if index + 1 < len(times) else times[index] + period_s
            fitting = [mask for stamp, at_s, mask in masks if at_s <= end_s and stamp <= stamps[index]]
            if not fitting:
                unscored += 1
                continue
            matrix.add(labels, _labels_of(fitting[-1], labels.shape))
        delays = [1000 * (own[stamp] - sent_s) for stamp, sent_s in zip(stamps, times, strict=True) if stamp in own]
        stats = [self._stats[stamp] for stamp in stamps if stamp in self._stats]
        filled = [1000 * (own[s] - t) for s, t in zip(stamps, times, strict=True)
                  if s in own and self._stats.get(s, {}).get("filled") == "true"]  # fmt: skip
        order = [stamp for stamp, _, _ in masks]
        return {
            "miou": round(100 * float(matrix.miou()), 2), "frames_without_any_mask": unscored,
            "coverage": round(len(delays) / len(stamps), 4), "in_order": order == sorted(order),
            "delay_p50_ms": round(percentile(delays, 0.5), 1) if delays else None,
            "delay_p95_ms": round(percentile(delays, 0.95), 1) if delays else None,
            "filled_share": round(len(filled) / len(stamps), 4),
            "filled_p95_ms": round(percentile(filled, 0.95), 1) if filled else None,
            "engine_p50_ms": round(percentile([float(s["engine_ms"]) for s in stats], 0.5), 1) if stats else None,
            "threads": sorted({s.get("threads", "") for s in stats}),
            "engine_rate_hz": round(_engine_calls(stats) / (len(stamps) * period_s), 2),
        }  # fmt: skip

    def _has_mask(self, stamp: int) -> bool:
        return any(mask[0] == stamp for mask in self._masks[-3:])

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + self._options.timeout_s
        self._spin_until(lambda: condition() or time.monotonic() > deadline_s)
        if not condition():
            raise ClustvitError(f"waited {self._options.timeout_s:g} s for {what}; the node's own output says more")

    def _spin_until(self, condition: Callable[[], bool]) -> None:
        assert self._executor is not None
        while not condition():
            self._executor.spin_once(timeout_sec=0.002)

    def _on_mask(self, message: Image) -> None:
        self._masks.append((stamp_ns(message), time.monotonic(), message))

    def _on_stats(self, message: DiagnosticArray) -> None:
        self._stats[stamp_ns(message)] = {pair.key: pair.value for pair in message.status[0].values}


def _engine_calls(stats: list[dict[str, str]]) -> int:
    """How many engine results these frames show: their own, and those that were carried to them."""
    origins = set()
    for index, pairs in enumerate(stats):
        carried = pairs.get("filled") == "true"
        first = not carried or pairs["filled_frames"] == "1"
        if first:
            origins.add(index)
    return len(origins)


def _labels_of(message: Image, size: tuple[int, ...]) -> np.ndarray:
    mask = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width)
    return mask if mask.shape == size else cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)


def main(arguments: list[str] | None = None) -> int:
    """Measure.

    Returns:
        0, or 1 when the node is not there or a parameter cannot be used.
    """
    return run_node("streaming", StreamingNode, StreamingNode.run, arguments)


if __name__ == "__main__":
    sys.exit(main())
