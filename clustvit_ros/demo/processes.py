# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""ROS nodes as child processes: started in groups of their own, ended as a terminal would end them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from clustvit_ros.dds import CAMERA_TOPIC, IMAGE_TOPIC


class NodeProcess:
    """A node of this package in a process of its own; leaving the `with` block ends it.

    The segmentation node listens to what the camera node publishes, as with the launch files.

    Args:
        module: the node's module below `clustvit_ros`, e.g. "node.node".
        parameters: ROS parameters.
        environ: whole environment of the process.
        log: file for its output.
        nice: how far it stands back for others, 0 to 19, as the command `nice` has it.
    """

    def __init__(
        self, module: str, parameters: Mapping[str, Any], environ: Mapping[str, str], log: Path, nice: int = 0
    ) -> None:
        self.name = module.rpartition(".")[2]
        self._log = log
        arguments = [text for name, value in parameters.items() for text in ("-p", f"{name}:={_yaml(value)}")]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*(("nice", "-n", str(nice)) if nice else ()), sys.executable, "-m", f"clustvit_ros.{module}",
                 "--ros-args", "-r", f"{IMAGE_TOPIC}:={CAMERA_TOPIC}", *arguments], env=dict(environ),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                # A group of its own can be ended as a whole. A session of its own would not stand back: Linux gives
                # each the same share of the cores, however nice its processes are (autogroup).
                preexec_fn=os.setpgrp,  # process_group, from Python 3.11 on
            )  # fmt: skip

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def kill(self) -> None:
        """End it as the kernel does when memory runs out: at once, and nothing is cleaned up."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_lines(self, count: int = 8) -> str:
        """The end of its output."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])

    def stop(self, patience_s: float = 10.0) -> None:
        """Interrupt it as Ctrl-C does; kill it when that does not end it in time."""
        for signal_number in (signal.SIGINT, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # Quoted, so that a folder called 2024 stays a text.
    return f"'{value}'" if isinstance(value, str | Path) else str(value)
