# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Life cycle through the real services, and clean ends by signal in every state."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetAvailableTransitions, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from robot import string
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import ScriptedEngine
from clustvit_ros.node.messages import image_message

pytestmark = pytest.mark.ros

NODE = "/managed/segmentation"


def change(client: Any, transition: int, node: str = NODE) -> bool:
    request = ChangeState.Request(transition=Transition(id=transition))
    return client.call(ChangeState, f"{node}/change_state", request).success


def state(client: Any, node: str = NODE) -> str:
    return client.call(GetState, f"{node}/get_state", GetState.Request()).current_state.label


def test_masks_flow_only_while_active(ros_client: Any, start_node: Callable[..., Any]) -> None:
    process = start_node("node.node", "-r", "__ns:=/managed", "-p", "engine:=scripted", "-p", "autostart:=false")
    assert state(ros_client) == "unconfigured"
    frame = image_message(np.zeros((8, 8, 3), np.uint8), "rgb8", Header())
    for _ in range(2):  # everything can be repeated
        assert change(ros_client, Transition.TRANSITION_CONFIGURE)
        assert state(ros_client) == "inactive"
        assert ros_client.node.count_subscribers("/managed/image") == 0
        assert change(ros_client, Transition.TRANSITION_ACTIVATE)
        camera = ros_client.image_publisher("/managed/image")
        masks: list[Image] = ros_client.collect(Image, "/managed/segmentation/mask")
        ros_client.send_until(camera, frame, lambda masks=masks: bool(masks), "mask")
        assert change(ros_client, Transition.TRANSITION_DEACTIVATE)
        ros_client.spin_until(lambda camera=camera: camera.get_subscription_count() == 0, "end of the subscription")
        assert change(ros_client, Transition.TRANSITION_CLEANUP)
        assert state(ros_client) == "unconfigured"
        ros_client.spin_until(
            lambda: ros_client.node.count_publishers("/managed/segmentation/mask") == 0, "end of the publisher"
        )
    assert change(ros_client, Transition.TRANSITION_UNCONFIGURED_SHUTDOWN)
    assert state(ros_client) == "finalized"
    assert process.stop() == 0


def test_shutdown_from_active_stops_the_work(ros_client: Any, start_node: Callable[..., Any]) -> None:
    process = start_node("node.node", "-r", "__ns:=/ended", "-p", "engine:=scripted")
    process.wait_for_output("active:")
    assert state(ros_client, "/ended/segmentation") == "active"
    assert change(ros_client, Transition.TRANSITION_ACTIVE_SHUTDOWN, "/ended/segmentation")
    assert state(ros_client, "/ended/segmentation") == "finalized"
    process.wait_for_output("shutting down done: finalized")
    statuses = ros_client.collect(DiagnosticArray, "/diagnostics")
    ros_client.spin_until(
        lambda: any(
            each.name == "ended/segmentation: segmentation" and each.level == b"\x02" and "finalized" in each.message
            for array in statuses for each in array.status
        ),
        "diagnostics that do not call it OK",
    )  # fmt: skip
    assert process.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_an_active_node_cleanly(start_node: Callable[..., Any], number: signal.Signals) -> None:
    process = start_node("node.node", "-p", "engine:=scripted", "-p", "input_timeout_s:=0.1")
    # The hint proves that it spins, and is what a user sees without a camera.
    process.wait_for_output("no image on /image for")
    assert "nobody publishes there; start the camera or remap" in process.output
    assert process.stop(number) == 0
    assert "Traceback" not in process.output


def test_a_lifecycle_manager_brings_it_up_and_down(ros_client: Any, start_node: Callable[..., Any]) -> None:
    """What Nav2's manager does without a bond: ask for the state, change it, ask again; twice, as after a reset."""
    node = "/with_manager/segmentation"
    process = start_node("node.node", "-r", "__ns:=/with_manager", "-p", "engine:=scripted", "-p", "autostart:=false")

    def available() -> set[str]:
        request = GetAvailableTransitions.Request()
        answer = ros_client.call(GetAvailableTransitions, f"{node}/get_available_transitions", request)
        return {entry.transition.label for entry in answer.available_transitions}

    for _ in range(2):
        assert (state(ros_client, node), available()) == ("unconfigured", {"configure", "shutdown"})
        assert not change(ros_client, Transition.TRANSITION_ACTIVATE, node)
        for transition, reached, offered in (
            (Transition.TRANSITION_CONFIGURE, "inactive", {"activate", "cleanup", "shutdown"}),
            (Transition.TRANSITION_ACTIVATE, "active", {"deactivate", "shutdown"}),
            (Transition.TRANSITION_DEACTIVATE, "inactive", {"activate", "cleanup", "shutdown"}),
            (Transition.TRANSITION_CLEANUP, "unconfigured", {"configure", "shutdown"}),
        ):
            assert change(ros_client, transition, node)
            assert (state(ros_client, node), available()) == (reached, offered)
    assert "warming scripted up" in process.output
    assert process.stop(signal.SIGTERM) == 0


