# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""One way for every node of this package to live and end as a process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import rclpy
from rcl_interfaces.msg import ParameterType, SetParametersResult
from rcl_interfaces.srv import SetParameters, SetParametersAtomically
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.task import Future

from clustvit_ros.dds import bound_spinning, remove_leftovers
from clustvit_ros.engine.machine import keep_freed_memory
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.paths import user_cache_dir

N = TypeVar("N", bound=Node)
_LOG = "callbacks"
# Between two failed callbacks: whatever fails again at once must not take the processor.
_AFTER_FAILURE_S = 0.02
_LOG_PERIOD_S = 5.0

RESTART_CODE = 75  # EX_TEMPFAIL of sysexits.h: another attempt may well succeed
"""Exit code of a process that can use its GPU no more, and that its launch file is to start again."""
_NATIVE_THREADS = ("engine",)
_HELP = """The {name} node of clustvit_ros. It takes ROS arguments, after --ros-args:
  -p NAME:=VALUE        a parameter; docs/reference.md lists them, `ros2 param describe` explains them
  --params-file FILE    parameters from a file, such as config/segment.yaml
  -r FROM:=TO           another name for a topic, e.g. image:=/camera/image_raw, or __ns:=/front
Example: ros2 run clustvit_ros {name}_node --ros-args -r __ns:=/front"""
# A frame after a pause finds other caches: gaps between its operations of more than 10,000 turns put threads to sleep,
# and waking a halted virtual core takes longer than the operation. Two threads, 240x320, 0.2 s between frames: 24 to 41
# ms, p90 55 to 68; at 50,000 turns 22, p90 25. With a core taken by others 202 ms instead of 134, but then frames are
# computed with one thread.
_SPIN_COUNT = 50_000
# For so long may one thread keep the interpreter from another. An engine wants it a few hundred times in a frame, and
# waited for Python's usual 5 ms whenever the executor's thread was at work: frames of 14 ms took 19 to 30.
_SWITCH_INTERVAL_S = 0.0005


def run_node(
    name: str, create: Callable[[], N], run: Callable[[N, SingleThreadedExecutor], int], arguments: list[str] | None,
    executor_type: type[SingleThreadedExecutor] = SingleThreadedExecutor,
) -> int:  # fmt: skip
    """Create a node, run it, and clean up after it, whatever ends it.

    Args:
        name: logger for what goes wrong before there is a node.
        create: makes the node; it must have a method `close` that stops its threads and returns an exit code.
        run: spins the executor, which holds the node, and returns an exit code.
        arguments: command-line arguments; None takes the process's own.
        executor_type: class of the executor.

    Returns:
        The worst of the exit codes: 1 when the node refuses its configuration, `RESTART_CODE` when a new process is
        needed, 70 for a fault of ours; after the latter two a launch starts it again. SIGINT and SIGTERM are no errors.
    """
    given = sys.argv[1:] if arguments is None else arguments
    own = given[: given.index("--ros-args")] if "--ros-args" in given else given
    if {"-h", "--help"} & set(own):
        print(_HELP.format(name=name))
        return 0
    node: Any = None
    code = 0
    # As for SIGINT: rclpy, which calls the handler that it finds, would wait for the end of a callback that takes long.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        keep_freed_memory()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        bound_spinning(_SPIN_COUNT)
        # PyTorch makes this folder when it is imported, else in /tmp.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache_dir() / "torchinductor"))
        _clear_shared_memory(name)
        _initialise(name, given)
        node = create()
        executor = executor_type()
        executor.add_node(node)
        code = run(node, executor)
        # A signal during a start makes the start fail; that is an end like any other.
        code = code if rclpy.ok() else 0
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (ClustvitError, OSError, ParameterException) as error:  # the last: start values of rclpy's own parameters
        rclpy.logging.get_logger(name).fatal(str(error))
        code = 1
    except Exception:
        # Else a signal shut ROS down under a node that was still starting, and whatever it called failed.
        if rclpy.ok():
            traceback.print_exc()
            code = os.EX_SOFTWARE
    finally:
        # A second Ctrl-C must not tear down a shutdown half done; `close` takes a second at most.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        if node is not None:
            code = max(code, node.close())
            node.destroy_node()
        rclpy.try_shutdown()
        _leave_native_threads(code)
    return code


