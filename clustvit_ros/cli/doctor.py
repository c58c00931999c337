# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros doctor`: does this machine have what the node needs, and does it really work?

And `clustvit-ros param`: what `ros2 param` does, where only the wheels of ROS 2 are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from clustvit_ros.cli import machine_checks
from clustvit_ros.cli.compute_checks import run_isolated
from clustvit_ros.cli.machine_checks import Finding, Level, as_json, as_text, check_camera
from clustvit_ros.dds import CAMERA_TOPIC, node_environment, remove_leftovers
from clustvit_ros.errors import ConfigError

_MAX_IMAGE_PIXELS = 16_777_216
_MOST_SECONDS = 3600.0


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("doctor", help="find out what keeps the node from working here, and what helps")
    parser.add_argument("--model", default="camvid_tiny", help="a shipped model's name or a model folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--topic", help=f"the camera's topic; without a camera there this fails (default: look at /{CAMERA_TOPIC})"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to listen to the camera (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--clean", action="store_true", help="delete shared memory that killed processes left, first")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 when one of them is a failure."""
    if not 0.0 < args.seconds <= _MOST_SECONDS:
        raise ConfigError(f"--seconds: got {args.seconds:g}, expected more than 0 and at most {_MOST_SECONDS:g}")
    findings = examine(args)
    print(as_json(findings) if args.json else as_text(findings))
    return int(any(finding.level is Level.FAIL for finding in findings))


def examine(args: argparse.Namespace) -> list[Finding]:
    """Look at everything."""
    findings = machine_checks.check_packages()
    findings += machine_checks.check_cv_bridge()
    computing = (("torch", args.device), ("onnxruntime",), ("model", args.model, args.device))
    with ThreadPoolExecutor() as pool:  # they mostly wait for large libraries to be loaded
        findings += itertools.chain.from_iterable(pool.map(lambda check: run_isolated(*check), computing))
    if args.clean:
        removed = remove_leftovers()
        findings.append(Finding("clean", Level.OK, f"deleted {len(removed)} segments of killed processes"))
    findings += machine_checks.check_shared_memory()
    findings += machine_checks.check_dds()
    findings += machine_checks.check_sockets()
    if importlib.util.find_spec("rclpy") is not None:
        findings += check_camera(
            args.topic or f"/{CAMERA_TOPIC}", args.seconds, _MAX_IMAGE_PIXELS, required=args.topic is not None
        )
    return findings


def add_param_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("param", help="list, get, set and describe a running node's parameters, as ros2 param")
    parser.add_argument("verb", choices=("list", "get", "set", "describe"))
    parser.add_argument(
        "words", nargs="*", metavar="NAME [VALUE]",
        help="parameter, not for list; for set with its value as YAML, e.g. 0.3, true or '[pedestrian, bicyclist]', "
        "and further ones likewise: all of them are set, or none",
    )
    parser.add_argument("--node", default="/segmentation", help="its name (default: /segmentation)")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds to wait for the node (default: 5)")
    parser.set_defaults(run=run_param)


def run_param(args: argparse.Namespace) -> int:
    """Ask the node in a process of its own, as everything that needs rclpy."""
    if importlib.util.find_spec("rclpy") is None:
        raise ConfigError("param needs rclpy: source a ROS 2 installation, or install this package's 'ros' extra")
    words, wanted = args.words, {"list": 0, "get": 1, "describe": 1, "set": 2}[args.verb]
    if len(words) != wanted and (args.verb != "set" or not words or len(words) % 2):
        form = " ".join(["param", args.verb, *("NAME", "VALUE")[:wanted]])
        raise ConfigError(f"param {args.verb}: got {len(words)} further arguments, expected `clustvit-ros {form}`")
    module = [sys.executable, "-m", "clustvit_ros.demo.parameter_client"]
    command = [*module, args.node, str(args.timeout), args.verb, *words]
    return subprocess.run(command, env=node_environment(os.environ), check=False).returncode