def names(client: Any) -> list[tuple[str, str]]:
    """(name, namespace) of the nodes that the graph shows."""
    return client.node.get_node_names_and_namespaces()


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(moment, number, marks=[] if number == quick else [pytest.mark.slow])
        for moment, quick in (
            ("unconfigured", signal.SIGTERM), ("loading", signal.SIGINT), ("inactive", signal.SIGTERM),
            ("segmenting", signal.SIGINT), ("changing the model", signal.SIGTERM),
        )
        for number in (signal.SIGINT, signal.SIGTERM)
    ],
)  # fmt: skip
def test_signals_end_it_cleanly_in_every_state(
    ros_client: Any, start_node: Callable[..., Any], moment: str, number: signal.Signals
) -> None:
    # A name of its own: the graph still knows the services of the node before.
    namespace = f"/{moment.replace(' ', '_')}_{number.name.lower()}"
    node = f"{namespace}/segmentation"
    autostart = moment not in ("unconfigured", "inactive")
    process = start_node(
        Path(__file__).parent / "slow_node.py", "-r", f"__ns:={namespace}", "-p", "scripted_latency_ms:=1500.0",
        "-p", f"autostart:={str(autostart).lower()}", "-p", "input_timeout_s:=0.5",
    )  # fmt: skip
    if moment == "loading":
        process.wait_for_output("loading engine")
        time.sleep(0.2)
    elif moment == "unconfigured":
        assert state(ros_client, node) == "unconfigured"
    elif moment == "inactive":
        assert change(ros_client, Transition.TRANSITION_CONFIGURE, node)
    else:
        process.wait_for_output("no image on")
    if moment == "segmenting":
        camera = ros_client.image_publisher(f"{namespace}/image")
        frame = image_message(np.zeros((8, 8, 3), np.uint8), "rgb8", Header())
        ros_client.send_until(camera, frame, lambda: "images arrive again" in process.output, "an image's arrival")
        ros_client.node.destroy_publisher(camera)
    elif moment == "changing the model":
        client = ros_client.node.create_client(SetParameters, f"{node}/set_parameters")
        ros_client.spin_until(client.service_is_ready, "the service")
        client.call_async(SetParameters.Request(parameters=[string("model", "another")]))
        ros_client.spin_until(lambda: "with model another" in process.output, "the load")
    assert process.stop(number) == 0
    assert "Traceback" not in process.output
    assert "[ERROR]" not in process.output  # the node's own: DDS says "Error" of what neighbours do as well
    # At once, not when its lease of 20 s ends: until then, callers of its services would wait for ever.
    left_s = time.monotonic()
    ros_client.spin_until(lambda: ("segmentation", namespace) not in names(ros_client), "the node's leaving")
    assert time.monotonic() - left_s < 5.0


def test_a_manager_may_configure_a_node_that_starts_by_itself(
    ros_client: Any, start_node: Callable[..., Any]
) -> None:
    process = start_node(Path(__file__).parent / "slow_node.py", "-r", "__ns:=/hurried")
    process.wait_for_output("loading engine")
    change(ros_client, Transition.TRANSITION_CONFIGURE, "/hurried/segmentation")  # the later one is refused
    process.wait_for_output("active:")
    assert state(ros_client, "/hurried/segmentation") == "active"
    assert process.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_in_the_middle_of_a_callback(start_node: Callable[..., Any], number: signal.Signals) -> None:
    process = start_node(Path(__file__).parent / "slow_node.py", before=("stuck",))
    process.wait_for_output("stuck")
    sent_s = time.monotonic()
    assert process.stop(number) == 0
    assert time.monotonic() - sent_s < 5.0  # 0.1 s on a quiet machine; the callback takes 60