class ShieldedExecutor(SingleThreadedExecutor):
    """An executor that outlives its callbacks: one that raises is told in the log, and the next one is served.

    rclpy ends the process for any of them, also for its own: a clock message of negative seconds is enough.
    """

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Wait for one callback, and run it."""
        with _told():
            super().spin_once(timeout_sec)

    def spin_once_until_future_complete(self, future: Future, timeout_sec: Any = None) -> None:
        """Wait for one callback, and run it; return when the future is done."""
        with _told():
            super().spin_once_until_future_complete(future, timeout_sec)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ExternalShutdownException:
        raise
    except Exception as error:
        if not rclpy.ok():
            raise  # else a signal shut ROS down under a callback
        rclpy.logging.get_logger(_LOG).error(
            f"a callback failed and was left out: {type(error).__name__}: {error}",
            throttle_duration_sec=_LOG_PERIOD_S,
        )
        time.sleep(_AFTER_FAILURE_S)


def answered(
    kind: Any, callback: Callable[[Any, Any], Any], is_declared: Callable[[str], bool]
) -> Callable[[Any, Any], Any]:
    """A service's callback that always answers: where it raises, parameters are refused with what it said.

    Args:
        kind: type of the service.
        callback: gets request and response, returns the response.
        is_declared: whether there is a parameter of a name.
    """

    def one(request: Any, response: Any) -> Any:
        try:
            if kind in (SetParameters, SetParametersAtomically):
                _check(request.parameters, is_declared)
            return callback(request, response)
        except ConfigError as error:
            return _refusal(kind, str(error))
        except Exception as error:  # whatever rclpy makes of what a client sent
            if not rclpy.ok():
                raise  # a signal shut ROS down under it
            text = f"{type(error).__name__}: {error}"
            rclpy.logging.get_logger(_LOG).error(f"a request was refused: {text}", throttle_duration_sec=_LOG_PERIOD_S)
            return _refusal(kind, f"the request cannot be carried out ({text})")

    def each(request: Any, response: Any) -> Any:
        def single(parameter: Any) -> Any:
            return one(SetParameters.Request(parameters=[parameter]), SetParameters.Response()).results[0]

        results = [single(parameter) for parameter in request.parameters]
        for index, result in enumerate(results):
            # What another one of the same request made possible: their order is nobody's choice.
            if not result.successful and any(later.successful for later in results[index + 1 :]):
                results[index] = single(request.parameters[index])
        response.results = results
        return response

    return each if kind is SetParameters else one


def _check(parameters: Iterable[Any], is_declared: Callable[[str], bool]) -> None:
    """Refuse what rclpy has no type for, and names that it would refuse without a reason, or not at all.

    Raises:
        ConfigError: which parameter, and what is expected.
    """
    names: set[str] = set()
    for parameter in parameters:
        if parameter.value.type > ParameterType.PARAMETER_STRING_ARRAY:
            raise ConfigError(
                f"{parameter.name}: got a value of type {parameter.value.type}, expected a type of "
                f"rcl_interfaces/msg/ParameterType, 0 to {ParameterType.PARAMETER_STRING_ARRAY}"
            )
        if not (parameter.name and is_declared(parameter.name)):
            raise ConfigError(f"{parameter.name!r}: there is no parameter of that name; `ros2 param list` shows all")
        if parameter.name in names:
            raise ConfigError(f"{parameter.name}: is there twice in one atomic request, expected each name once")
        names.add(parameter.name)


def _refusal(kind: Any, reason: str) -> Any:
    result = SetParametersResult(successful=False, reason=reason)
    if kind is SetParameters:
        return SetParameters.Response(results=[result])
    return SetParametersAtomically.Response(result=result) if kind is SetParametersAtomically else kind.Response()


def spin_until_done(node: Any, executor: SingleThreadedExecutor) -> int:
    """A `run` for nodes that end by themselves: their future `done` gets the exit code."""
    executor.spin_until_future_complete(node.done)
    return node.done.result() if node.done.done() else 0


def _leave_native_threads(code: int) -> None:
    """End the process here when a thread is still in native code (loading a model, an engine call that hangs).

    Python ends such threads by unwinding them, which aborts the process where a C++ frame does not allow it.
    """
    stuck = [thread for thread in threading.enumerate() if thread.name in _NATIVE_THREADS and thread.is_alive()]
    if stuck or code == RESTART_CODE:  # nor can CUDA be torn down after what made a restart necessary
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _initialise(name: str, arguments: list[str]) -> None:
    try:
        try:
            rclpy.init(args=arguments)
        except RuntimeError as error:
            if "logging" not in str(error):
                raise
            # No folder for log files: a robot with a read-only or a full disk drives on.
            rclpy.try_shutdown()
            rclpy.init(args=[*arguments, "--ros-args", "--disable-external-lib-logs"])
            rclpy.logging.get_logger(name).warning(
                f"no log file is written ({str(error).partition(', at ')[0]}); set ROS_LOG_DIR to a folder for it"
            )
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
