#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Measures what the segmentation node itself adds to each frame, engine excluded.

The real node runs here with an engine that costs nothing; a camera and a recorder run as processes beside it, so that
everything goes over DDS as it does on a robot. Usage: `python scripts/node_overhead.py [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from clustvit_ros.classes import ClassSet
from clustvit_ros.dds import CAMERA_TOPIC, IMAGE_TOPIC, claim_domain, dds_environment, node_environment
from clustvit_ros.engine import Engine, EngineInfo, Prediction, Settings, Stats
from clustvit_ros.policy import percentile

_ROWS = {
    "decode_ms": "decode: message to RGB",
    "publish_ms": "build and publish mask and confidence",
    "added_ms": "both together (goal: 3 ms or less)",
    "age_ms": "camera's stamp to mask published, DDS included",
    "cpu_ms": "CPU of the whole node process per frame, every thread",
}


class FixedEngine(Engine):
    """Returns the same prediction at once."""

    def __init__(self, size: tuple[int, int]) -> None:
        maps = np.zeros((1, *size), np.uint8)
        stats = Stats(tokens_total=1, tokens_kept=1.0, token_capacity=1, merge_threshold=0.5, total_ms=0.001)
        self._prediction = Prediction(maps, maps, None, stats)
        self.cpu_ms: list[float] = []
        """CPU time of the whole process at each call."""
        self._info = EngineInfo("fixed", "fixed", "cpu", "", "none", ClassSet(("any",), ((0, 0, 0),)), size, 1)

    @property
    def info(self) -> EngineInfo:
        """Nothing runs, nowhere."""
        return self._info

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Nothing to warm up."""

    def input_size(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, int]:
        """One: nothing is scaled."""
        return self._info.input_size

    def capacities(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, ...]:
        """One: nothing is merged."""
        return (1,)

    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        """The prediction that it was made with."""
        self.cpu_ms.append(time.process_time() * 1000.0)
        return self._prediction


def measure(size: tuple[int, int], frames: int, rate_hz: float) -> dict[str, Any]:
    """Run camera, node and recorder, and return the medians.

    Args:
        size: (height, width) of the camera's images.
        frames: how many are sent.
        rate_hz: how fast.

    Returns:
        `size`, `masks`, and `milliseconds`: for each row of the table `median` and `p95`.
    """
    os.environ.update(dds_environment(os.environ), ROS_DOMAIN_ID=str(claim_domain()))
    # After the environment is set: DDS reads it once.
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    from clustvit_ros.node.node import SegmentationNode
    from clustvit_ros.node.process import keep_freed_memory

    keep_freed_memory()
    rclpy.init(args=[])
    engine = FixedEngine(size)
    node = SegmentationNode(lambda _parameters, _device: engine)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(pictures / "noise.bmp"), noise)
        recorder = _start(
            "demo.recorder", output_folder=folder, save_masks="false", save_confidence="true", overlay_every=0,
            expected_masks=frames,
        )  # fmt: skip
        camera = _start(
            "demo.camera", source=pictures, rate_hz=rate_hz, count=frames, wait_for_subscribers=2, start_delay_s=0.5
        )
        node.autostart()
        while recorder.poll() is None:
            executor.spin_once(timeout_sec=0.1)
        camera.wait()
        recording = json.loads((Path(folder) / "recording.json").read_text())
    node.close()
    node.destroy_node()
    rclpy.try_shutdown()
    return _summary(recording, engine, size)


def _start(module: str, **parameters: object) -> subprocess.Popen[bytes]:
    arguments = [part for name, value in parameters.items() for part in ("-p", f"{name}:={value}")]
    meet = ("-r", f"{CAMERA_TOPIC}:={IMAGE_TOPIC}")
    command = [sys.executable, "-m", f"clustvit_ros.{module}", "--ros-args", "--log-level", "warn", *meet, *arguments]
    return subprocess.Popen(command, env=node_environment(os.environ))


def _summary(recording: dict[str, Any], engine: FixedEngine, size: tuple[int, int]) -> dict[str, Any]:
    stats = [frame["stats"] for frame in recording["frames"] if frame["stats"]]
    series = {name: np.array([float(pairs[name]) for pairs in stats]) for name in ("decode_ms", "publish_ms", "age_ms")}
    series["added_ms"] = series["decode_ms"] + series["publish_ms"]
    series["cpu_ms"] = np.diff(engine.cpu_ms)
    return {
        "size": list(size),
        "masks": recording["masks_received"],
        "milliseconds": {
            name: {"median": float(np.median(values)), "p95": percentile(values, 0.95)}
            for name, values in series.items()
        },
    }


def main() -> int:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="480x640", help="HEIGHTxWIDTH of the camera's images (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=200, help="frames to send (default: %(default)s)")
    parser.add_argument("--rate-hz", type=float, default=30.0, help="frames per second (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split("x"))
    result = measure((height, width), options.frames, options.rate_hz)
    print(f"{width}x{height} bgr8 at {options.rate_hz:g} Hz: {result['masks']} masks of {options.frames} frames")
    print(f"{'milliseconds per frame':56}{'median':>8}{'p95':>8}")
    for name, text in _ROWS.items():
        row = result["milliseconds"][name]
        print(f"{text:56}{row['median']:8.2f}{row['p95']:8.2f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
