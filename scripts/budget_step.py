#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Shows that a latency budget holds: sets it while the node runs, loads the machine, and watches what the node does.

Camera and node run as processes of their own and this client talks to them over DDS, as on a robot. The budget is 60 %
of the latency measured with every token kept. Usage:
`python scripts/budget_step.py --json FILE --plot FILE [--model M] [--source FOLDER] [--engine torch]`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from clustvit_ros.dds import claim_domain, dds_environment, node_environment
from clustvit_ros.demo.frame_source import open_source
from clustvit_ros.demo.processes import NodeProcess
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.measure.pictures import new_figure, save_figure
from clustvit_ros.policy import percentile

BUDGET_SHARE = 0.6
SETTLE_FRAMES = 30
"""Within so many frames a budget must be held, and an operating point regained."""

_IMAGES = 24
_FULL_FRAMES = 60
_STEADY_FRAMES = 90
_START_TIMEOUT_S = 180.0
_SILENCE_TIMEOUT_S = 15.0
_BURN = "while True: pass"


class Client:
    """Listens to the node's statistics and sets its parameters."""

    def __init__(self) -> None:
        # After the environment is set: DDS reads it once.
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.executors import SingleThreadedExecutor

        rclpy.init(args=[])
        self._node = rclpy.create_node("budget_step")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._node.create_subscription(DiagnosticArray, "segmentation/stats", self._on_stats, 50)
        self.phase = "start"
        self.series: list[dict[str, Any]] = []
        self._calibrated = False

    def close(self) -> None:
        """Leave the graph."""
        import rclpy

        self._node.destroy_node()
        rclpy.try_shutdown()

    def run_until(self, condition: Callable[[], bool], what: str, silence_s: float = _SILENCE_TIMEOUT_S) -> None:
        """Listen until `condition` holds.

        Raises:
            ClustvitError: nothing was heard for `silence_s` seconds.
        """
        heard, deadline_s = len(self.series), time.monotonic() + silence_s
        while not condition():
            self._executor.spin_once(timeout_sec=0.1)
            if len(self.series) > heard:
                heard, deadline_s = len(self.series), time.monotonic() + silence_s
            elif time.monotonic() > deadline_s:
                raise ClustvitError(f"waiting for {what}: the node was silent for {silence_s:g} s")

    def run_phase(self, name: str, frames: int = 0, seconds: float = 0.0) -> list[dict[str, Any]]:
        """Listen for so many frames or seconds; the entries of that time."""
        self.phase = name
        first, end_s = len(self.series), time.monotonic() + seconds
        self.run_until(lambda: len(self.series) - first >= frames and time.monotonic() >= end_s, f"phase {name}")
        return self.series[first:]

    def wait_for_calibration(self) -> None:
        """Listen until the node has timed its engine."""
        self.run_until(lambda: self._calibrated, "calibration", _START_TIMEOUT_S)

    def set_budget(self, budget_ms: float) -> None:
        """Set `latency_budget_ms` as `ros2 param set` does.

        Raises:
            ClustvitError: the node refuses it, for the reason it gives.
        """
        from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
        from rcl_interfaces.srv import SetParameters

        value = ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=budget_ms)
        request = SetParameters.Request(parameters=[Parameter(name="latency_budget_ms", value=value)])
        client = self._node.create_client(SetParameters, "segmentation/set_parameters")
        self.run_until(client.service_is_ready, "the parameter service")
        future = client.call_async(request)
        self.run_until(future.done, "the answer of the parameter service")
        result = future.result().results[0]
        if not result.successful:
            raise ClustvitError(f"the budget was refused: {result.reason}")

    def _on_stats(self, message: Any) -> None:
        pairs = {pair.key: pair.value for pair in message.status[0].values}
        self._calibrated = "slowdown" in pairs
        self.series.append(
            {
                "stamp_s": message.header.stamp.sec + message.header.stamp.nanosec / 1e9,
                "phase": self.phase,
                "budget_ms": float(pairs["latency_budget_ms"]),
                "capacity": int(pairs["token_capacity"]),
                "ceiling": int(pairs["token_ceiling"]),
                "input_size": pairs["input_size"],
                "threads": int(pairs["threads"]),
                "engine_ms": float(pairs["engine_ms"]),
                "age_ms": float(pairs["age_ms"]),
                "slowdown": float(pairs["slowdown"]) if self._calibrated else None,
                "predicted_ms": float(pairs["predicted_ms"]) if self._calibrated else None,
                # What the point costs on the idle machine: points are ordered by it, over both axes.
                "point_ms": float(pairs["point_ms"]) if self._calibrated else None,
                "deadline_missed": pairs["deadline_missed"] == "true",
            }
        )


