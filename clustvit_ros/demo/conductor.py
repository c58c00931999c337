# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Turns the segmentation node's knobs while it runs, as a user would with `ros2 param set`, and notes what it did when.

The first phase runs with the merge threshold asked for, the second merges nothing; its median is the full latency. Then
come budgets, as shares of it. They decide alone: the threshold stays at 1. A budget that the node refuses is replaced
by the smallest that it names. Before all that, a budget that everything fits makes the node calibrate.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from clustvit_ros.demo.parameter_client import ParameterClient
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.node.messages import stamp_ns
from clustvit_ros.node.parameter_server import ParameterServer
from clustvit_ros.node.process import run_node
from clustvit_ros.paths import replacing
from clustvit_ros.policy.parameter_spec import parameter

_MAX_TRIES = 4
_EASY_BUDGET_MS = 60_000.0


@dataclass(frozen=True)
class ConductorParameters:
    """What to try, and for how long."""

    output: str = parameter("phases.json", "File that gets the phases.")
    merge_threshold: float = parameter(0.5, "Of the first phase.", minimum=0.0, maximum=1.0)
    budget_shares: str = parameter("1.0,0.6,0.4,0.25", "Budgets to try, as shares of the full latency.")
    phase_s: float = parameter(8.0, "Length of a phase.", minimum=0.1, maximum=3600.0, unit="s")
    settle_frames: int = parameter(30, "Frames after a change that belong to no phase.", minimum=0, maximum=1000)
    start_timeout_s: float = parameter(
        180.0, "Give up when the node is not calibrated by then.", minimum=1.0, maximum=3600.0, unit="s"
    )
    silence_timeout_s: float = parameter(
        20.0, "Give up when no frame comes for so long.", minimum=0.1, maximum=3600.0, unit="s"
    )


class ConductorNode(Node):
    """Goes through the phases.

    Raises:
        ConfigError: a parameter that cannot be used.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("conductor", **arguments)
        self._options = ParameterServer(self, ConductorParameters, lambda: "cannot change while it runs").current
        try:
            self._shares = [float(part) for part in self._options.budget_shares.split(",") if part.strip()]
        except ValueError:
            raise ConfigError(
                f"budget_shares: got {self._options.budget_shares!r}, expected numbers separated by commas"
            ) from None
        self._executor: SingleThreadedExecutor | None = None
        self._frames = 0
        self._engine_ms: list[float] = []
        self._phases: list[dict[str, Any]] = []
        self._newest: dict[str, str] = {}
        self._stamp_ns = 0
        self.create_subscription(DiagnosticArray, "segmentation/stats", self._on_stats, 50)

    def close(self) -> int:
        """Nothing to stop; 0."""
        return 0

    def conduct(self, executor: SingleThreadedExecutor) -> int:
        """Go through all phases and write them.

        Returns:
            0.

        Raises:
            ClustvitError: the node fell silent or refused what it offered.
        """
        self._executor = executor
        options = self._options
        self._segmentation = ParameterClient(self, executor, "segmentation", options.silence_timeout_s)
        self._wait(lambda: self._frames > 0, "the first mask", options.start_timeout_s)
        self._segmentation.assign(latency_budget_ms=_EASY_BUDGET_MS)
        self._wait(lambda: "slowdown" in self._newest, "the node's calibration", options.start_timeout_s)
        self._segmentation.assign(merge_threshold=options.merge_threshold, latency_budget_ms=0.0)
        self._run_phase("default", merge_threshold=options.merge_threshold)
        self._segmentation.assign(merge_threshold=1.0)
        full_ms = self._run_phase("full", merge_threshold=1.0)
        for share in self._shares:
            asked_ms = round(share * full_ms, 1)
            budget_ms, reason = self._set_budget(asked_ms)
            self._run_phase(
                f"budget_{round(100 * share)}", share=share, asked_ms=asked_ms, budget_ms=budget_ms, refused=reason
            )
        self._segmentation.assign(merge_threshold=options.merge_threshold, latency_budget_ms=0.0)
        return 0

    def _run_phase(self, name: str, **facts: Any) -> float:
        """Let frames pass and note the phase; the median of the engine's milliseconds."""
        for _ in range(self._options.settle_frames):  # each in its time: slow frames are no silence
            self._wait_for_frame(name)
        first_ns, heard = self._stamp_ns, len(self._engine_ms)
        end_s = time.monotonic() + self._options.phase_s
        self._wait(
            lambda: time.monotonic() >= end_s and len(self._engine_ms) > heard,
            f"phase {name}", self._options.phase_s + self._options.silence_timeout_s,
        )  # fmt: skip
        median_ms = float(np.median(self._engine_ms[heard:]))
        self.get_logger().info(f"{name}: engine {median_ms:.1f} ms")
        phase = {"name": name, "after_ns": first_ns, "until_ns": self._stamp_ns, "engine_p50_ms": median_ms, **facts}
        self._phases.append(phase)
        # After each phase: whoever started this can tell how far it is.
        with replacing(Path(self._options.output)) as partial:
            partial.write_text(json.dumps({"phases": self._phases}, indent=1) + "\n", encoding="utf-8")
        return median_ms

    def _wait_for_frame(self, name: str) -> None:
        heard = self._frames
        self._wait(lambda: self._frames > heard, f"a frame of phase {name}", self._options.silence_timeout_s)

    def _set_budget(self, budget_ms: float) -> tuple[float, str]:
        """Set a budget, or the smallest that the node offers instead; and the reason of the refusal, if any."""
        refused = ""
        for _ in range(_MAX_TRIES):
            try:
                self._segmentation.assign(latency_budget_ms=budget_ms)
                return budget_ms, refused
            except ConfigError as error:
                refused = refused or str(error)
                offer = re.search(r"at least ([\d.]+)", str(error))
                if offer is None:
                    raise
                budget_ms = float(offer[1])
        raise ClustvitError(f"the node refuses even the budget that it offered, {budget_ms:g} ms")

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        assert self._executor is not None
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise ClustvitError(f"waited {timeout_s:g} s for {what}; the node's own output says more")
            self._executor.spin_once(timeout_sec=0.1)

    def _on_stats(self, message: DiagnosticArray) -> None:
        self._newest = {pair.key: pair.value for pair in message.status[0].values}
        self._stamp_ns = stamp_ns(message)
        self._frames += 1
        self._engine_ms.append(float(self._newest["engine_ms"]))


def main(arguments: list[str] | None = None) -> int:
    """Go through the phases.

    Returns:
        0, or 1 when the node fell silent or a parameter cannot be used.
    """
    return run_node("conductor", ConductorNode, ConductorNode.conduct, arguments)


if __name__ == "__main__":
    sys.exit(main())
