#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Streaming mIoU of a real node on simulated drives: frames dropped, frames filled, and every frame's own mask.

Usage: `python scripts/streaming_runs.py --seeds 101,102,103 --json FILE [--model M] [--rate 30] [-p NAME:=VALUE]`. One
seed takes about half a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from clustvit_ros.dds import claim_domain, node_environment
from clustvit_ros.demo.processes import NodeProcess


def run(seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One drive's figures.

    Raises:
        SystemExit: a process failed; its last words are in the message.
    """
    environ = node_environment(os.environ)
    environ |= {"ROS_DOMAIN_ID": str(claim_domain()), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    given = dict(text.split(":=", 1) for text in options.parameter)
    node = {"model": options.model, **{name: yaml.safe_load(value) for name, value in given.items()}}
    output = folder / "streaming.json"
    streaming = {"source": f"sim:{seed}", "rate_hz": options.rate, "frames": options.frames, "output": output}
    with (
        NodeProcess("node.node", node, environ, folder / "node.log") as node_process,
        NodeProcess("demo.streaming", streaming, environ, folder / "streaming.log") as process,
    ):
        while process.exit_code is None:
            if node_process.exit_code is not None:
                raise SystemExit(f"the node ended:\n{node_process.last_lines()}")
            time.sleep(0.1)
        if process.exit_code:
            raise SystemExit(f"failed:\n{process.last_lines()}\n{node_process.last_lines()}")
    return json.loads(output.read_text(encoding="utf-8"))


def main() -> int:
    """Run, and print each.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", default="101,102,103,104,105", help="worlds, separated by commas")
    parser.add_argument("--model", default="sim_tiny", help="model of the simulated world's classes")
    parser.add_argument("--rate", type=float, default=30.0, help="frames per second")
    parser.add_argument("--frames", type=int, default=90, help="frames that count, per drive")
    parser.add_argument("-p", "--parameter", action="append", default=[], help="NAME:=VALUE for the node")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    runs = []
    for seed in map(int, options.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found = run(seed, options, Path(folder))
        runs.append(found)
        fresh, held, filled = (found[name] for name in ("fresh", "held", "filled"))
        print(
            f"seed {seed}: fresh {fresh['miou']:.2f}, dropped {held['miou']:.2f} ({100 * held['coverage']:.0f} % of "
            f"frames, engine {held['engine_rate_hz']:.1f} Hz), filled {filled['miou']:.2f} "
            f"({100 * filled['coverage']:.0f} %, engine {filled['engine_rate_hz']:.1f} Hz, filled masks out after "
            f"{filled['filled_p95_ms']} ms at p95)",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