def measure(client: Client, load_s: float) -> dict[str, Any]:
    """Go through the phases and judge them.

    Args:
        client: hears the node; images flow.
        load_s: seconds that the other process burns a core.

    Returns:
        `series`, the figures, and `checks`: for each claim whether it held.

    Raises:
        ClustvitError: the budget was refused, or the node fell silent.
    """
    client.wait_for_calibration()
    full = client.run_phase("full", _FULL_FRAMES)
    full_ms = float(np.median(_column(full, "engine_ms")))
    budget_ms = round(BUDGET_SHARE * full_ms, 1)
    client.phase = "budget"
    client.set_budget(budget_ms)
    client.run_until(lambda: client.series[-1]["budget_ms"] == budget_ms, "the new budget")
    settled = client.run_phase("budget", SETTLE_FRAMES + _STEADY_FRAMES)[SETTLE_FRAMES:]
    former_ms = float(np.median(_column(settled, "point_ms")))
    with _burning_core():
        loaded = client.run_phase("load", 2 * SETTLE_FRAMES, load_s)
    after = client.run_phase("after", _STEADY_FRAMES)
    regained = next((frame for frame, entry in enumerate(after) if entry["point_ms"] >= former_ms), None)

    loaded = loaded[SETTLE_FRAMES:]
    p95_ms, load_p95_ms = (percentile(_column(entries, "engine_ms"), 0.95) for entries in (settled, loaded))
    return {
        "full_ms": full_ms,
        "budget_ms": budget_ms,
        "settled_p95_ms": p95_ms,
        "settled_miss_share": float(np.mean(_column(settled, "deadline_missed"))),
        "former_point": _usual_point(settled),
        "load_p95_ms": load_p95_ms,
        "load_miss_share": float(np.mean(_column(loaded, "deadline_missed"))),
        "load_point": _usual_point(loaded),
        "frames_to_regain": regained,
        "checks": {
            f"p95 from frame {SETTLE_FRAMES} on is within the budget": p95_ms <= budget_ms,
            f"p95 from frame {SETTLE_FRAMES} of the load on is within the budget": load_p95_ms <= budget_ms,
            f"the former operating point is back within {SETTLE_FRAMES} frames after the load": (
                regained is not None and regained <= SETTLE_FRAMES
            ),
        },
        "series": client.series,
    }


def _usual_point(entries: list[dict[str, Any]]) -> str:
    """The operating point that most frames were made at."""
    points = [
        f"{entry['capacity']} tokens at {entry['input_size']}, threads {entry['threads']}" for entry in entries
    ]
    return max(points, key=points.count)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw latencies against the budget, and tokens and input size below them.

    Args:
        result: as `measure` returns it.
        path: file of the picture.
    """
    series = [entry for entry in result["series"] if entry["phase"] != "start"]
    time_s = _column(series, "stamp_s") - series[0]["stamp_s"]
    figure, ((top,), (bottom,)) = new_figure((11, 6), rows=2, sharex=True, height_ratios=(2, 1))
    top.plot(time_s, _column(series, "age_ms"), color="0.75", linewidth=0.8, label="age of the mask")
    top.plot(time_s, _column(series, "engine_ms"), ".", color="tab:blue", markersize=3, label="engine")
    budget = np.where(_column(series, "budget_ms") > 0, _column(series, "budget_ms"), np.nan)
    top.plot(time_s, budget, color="tab:red", label="budget")
    top.set_ylabel("milliseconds")
    top.set_ylim(0, 1.5 * np.percentile(_column(series, "engine_ms"), 99))
    top.legend(loc="lower right", ncol=3)
    bottom.step(time_s, _column(series, "capacity"), where="post", color="tab:green")
    bottom.set_ylim(bottom=0)
    heights = np.array([float(entry["input_size"].partition("x")[0]) for entry in series])
    bottom.step(time_s, heights, where="post", color="tab:purple", linewidth=0.8)
    bottom.set_ylabel("tokens kept (green),\ninput height, px (purple)")
    bottom.set_xlabel("seconds")
    for phase in dict.fromkeys(entry["phase"] for entry in series):
        times = [at for at, entry in zip(time_s, series, strict=True) if entry["phase"] == phase]
        for axes in (top, bottom):
            axes.axvspan(times[0], times[-1], color="tab:orange", alpha=0.12 if phase == "load" else 0.0, linewidth=0)
            axes.axvline(times[0], color="0.6", linewidth=0.6)
        top.annotate(phase, (times[0], 0.97), xycoords=("data", "axes fraction"), va="top", fontsize=9)
    save_figure(figure, path)


def _column(entries: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([float(entry[name]) for entry in entries])


@contextlib.contextmanager
def _burning_core() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", _BURN])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _generated_images() -> Iterator[np.ndarray]:
    """Soft random pictures: smooth areas, as a camera sees them, and nothing to download."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        yield cv2.resize(coarse, (480, 360), interpolation=cv2.INTER_CUBIC)


