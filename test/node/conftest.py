# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Real rclpy and real DDS on a private domain: nothing here hears, or is heard by, another robot or test run."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clustvit_ros.dds import claim_domain, dds_environment, node_environment

# Before any rclpy.init: discovery and transports are fixed when a context is made.
if os.environ.get("ROS_DISTRO") == "humble":
    os.environ["ROS_LOCALHOST_ONLY"] = "1"  # deprecated, with a warning at every start, since then
else:
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ["ROS_DOMAIN_ID"] = str(claim_domain())
os.environ.update(dds_environment(os.environ))
# As Humble does in any case: a field of a message that gets what it cannot hold is an error, and loses the message.
os.environ["ROS_PYTHON_CHECK_FIELDS"] = "1"
# Nothing that a test measures may stay in the user's cache, or come from it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="clustvit_ros_test_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

_ASK_AGAIN_S = 5.0
WAIT_S = 60.0
"""Upper bound of every wait: far above what is needed, so that a busy machine fails no test."""


class RosProcess:
    """A node of this package in a process of its own, its output kept in a file."""

    def __init__(
        self, module: str | Path, *ros_arguments: str, before: tuple[str, ...] = (), environ: Mapping[str, str] = {}
    ) -> None:
        program = [str(module)] if isinstance(module, Path) else ["-m", f"clustvit_ros.{module}"]
        self._log = Path(tempfile.mkstemp(suffix=".log")[1])
        with self._log.open("w") as stream:
            self._process = subprocess.Popen(
                [sys.executable, *program, *before, "--ros-args", *ros_arguments],
                env={**node_environment(os.environ), **environ}, stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def output(self) -> str:
        """Everything it has printed so far."""
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """Wait for its end; the exit code."""
        return self._process.wait(WAIT_S)

    def wait_for_output(self, text: str) -> None:
        """Wait until it has printed `text`."""
        deadline_s = time.monotonic() + WAIT_S
        while text not in self.output:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                pytest.fail(f"{text!r} was not printed (exit code {self._process.poll()}):\n{self.output}")
            time.sleep(0.02)

    def resident_kb(self) -> int:
        """Memory that it holds."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 1024

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal and wait for the end; the exit code."""
        self._process.send_signal(number)
        return self.wait()

    def kill(self) -> None:
        """End it for certain; for teardown."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(WAIT_S)
        self._log.unlink(missing_ok=True)


class RosClient:
    """The test's own node: publishes, collects, calls, and waits for events instead of sleeping."""

    def __init__(self) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        rclpy.init()
        self.node = rclpy.create_node("test_client")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)

    def close(self) -> None:
        """Leave the graph."""
        import rclpy

        self.node.destroy_node()
        rclpy.try_shutdown()

    def spin_until(self, condition: Callable[[], bool], what: str = "condition") -> None:
        """Handle events until `condition` holds; fails the test when it does not in time."""
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > deadline_s:
                pytest.fail(f"{what}: not within {WAIT_S:g} s")
            self._executor.spin_once(timeout_sec=0.1)

    def spin_for(self, seconds: float) -> None:
        """Handle events for a while, to see that something does not happen."""
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            self._executor.spin_once(timeout_sec=0.05)

    def collect(self, kind: type, topic: str) -> list[Any]:
        """Subscribe, wait for the publisher, and return the list that messages are added to."""
        messages: list[Any] = []
        self.node.create_subscription(kind, topic, messages.append, 50)
        self.spin_until(lambda: self.node.count_publishers(topic) > 0, f"publisher of {topic}")
        return messages

    def image_publisher(self, topic: str, kind: type | None = None) -> Any:
        """A camera's publisher, once somebody subscribes."""
        from rclpy.qos import qos_profile_sensor_data
        from sensor_msgs.msg import Image

        publisher = self.node.create_publisher(kind or Image, topic, qos_profile_sensor_data)
        self.spin_until(lambda: publisher.get_subscription_count() > 0, f"subscriber of {topic}")
        return publisher

    def send_until(self, publisher: Any, message: Any, condition: Callable[[], bool], what: str) -> None:
        """Publish `message` again and again (best effort may lose the first ones) until `condition` holds."""
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > deadline_s:
                pytest.fail(f"{what}: not within {WAIT_S:g} s")
            publisher.publish(message)
            for _ in range(5):
                self._executor.spin_once(timeout_sec=0.05)
                if condition():
                    return

    def call(self, kind: type, service: str, request: Any) -> Any:
        """Call a service and return its response."""
        client = self.node.create_client(kind, service)
        self.spin_until(client.service_is_ready, f"service {service}")
        asked = [client.call_async(request)]
        asked_s = time.monotonic()

        def answered() -> bool:
            # A server that has not discovered this client yet answers into the void; nodes that still load answer that
            # early. What reads, or sets a value that it may have set before, is asked again.
            if kind.__name__.startswith(("Get", "Set")) and time.monotonic() > asked_s + len(asked) * _ASK_AGAIN_S:
                asked.append(client.call_async(request))
            return any(future.done() for future in asked)

        self.spin_until(answered, f"response of {service}")
        self.node.destroy_client(client)
        return next(future for future in asked if future.done()).result()


@pytest.fixture(scope="session")
def ros_client() -> Iterator[RosClient]:
    """One client for the whole run: discovery takes longer than most tests."""
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    client = RosClient()
    yield client
    client.close()


@pytest.fixture(scope="module")
def start_node() -> Iterator[Callable[..., RosProcess]]:
    """Starts nodes as processes, and ends what a test leaves behind."""
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    processes: list[RosProcess] = []

    def start(module: str | Path, *ros_arguments: str, **arguments: Any) -> RosProcess:
        processes.append(RosProcess(module, *ros_arguments, **arguments))
        return processes[-1]

    start.processes = processes  # type: ignore[attr-defined]
    yield start
    for process in processes:
        process.kill()


@pytest.fixture(autouse=True)
def end_with_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends what a test itself has started, so that a second try, and the next test, are alone with their own nodes."""
    processes = request.getfixturevalue("start_node").processes if "start_node" in request.fixturenames else []
    before = len(processes)
    yield
    for process in processes[before:]:
        process.kill()
    del processes[before:]


@pytest.fixture
def own_node() -> Iterator[Callable[..., Any]]:
    """Makes nodes in this process, whose executor's thread is the test's."""
    import rclpy
    from rclpy.parameter import Parameter

    from clustvit_ros.node.node import SegmentationNode

    context, nodes = rclpy.Context(), []
    rclpy.init(context=context)

    def make(factory: Callable[..., Any], **values: Any) -> SegmentationNode:
        overrides = [Parameter(name, value=value) for name, value in values.items()]
        nodes.append(SegmentationNode(factory, context=context, parameter_overrides=overrides))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()
        node.destroy_node()
    rclpy.shutdown(context=context)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(7)
