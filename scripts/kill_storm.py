#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Kills camera, node and consumer with `kill -9` in random order, again and again, and times how soon masks flow again.

Usage: `python scripts/kill_storm.py --rounds 50`. In every round some of the three processes, in random order, are
killed and started again at once; the clock runs from the last start to the first mask that the consumer gets of an
image newer than that. Afterwards shared memory is searched for what the dead left. Exit code 1 where a round took
longer than `--limit-s`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from clustvit_ros.dds import claim_domain, dds_environment, find_leftovers, node_environment
from clustvit_ros.demo.processes import NodeProcess

_PATIENCE_S = 30.0


class Consumer:
    """This script in a process of its own, which writes the stamp of every mask into a file."""

    def __init__(self, environ: dict[str, str], folder: Path) -> None:
        self._environ, self._folder = environ, folder
        self._count = 0
        self.restart()

    def restart(self) -> None:
        """Start it, with a new file."""
        self._count += 1
        self._file = self._folder / f"masks{self._count}.txt"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--consume", str(self._file)], env=self._environ, start_new_session=True
        )

    def kill(self) -> None:
        """At once."""
        self._process.kill()
        self._process.wait()

    def newest_stamp_ns(self) -> int:
        """Of the masks it has got; 0 before the first."""
        try:
            return max((int(line) for line in self._file.read_text().splitlines() if line), default=0)
        except (OSError, ValueError):
            return 0


class Stack:
    """The three processes."""

    def __init__(self, node: dict[str, Any], camera: dict[str, Any], environ: dict[str, str], folder: Path) -> None:
        self._specs = {"node": node, "camera": camera}
        self._environ, self._folder = environ, folder
        self._nodes = {name: self._start(name) for name in self._specs}
        self.consumer = Consumer(environ, folder)

    def kill(self, name: str) -> None:
        """`kill -9`."""
        (self.consumer if name == "consumer" else self._nodes[name]).kill()

    def start(self, name: str) -> None:
        """Start what was killed."""
        if name == "consumer":
            self.consumer.restart()
        else:
            self._nodes[name] = self._start(name)

    def last_lines(self) -> str:
        """What node and camera said last."""
        return "\n".join(f"{name}: {process.last_lines(3)}" for name, process in self._nodes.items())

    def _start(self, name: str) -> NodeProcess:
        module = {"node": "node.node", "camera": "demo.camera"}[name]
        return NodeProcess(module, self._specs[name], self._environ, self._folder / f"{name}.log")


def storm(
    rounds: int, limit_s: float, engine: str, seed: int, kill_all: bool, size: tuple[int, int] = (480, 640)
) -> dict[str, Any]:
    """Kill and restart `rounds` times.

    Returns:
        `seconds` of every round with what was killed, the worst of them, and leftovers in shared memory.
    """
    rng = random.Random(seed)
    environ = node_environment({**os.environ, **dds_environment(os.environ)})
    environ["ROS_DOMAIN_ID"] = str(claim_domain())
    environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    found_before = {leftover.segment for leftover in find_leftovers()}
    history: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "pictures").mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "pictures" / "noise.png"), noise)
        stack = Stack({"engine": engine}, {"source": folder / "pictures", "rate_hz": 30.0}, environ, folder)
        try:
            first_s = _wait(stack, 0)
            for index in range(rounds):
                victims = ["camera", "node", "consumer"]
                rng.shuffle(victims)
                if not kill_all:
                    victims = victims[: rng.randint(1, 3)]
                for name in victims:
                    stack.kill(name)
                    stack.start(name)
                seconds = _wait(stack, time.time_ns())
                history.append({"round": index, "killed": victims, "seconds": round(seconds, 3)})
                print(f"{index + 1:3} {' '.join(victims):24} {seconds:.2f} s", file=sys.stderr, flush=True)
                if seconds >= _PATIENCE_S:
                    print(stack.last_lines(), file=sys.stderr)
        finally:
            for name in ("camera", "node", "consumer"):
                stack.kill(name)
    time.sleep(2.5)
    leftovers = [leftover for leftover in find_leftovers() if leftover.segment not in found_before]
    durations = [entry["seconds"] for entry in history]
    return {
        "rounds": rounds, "engine": engine, "first_start_s": round(first_s, 3), "worst_s": max(durations),
        "median_s": float(np.median(durations)), "over_limit": sum(value > limit_s for value in durations),
        "limit_s": limit_s, "segments_left": len(leftovers),
        "left_mb": round(sum(leftover.bytes_used for leftover in leftovers) / 1e6, 1), "history": history,
    }  # fmt: skip


def _wait(stack: Stack, after_ns: int) -> float:
    start_s = time.monotonic()
    while stack.consumer.newest_stamp_ns() <= after_ns:
        if time.monotonic() - start_s > _PATIENCE_S:
            return _PATIENCE_S
        time.sleep(0.01)
    return time.monotonic() - start_s


def consume(file: Path) -> int:
    """Write the stamp of every mask, in nanoseconds, one a line."""
    import rclpy
    from sensor_msgs.msg import Image

    rclpy.init(args=[])
    node = rclpy.create_node("consumer")
    with file.open("w", buffering=1) as stream:
        node.create_subscription(
            Image, "segmentation/mask",
            lambda mask: stream.write(f"{mask.header.stamp.sec * 10**9 + mask.header.stamp.nanosec}\n"), 5,
        )  # fmt: skip
        rclpy.spin(node)
    return 0


def main() -> int:
    """Storm, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=2.0, help="longest a round may take (default: %(default)s)")
    parser.add_argument("--engine", default="scripted", help="the node's engine (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="kill all three in every round")
    parser.add_argument("--consume", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.consume:
        return consume(options.consume)
    result = storm(options.rounds, options.limit_s, options.engine, options.seed, options.all)
    print(json.dumps({key: value for key, value in result.items() if key != "history"}, indent=1))
    return int(result["over_limit"] > 0)


if __name__ == "__main__":
    sys.exit(main())