def _unpack_images(source: Path | None, folder: Path) -> None:
    """Write pictures uncompressed: a camera has nothing to decode, and must not take the engine's cores for that."""
    images = (frame.pixels for frame in open_source(str(source))) if source else _generated_images()
    for number, image in enumerate(itertools.islice(images, _IMAGES)):
        cv2.imwrite(str(folder / f"{number:02}.bmp"), image)


def _run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    # A domain of its own and this host only: neither this nor a robot nearby hears the other.
    if "ROS_DOMAIN_ID" not in os.environ:
        os.environ["ROS_DOMAIN_ID"] = str(claim_domain())
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.update(dds_environment(os.environ))
    environ = node_environment(os.environ)
    source = folder / "images"
    source.mkdir()
    _unpack_images(options.source, source)
    node = {
        "engine": options.engine, "model": options.model, "device": options.device, "threads": options.threads,
        "merge_threshold": 1.0, "recalibrate": True, "scripted_latency_ms": 60.0,
    }  # fmt: skip
    camera = {"source": source, "rate_hz": options.rate_hz, "wait_for_subscribers": 1}
    with (
        NodeProcess("node.node", node, environ, folder / "node.log") as node_process,
        NodeProcess("demo.camera", camera, environ, folder / "camera.log") as camera_process,
    ):
        client = Client()
        try:
            return measure(client, options.load_s)
        except ClustvitError as error:
            words = "\n".join(process.last_lines() for process in (node_process, camera_process))
            raise ClustvitError(f"{error}\n{words}") from error
        finally:
            client.close()


def main() -> int:
    """Measure, print, write what was asked for.

    Returns:
        0 when every check held.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file for the series and the figures")
    parser.add_argument("--plot", type=Path, help="file for the picture (needs matplotlib)")
    parser.add_argument("--model", default="sim_tiny", help="shipped model or model folder (default: %(default)s)")
    parser.add_argument("--engine", default="torch", help="as the node's parameter (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="as the node's parameter (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="as the node's parameter (default: %(default)s)")
    parser.add_argument("--source", type=Path, help="folder of images (default: generated ones)")
    parser.add_argument("--rate-hz", type=float, default=10.0, help="frames per second (default: %(default)s)")
    parser.add_argument("--load-s", type=float, default=20.0, help="seconds of load (default: %(default)s)")
    options = parser.parse_args()
    try:
        if options.source is not None and not options.source.is_dir():
            raise ConfigError(f"--source: {options.source} is no folder; expected a folder of images")
        with tempfile.TemporaryDirectory() as folder:
            result = _run(options, Path(folder))
    except ClustvitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in result.items():
        if name not in ("series", "checks"):
            print(f"{name:28} {round(value, 3) if isinstance(value, float) else value}")
    for claim, held in result["checks"].items():
        print(f"{'held' if held else 'FAILED':8} {claim}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(result, options.plot)
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