def test_a_start_loads_what_it_needs_and_no_more(make_toy_model: Any) -> None:
    """PyTorch's compiler alone takes a second; a node that was killed is back that much later."""
    code = f"""
import sys
import numpy as np
import clustvit_ros.node.node
from clustvit_ros.engine import create_engine
from clustvit_ros.policy import Policy
from clustvit_ros.policy.parameters import SegmentationParameters
engine = create_engine({str(make_toy_model(ClassSet.numbered(3)))!r}, "auto", "cpu")
engine.warmup()
policy = Policy(engine, None)
image = np.zeros((96, 128, 3), np.uint8)
engine.segment(image, policy.plan([image], SegmentationParameters()).settings)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    unneeded = {"torch._dynamo", "torch._inductor", "sympy", "onnx", "onnxruntime", "matplotlib", "rosbags"}
    assert not loaded & unneeded


def test_an_activation_that_fails_leaves_no_camera_subscribed(ros_client: Any, start_node: Callable[..., Any]) -> None:
    override = "qos_overrides./half/b/image.subscription.reliability:=nonsense"
    start_node(
        "node.node", "-r", "__ns:=/half", "-p", "engine:=scripted", "-p", "autostart:=false", "-p", "cameras:=a,b",
        "-p", override, "-p", "lazy:=false",
    )  # fmt: skip
    node = "/half/segmentation"
    assert change(ros_client, Transition.TRANSITION_CONFIGURE, node)
    masks: list[Image] = ros_client.collect(Image, "/half/a/segmentation/mask")
    camera = ros_client.node.create_publisher(Image, "/half/a/image", 10)
    for _ in range(2):  # a manager tries again
        assert not change(ros_client, Transition.TRANSITION_ACTIVATE, node)
        assert state(ros_client, node) == "inactive"
    for _ in range(10):
        camera.publish(image_message(np.zeros((8, 8, 3), np.uint8), "rgb8", Header()))
        ros_client.spin_for(0.1)
    assert camera.get_subscription_count() == 0 and not masks


class HeldEngine(ScriptedEngine):
    """Stays in every call until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on, self.closed = threading.Event(), threading.Event(), threading.Event()

    def segment(self, *arguments: Any) -> Any:
        self.entered.set()
        self.go_on.wait(30.0)
        return super().segment(*arguments)

    def close(self) -> None:
        self.closed.set()


def send(node: Any) -> None:
    node._cameras[""]._on_image(image_message(np.zeros((32, 32, 3), np.uint8), "rgb8", Header()))


def wait_until_idle(node: Any) -> None:
    deadline_s = time.monotonic() + 10.0
    while node._engines.slot.busy or not node._engines.slot.empty:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_shutdown_with_a_frame_in_the_engine_frees_it_once_it_returns(
    own_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clustvit_ros.node.node._FINISH_S", 0.05)
    engine = HeldEngine()
    node = own_node(lambda *_asked: engine, lazy=False)
    assert node.autostart()
    send(node)
    assert engine.entered.wait(10.0)
    assert node.trigger_shutdown() == TransitionCallbackReturn.SUCCESS
    assert not engine.closed.is_set()
    engine.go_on.set()
    assert engine.closed.wait(10.0)


def test_frames_tell_whether_they_found_the_engine_idle(own_node: Callable[..., Any]) -> None:
    engine = HeldEngine()
    node = own_node(lambda *_asked: engine, lazy=False, fill_frames=True)
    assert node.autostart()
    frames, put = [], node._engines.slot.put
    node._engines.slot.put = lambda frame, camera: (frames.append(frame), put(frame, camera))
    send(node)
    assert engine.entered.wait(10.0)
    send(node)
    send(node)
    engine.go_on.set()
    wait_until_idle(node)
    send(node)
    assert [frame.fate.expected for frame in frames] == [True, False, False, True]


def test_recalibrate_becomes_false_each_time_though_nobody_subscribes(own_node: Callable[..., Any]) -> None:
    node = own_node(lambda *_asked: ScriptedEngine())
    assert node.autostart()
    for _ in range(2):
        send(node)
        wait_until_idle(node)
        assert node.set_parameters([Parameter("recalibrate", value=True)])[0].successful
        deadline_s = time.monotonic() + 10.0
        while node.parameters.recalibrate:
            assert time.monotonic() < deadline_s
            send(node)
            time.sleep(0.02)
            node._report()


def test_autostart_without_a_model_ends_with_an_error(start_node: Callable[..., Any]) -> None:
    pytest.importorskip("torch", reason="needs PyTorch")
    process = start_node("node.node", "-p", "model:=/nowhere/model")
    assert process.wait() == 1
    assert "configuring failed: " in process.output
    assert "/nowhere/model" in process.output
    assert "Traceback" not in process.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-p", "merge_threshold:=1.5"], "merge_threshold: got 1.5, expected a double from 0.0 to 1.0"),
        (["--params-file", "/nowhere.yaml"], "/nowhere.yaml"),
        (["-p", "use_sim_time:=abc"], "'use_sim_time' to 'abc' of type 'STRING', expecting type 'BOOL'"),
    ],
)
def test_bad_start_values_end_with_one_line(start_node: Callable[..., Any], arguments: list[str], text: str) -> None:
    process = start_node("node.node", "-p", "engine:=scripted", *arguments)
    assert process.wait() == 1
    assert text in process.output
    assert "Traceback" not in process.output
