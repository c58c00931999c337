# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""One way for every node of this package to live and end as a process."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node

from clustvit_ros.dds import bound_spinning, remove_leftovers
from clustvit_ros.engine.machine import keep_freed_memory
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.paths import user_cache_dir

N = TypeVar("N", bound=Node)

_NATIVE_THREADS = ("engine",)
# For so long may one thread keep the interpreter from another. An engine wants it a few hundred times in a frame, and
# waited for Python's usual 5 ms whenever the executor's thread was at work: frames of 14 ms took 19 to 30.
_SWITCH_INTERVAL_S = 0.0005


def run_node(
    name: str, create: Callable[[], N], run: Callable[[N, SingleThreadedExecutor], int], arguments: list[str] | None
) -> int:
    """Create a node, run it, and clean up after it, whatever ends it.

    Args:
        name: logger for what goes wrong before there is a node.
        create: makes the node; it must have a method `close` that stops its threads and returns an exit code.
        run: spins the executor, which holds the node, and returns an exit code.
        arguments: command-line arguments; None takes the process's own.

    Returns:
        The worst of the exit codes; 1 when the node cannot start. SIGINT and SIGTERM are no errors.
    """
    node: Any = None
    code = 0
    try:
        keep_freed_memory()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        bound_spinning()
        # PyTorch makes this folder when it is imported, else in /tmp.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache_dir() / "torchinductor"))
        _clear_shared_memory(name)
        _initialise(arguments)
        node = create()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        code = run(node, executor)
        # A signal during a start makes the start fail; that is an end like any other.
        code = code if rclpy.ok() else 0
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (ClustvitError, OSError) as error:
        rclpy.logging.get_logger(name).fatal(str(error))
        code = 1
    except Exception:
        if rclpy.ok():
            raise  # else a signal shut ROS down under a node that was still starting, and whatever it called failed
    finally:
        # A second Ctrl-C must not tear down a shutdown half done; `close` takes a few seconds at most.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if node is not None:
            code = max(code, node.close())
            node.destroy_node()
        rclpy.try_shutdown()
        _leave_native_threads(code)
    return code


def spin_until_done(node: Any, executor: SingleThreadedExecutor) -> int:
    """A `run` for nodes that end by themselves: their future `done` gets the exit code."""
    executor.spin_until_future_complete(node.done)
    return node.done.result() if node.done.done() else 0


def _leave_native_threads(code: int) -> None:
    """End the process here when a thread is still in native code: loading a model, or an engine call that hangs.

    Python ends such threads by unwinding them, which aborts the process where a C++ frame does not allow it.
    """
    stuck = [thread for thread in threading.enumerate() if thread.name in _NATIVE_THREADS and thread.is_alive()]
    if stuck:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _initialise(arguments: list[str] | None) -> None:
    try:
        rclpy.init(args=arguments)
    except RuntimeError as error:  # a parameter file or argument that rcl cannot read
        raise ConfigError(str(error)) from error


def _clear_shared_memory(name: str) -> None:
    """Delete what killed processes left; enough of it, and this process gets no shared memory."""
    removed = remove_leftovers()
    if removed:
        megabytes = sum(leftover.bytes_used for leftover in removed) / 1e6
        rclpy.logging.get_logger(name).info(
            f"deleted {len(removed)} shared-memory segments ({megabytes:.0f} MB) of processes that were killed"
        )
