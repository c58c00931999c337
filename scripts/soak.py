#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Runs frames through the node for a long time and says what memory and faults did.

Without DDS, as fast as it goes: `python scripts/soak.py --frames 500000`. Decoding, the queue, the scripted engine and
building of messages are the node's own; publishers throw the messages away.

Over DDS at a camera's pace: `python scripts/soak.py --minutes 20 --source FOLDER`. Camera and node are processes of
their own; this one consumes masks and diagnostics. Exit code 1 where memory grew or the node reported a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from clustvit_ros.dds import claim_domain, dds_environment, node_environment
from clustvit_ros.demo.processes import NodeProcess
from clustvit_ros.engine.machine import keep_freed_memory

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MEMORY_LIMIT_BYTES = 1_000_000
# Warm-up ends after this share: caches, windows of statistics and the allocator have settled.
_WARM_UP_SHARE = 0.1
_SAMPLES = 200


def resident_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is really there."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


class DiscardingPublisher:
    """Has one subscriber, who looks at nothing."""

    published = 0

    def get_subscription_count(self) -> int:
        """One, so that every output is computed."""
        return 1

    def publish(self, message: Any) -> None:
        """Count it."""
        self.published += 1


class QuietLogger:
    """Takes what the node would log."""

    def info(self, text: str, **_throttle: Any) -> None:
        """Nobody reads it."""

    error = warning = info


