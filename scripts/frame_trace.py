#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Shows the way of one camera frame through the running segmentation node, and counts it.

A real node runs here on a model, fed over DDS by a camera in another process. Once it is settled, one frame is traced
from the image callback to the publication of its statistics: every call of a function of this package that belongs to
its way, thread by thread. Counted are

* files, functions and calls of the package;
* room changes: how often the way goes on in another room, in the order of calls. A room is a folder of
  `clustvit_ros/`; the modules beside the folders are one room, "foundation";
* hand-overs: how often the frame goes on in another thread.

`scripts/frame_trace.py [--max-files 25 --max-room-changes 20 --max-hand-overs 1]` exits with 1 where one is exceeded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import clustvit_ros
from clustvit_ros.dds import CAMERA_TOPIC, IMAGE_TOPIC, claim_domain, dds_environment, node_environment

PACKAGE = Path(clustvit_ros.__file__ or "").parent
# The first and the last of our functions on the way.
_IMAGE_CALLBACK, _STATISTICS = "_on_image", "diagnostic_status"
# A frame that meets the end of a calibration, or a budget's change, goes further than others.
_TRACED = 3
# Where the engine's thread takes a frame, and what it does with it.
_ENGINE_THREAD = ("engine/worker.py", "node/frame.py")


@dataclass
class Call:
    """One call of one of our functions.

    Args:
        thread: number of the thread.
        file: path below the package.
        function: name of the function.
        depth: how many of our functions are on the stack below it.
    """

    thread: int
    file: str
    function: str
    depth: int


def room_of(file: str) -> str:
    """The folder of `clustvit_ros/` that a file is in, or "foundation"."""
    return file.split("/")[0] if "/" in file else "foundation"


def count(calls: Sequence[Call]) -> dict[str, int]:
    """`files`, `functions`, `calls`, `room_changes` and `hand_overs` of calls in the order of time."""
    return {
        "files": len({call.file for call in calls}),
        "functions": len({(call.file, call.function) for call in calls}),
        "calls": len(calls),
        "room_changes": sum(room_of(a.file) != room_of(b.file) for a, b in itertools.pairwise(calls)),
        "hand_overs": sum(a.thread != b.thread for a, b in itertools.pairwise(calls)),
    }


@dataclass
class Tracer:
    """Records calls of our functions from one image callback to the publication of statistics.

    Installed in every thread before it does anything; records one frame once it is armed.
    """

    armed: bool = False
    calls: list[Call] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    _recording: bool = False
    _stacks: threading.local = field(default_factory=threading.local)
    _paths: dict[CodeType, str] = field(default_factory=dict)

    def arm(self) -> None:
        """Record the next frame."""
        self.calls = []
        self.done.clear()
        self.armed = True

    def install(self) -> None:
        """Watch this thread and all that are started from now on."""
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return") or not (self.armed or self._recording):
            return
        file = self._file(frame.f_code)
        if not file:
            return
        stack = self._stacks.__dict__.setdefault("files", [])
        name = frame.f_code.co_name
        if event == "return":
            if stack and stack[-1] == (file, name):
                stack.pop()
                if not stack and self._recording and self._is_published():
                    self._recording = False
                    self.done.set()
            return
        if self.armed and name == _IMAGE_CALLBACK:
            self.armed, self._recording = False, True
            stack.clear()
        if not self._recording or not self._belongs(stack, file, name):
            return
        # Comprehensions and generators are part of the function that they stand in.
        if not name.startswith("<"):
            self.calls.append(Call(threading.get_ident(), file, name, len(stack)))
            stack.append((file, name))

    def _belongs(self, stack: list[tuple[str, str]], file: str, name: str) -> bool:
        # The executor's thread has other callbacks, and the engine's may be busy calibrating when the frame comes:
        # whatever begins with no caller there is no part of the frame.
        if stack or threading.current_thread().name == "executor":
            return bool(stack) or name == _IMAGE_CALLBACK
        return file in _ENGINE_THREAD

    def _is_published(self) -> bool:
        """The statistics' message has been built, and the engine's thread is through with the frame."""
        return threading.current_thread().name != "executor" and any(c.function == _STATISTICS for c in self.calls)

    def _file(self, code: CodeType) -> str:
        if code not in self._paths:
            path = code.co_filename
            self._paths[code] = path[len(str(PACKAGE)) + 1 :] if path.startswith(f"{PACKAGE}/") else ""
        return self._paths[code]