def soak_in_process(frames: int, size: tuple[int, int], encoding: str) -> dict[str, Any]:
    """Run `frames` images of (height, width) `size` through the node's own path.

    Returns:
        `frames`, `frames_failed`, `frames_per_s`, and resident memory in bytes: `settled`, `highest`, `growth`.
    """
    from std_msgs.msg import Header

    from clustvit_ros.engine import ScriptedEngine
    from clustvit_ros.engine.worker import EngineWorker, FrameSlot
    from clustvit_ros.node.camera import Frame, Outputs
    from clustvit_ros.node.filling import FrameFiller
    from clustvit_ros.node.frame import FrameSession, MaskPublisher
    from clustvit_ros.node.messages import image_message
    from clustvit_ros.policy import Policy
    from clustvit_ros.policy.ledger import Ledger
    from clustvit_ros.policy.parameters import SegmentationParameters

    keep_freed_memory()
    publishers: dict[str, DiscardingPublisher] = {}
    outputs = Outputs(lambda _k, topic, *_q, **_o: publishers.setdefault(topic, DiscardingPublisher()))
    camera: Any = SimpleNamespace(name="", outputs=outputs, parameters=SegmentationParameters(), ledger=Ledger())
    engine, logger, done = ScriptedEngine(), QuietLogger(), threading.Semaphore(0)
    slot: FrameSlot[Frame] = FrameSlot()
    policy = Policy(engine, logger)
    publisher = MaskPublisher("soak", logger, time.time_ns)
    filler = FrameFiller({"": camera}, publisher, logger, lambda: True)
    session = FrameSession(engine, policy, {"": camera}, slot, publisher, filler, logger, lambda: True)
    EngineWorker(lambda: session, slot, slot.hand_over, lambda _worker: done.release(), lambda _worker, _error: None)
    slot.open()
    shape = size if encoding in ("mono8", "mono16") else (*size, 3)
    pictures = np.random.default_rng(0).integers(0, 256, (8, *shape), dtype=np.uint8)
    start_s = time.monotonic()
    settled = highest = 0
    for index in range(frames):
        now_ns = time.time_ns()
        header = Header(frame_id="camera")
        header.stamp.sec, header.stamp.nanosec = divmod(now_ns, 1_000_000_000)
        slot.put(Frame(image_message(pictures[index % len(pictures)], encoding, header), now_ns))
        if not done.acquire(timeout=60.0):
            raise RuntimeError(f"frame {index} was not segmented: {camera.ledger.counts()}")
        if index == int(frames * _WARM_UP_SHARE):
            settled = highest = resident_bytes()
        elif settled and index % max(frames // _SAMPLES, 1) == 0:
            highest = max(highest, resident_bytes())
    elapsed_s = time.monotonic() - start_s
    slot.close(1.0)
    slot.hand_over(None)
    counts = camera.ledger.counts()
    return {
        "frames": counts["segmented"], "frames_failed": counts["failed"] + counts["rejected"] + counts["dropped"],
        "masks_built": publishers["segmentation/mask"].published, "frames_per_s": round(frames / elapsed_s, 1),
        "settled_bytes": settled, "highest_bytes": highest, "growth_bytes": highest - settled,
    }  # fmt: skip


def soak_over_dds(minutes: float, source: str, rate_hz: float, node: dict[str, Any]) -> dict[str, Any]:
    """Camera and node as processes, this one as the consumer, for so many minutes.

    Returns:
        `masks`, `faults` (every diagnostic that was not OK once masks flowed), the node's frame counts, and its memory.
    """
    os.environ.update(dds_environment(os.environ), ROS_DOMAIN_ID=str(claim_domain()))
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.executors import SingleThreadedExecutor
    from sensor_msgs.msg import Image

    masks, stamps, faults, pairs = 0, set(), [], {}

    def on_mask(message: Image) -> None:
        nonlocal masks
        masks += 1
        stamps.add((message.header.stamp.sec, message.header.stamp.nanosec))

    def on_diagnostics(message: DiagnosticArray) -> None:
        for status in message.status:
            if "segmentation" in status.name:
                pairs.update({pair.key: pair.value for pair in status.values})
                if masks and status.level != b"\0":
                    faults.append(f"{ord(status.level)}: {status.message}")

    rclpy.init(args=[])
    client = rclpy.create_node("soak")
    client.create_subscription(Image, "segmentation/mask", on_mask, 5)
    client.create_subscription(DiagnosticArray, "/diagnostics", on_diagnostics, 10)
    executor = SingleThreadedExecutor()
    executor.add_node(client)
    camera = {"source": source, "rate_hz": rate_hz, "wait_for_subscribers": 1, "wait_timeout_s": 120.0}
    environ = node_environment(os.environ)
    settled = highest = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        NodeProcess("node.node", node, environ, Path(folder) / "node.log") as node_process,
        NodeProcess("demo.camera", camera, environ, Path(folder) / "camera.log") as camera_process,
    ):
        deadline_s = time.monotonic() + 120.0
        while not masks and time.monotonic() < deadline_s and node_process.exit_code is None:
            executor.spin_once(timeout_sec=0.1)
        start_s = told_s = time.monotonic()
        while (elapsed_s := time.monotonic() - start_s) < 60.0 * minutes:
            if node_process.exit_code is not None or camera_process.exit_code is not None:
                faults.append(f"a process ended: {node_process.last_lines()} {camera_process.last_lines()}")
                break
            executor.spin_once(timeout_sec=0.2)
            if elapsed_s > 60.0 * minutes * _WARM_UP_SHARE:
                memory = resident_bytes(node_process.pid)
                settled, highest = settled or memory, max(highest, memory)
            if time.monotonic() - told_s > 60.0:
                told_s = time.monotonic()
                print(f"{elapsed_s / 60:.0f} min: {masks} masks, {len(faults)} faults", file=sys.stderr, flush=True)
    client.destroy_node()
    rclpy.try_shutdown()
    return {
        "minutes": minutes, "masks": masks, "masks_twice": masks - len(stamps), "faults": faults[:20],
        "fault_count": len(faults), **{key: int(value) for key, value in pairs.items() if key.startswith("frames_")},
        "age_p95_ms": pairs.get("age_p95_ms"), "settled_bytes": settled, "highest_bytes": highest,
        "growth_bytes": highest - settled,
    }  # fmt: skip


def main() -> int:
    """Soak, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500_000, help="without DDS (default: %(default)s)")
    parser.add_argument("--size", default="120x160", help="HEIGHTxWIDTH without DDS (default: %(default)s)")
    parser.add_argument("--encoding", default="bgr8", help="without DDS (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=0.0, help="over DDS instead, for so long")
    parser.add_argument("--source", default="../shared/data/camvid/val/images", help="the camera's pictures")
    parser.add_argument("--rate-hz", type=float, default=30.0, help="the camera's rate (default: %(default)s)")
    parser.add_argument("--engine", default="torch", help="over DDS (default: %(default)s)")
    parser.add_argument("--model", default="camvid_tiny", help="over DDS (default: %(default)s)")
    options = parser.parse_args()
    if options.minutes:
        node = {"engine": options.engine, "model": options.model}
        result = soak_over_dds(options.minutes, options.source, options.rate_hz, node)
        failed = bool(result["fault_count"] or not result["masks"])
    else:
        height, width = (int(side) for side in options.size.split("x"))
        result = soak_in_process(options.frames, (height, width), options.encoding)
        failed = result["growth_bytes"] >= _MEMORY_LIMIT_BYTES or bool(result["frames_failed"])
    print(json.dumps(result, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