def trace(model: str, frames: int, budget_ms: float, threads: int) -> list[Call]:
    """Run a node and trace the frames after `frames` settled ones; the one with the shortest way."""
    os.environ.update(dds_environment(os.environ), ROS_DOMAIN_ID=str(claim_domain()))
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    tracer = Tracer()
    tracer.install()
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.parameter import Parameter

    from clustvit_ros.node.node import SegmentationNode

    rclpy.init(args=[])
    values = {"device": "cpu", "threads": threads, "latency_budget_ms": budget_ms}
    values |= {"engine": "scripted"} if model == "scripted" else {"model": model}
    node = SegmentationNode(parameter_overrides=[Parameter(name, value=value) for name, value in values.items()])
    if not node.autostart():
        raise SystemExit("the node could not start; its log says why")
    client = rclpy.create_node("frame_trace")
    seen: list[DiagnosticArray] = []
    client.create_subscription(DiagnosticArray, "segmentation/stats", seen.append, 5)
    executor, listener = SingleThreadedExecutor(), SingleThreadedExecutor()
    executor.add_node(node)
    listener.add_node(client)
    spinning = threading.Thread(target=executor.spin, name="executor", daemon=True)
    spinning.start()
    camera = subprocess.Popen(
        [sys.executable, "-m", "clustvit_ros.demo.camera", "--ros-args", "--log-level", "warn",
         "-r", f"{CAMERA_TOPIC}:={IMAGE_TOPIC}", "-p", "source:=sim:1", "-p", "rate_hz:=5.0",
         "-p", "wait_for_subscribers:=1"],
        env=node_environment(os.environ),
    )  # fmt: skip
    try:
        deadline_s = time.monotonic() + 240.0

        def settled() -> bool:
            """So many frames are through, with a budget since the end of the calibration."""
            if not budget_ms:
                return len(seen) >= frames
            calibrated = [any(pair.key == "slowdown" for pair in entry.status[0].values) for entry in seen[-frames:]]
            return len(calibrated) == frames and all(calibrated)

        while not settled():
            listener.spin_once(timeout_sec=0.1)
            if time.monotonic() > deadline_s:
                raise SystemExit("the node did not settle within four minutes")
        ways: list[list[Call]] = []
        for _ in range(_TRACED):
            tracer.arm()
            while not tracer.done.is_set() and time.monotonic() < deadline_s:
                listener.spin_once(timeout_sec=0.1)
            if not tracer.done.is_set():
                raise SystemExit("the traced frame did not end within four minutes")
            ways.append(tracer.calls)
    finally:
        camera.terminate()
        camera.wait()
        executor.shutdown()
        spinning.join(10.0)
        node.close()
        for each in (node, client):
            each.destroy_node()
        rclpy.try_shutdown()
    return min(ways, key=lambda calls: count(calls)["room_changes"])


def as_tree(calls: Sequence[Call], depth: int) -> str:
    """The calls as lines, indented; the same call again and again is one line."""
    lines: list[str] = []
    times = 1
    thread = calls[0].thread if calls else 0
    for call in calls:
        if call.thread != thread:
            lines.append("--- another thread")
            thread = call.thread
        line = f"{'  ' * call.depth}{call.file}: {call.function}"
        if call.depth > depth:
            continue
        if lines and lines[-1].split(" x ")[0] == line:
            times += 1
            lines[-1] = f"{line} x {times}"
        else:
            lines.append(line)
            times = 1
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sim_tiny", help='shipped model or folder; "scripted" runs none')
    parser.add_argument("--frames", type=int, default=10, help="frames before the one that is traced")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the engine")
    parser.add_argument("--budget-ms", type=float, default=0.0)
    parser.add_argument("--depth", type=int, default=3, help="of the tree that is printed")
    parser.add_argument("--json", type=Path, help="file for the counts and the files")
    limits = ("files", "room_changes", "hand_overs")
    for name in limits:
        parser.add_argument(f"--max-{name.replace('_', '-')}", type=int)
    args = parser.parse_args()
    calls = trace(args.model, args.frames, args.budget_ms, args.threads)
    counts = count(calls)
    print(as_tree(calls, args.depth))
    print(", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()))
    if args.json:
        files = sorted({call.file for call in calls})
        args.json.write_text(json.dumps({**counts, "by_file": files}, indent=1) + "\n", encoding="utf-8")
    exceeded = [name for name in limits if (most := getattr(args, f"max_{name}")) is not None and counts[name] > most]
    for name in exceeded:
        print(f"too many {name.replace('_', ' ')}: {counts[name]}, expected at most {getattr(args, f'max_{name}')}")
    return bool(exceeded)


if __name__ == "__main__":
    sys.exit(main())
