# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`model` set while masks flow: the new one is loaded beside the old one; a broken one changes nothing."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
pytest.importorskip("torch", reason="needs PyTorch")

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.srv import SetParameters
from robot import Robot, string
from std_msgs.msg import Header, String
from test_interface import LATCHED

from clustvit_ros.classes import ClassSet
from clustvit_ros.node.camera import Frame
from clustvit_ros.node.messages import image_message

pytestmark = pytest.mark.ros

NAMESPACE = "/changing"


@pytest.fixture(scope="module")
def models(make_toy_model: Callable[[ClassSet], Path]) -> dict[str, Path]:
    """Three classes, five classes, and one whose weights are damaged."""
    three, five = make_toy_model(ClassSet.numbered(3)), make_toy_model(ClassSet.numbered(5))
    broken = five.parent / "broken"
    shutil.copytree(five, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"three": three, "five": five, "broken": broken}


@pytest.fixture(scope="module")
def robot(ros_client: Any, start_node: Callable[..., Any], models: dict[str, Path]) -> Robot:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent / "fake_messages"), prepend=os.pathsep)
        return Robot(
            ros_client, start_node, NAMESPACE, "-p", "engine:=torch", "-p", f"model:={models['three']}",
            "-p", "device:=cpu", "-p", "threads:=1",
        )  # fmt: skip


def change_model(robot: Robot, model: Path) -> Any:
    """Set `model` while the camera goes on, and wait for it to take over; the result of the request."""
    in_use = robot.get("model").string_value == str(model)
    client = robot.client.node.create_client(SetParameters, f"{NAMESPACE}/segmentation/set_parameters")
    robot.client.spin_until(client.service_is_ready, "the service")
    future = client.call_async(SetParameters.Request(parameters=[string("model", str(model))]))
    pixels = np.zeros((96, 128, 3), np.uint8)
    frame = image_message(pixels, "rgb8", robot.now())

    def done() -> bool:
        frame.header = robot.now()
        return future.done()

    robot.client.send_until(robot.camera, frame, done, "the answer")
    result = future.result().results[0]
    if result.successful and not in_use:
        taken_over = f"model {model} takes over"
        times = robot.process.output.count(taken_over)

        def took_over() -> bool:
            frame.header = robot.now()
            return robot.process.output.count(taken_over) > times

        robot.client.send_until(robot.camera, frame, took_over, "the new model")
    return result


def classes_in(robot: Robot) -> int:
    arrays: list[DiagnosticArray] = robot.client.collect(DiagnosticArray, "/diagnostics")

    def found() -> list[str]:
        mine = [s for a in arrays for s in a.status if s.name.startswith(f"{NAMESPACE[1:]}/")]
        return [pair.value for status in mine for pair in status.values if pair.key == "classes"]

    robot.client.spin_until(lambda: bool(found()), "diagnostics")
    return int(found()[-1])


def test_masks_flow_while_another_model_is_loaded_and_labels_follow(robot: Robot, models: dict[str, Path]) -> None:
    labels: list[dict[str, Any]] = []
    topic = f"{NAMESPACE}/segmentation/label_info"
    robot.client.node.create_subscription(String, topic, lambda m: labels.append(json.loads(m.data)), LATCHED)
    robot.client.spin_until(lambda: bool(labels), "labels")
    assert len(labels[-1]["class_map"]) == 3
    robot.segment(image_message(np.zeros((96, 128, 3), np.uint8), "rgb8", robot.now()))
    before = len(robot.masks)
    assert change_model(robot, models["five"]).successful
    assert len(robot.masks) > before, "the old model went on"
    frame = image_message(np.zeros((96, 128, 3), np.uint8), "rgb8", robot.now())
    robot.segment(frame)
    robot.client.spin_until(lambda: len(labels[-1]["class_map"]) == 5, "labels of the new model")
    assert classes_in(robot) == 5
    assert "takes over" in robot.process.output


def test_labels_of_a_model_that_came_while_nothing_was_active_are_told(robot: Robot, models: dict[str, Path]) -> None:
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    def change_state(transition: int) -> None:
        request = ChangeState.Request(transition=Transition(id=transition))
        assert robot.client.call(ChangeState, f"{NAMESPACE}/segmentation/change_state", request).success

    labels: list[dict[str, Any]] = []
    topic = f"{NAMESPACE}/segmentation/label_info"
    robot.client.node.create_subscription(String, topic, lambda m: labels.append(json.loads(m.data)), LATCHED)
    robot.client.spin_until(lambda: bool(labels), "labels")
    count, other = (5, "five") if len(labels[-1]["class_map"]) == 3 else (3, "three")
    change_state(Transition.TRANSITION_DEACTIVATE)
    assert change_model(robot, models[other]).successful
    change_state(Transition.TRANSITION_ACTIVATE)
    robot.client.spin_until(lambda: len(labels[-1]["class_map"]) == count, "labels of the new model")


def test_a_model_that_cannot_be_used_is_refused_and_the_old_one_goes_on(robot: Robot, models: dict[str, Path]) -> None:
    in_use = classes_in(robot)
    for model, words in ((models["broken"], "safetensors"), (Path("/nowhere/model"), "/nowhere/model")):
        result = change_model(robot, model)
        assert not result.successful
        assert str(model) in result.reason and words in result.reason
        assert "stays in use" in result.reason
    robot.segment(image_message(np.zeros((96, 128, 3), np.uint8), "rgb8", robot.now()))
    assert classes_in(robot) == in_use
    assert robot.get("model").string_value not in (str(models["broken"]), "/nowhere/model")


def test_groups_must_fit_the_new_model(robot: Robot, models: dict[str, Path]) -> None:
    assert change_model(robot, models["five"]).successful
    assert robot.set(string("class_groups", "last: class_4"))[0].successful
    result = change_model(robot, models["three"])
    assert "the model has no class 'class_4'" in result.reason
    both = robot.set_atomically(string("class_groups", "last: class_2"), string("model", str(models["three"])))
    assert both.successful
    assert robot.set(string("class_groups", ""))[0].successful


def test_services_answer_while_a_model_loads_and_what_fails_leaves_the_old_one(ros_client: Any, capfd: Any) -> None:
    """In this process, where an engine can be made to load for as long as it takes to ask everything."""
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState, GetState
    from rclpy.executors import SingleThreadedExecutor

    from clustvit_ros.engine import ScriptedEngine
    from clustvit_ros.errors import EngineError
    from clustvit_ros.node.node import SegmentationNode

    go_on, cause = threading.Event(), []

    def factory(parameters: Any, _device: str) -> Any:
        go_on.wait(30.0)
        if cause:
            raise cause[0]
        return ScriptedEngine()

    node = SegmentationNode(factory, namespace="/loading")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, daemon=True)
    thread.start()

    def call(kind: type, name: str, request: Any) -> Any:
        start_s = time.monotonic()
        answer = ros_client.call(kind, f"/loading/segmentation/{name}", request)
        assert time.monotonic() - start_s < 1.0
        return answer

    def state() -> str:
        return call(GetState, "get_state", GetState.Request()).current_state.label

    def change_state(transition: int) -> Any:
        client = ros_client.node.create_client(ChangeState, "/loading/segmentation/change_state")
        ros_client.spin_until(client.service_is_ready, "the service")
        return client.call_async(ChangeState.Request(transition=Transition(id=transition)))

    def set_model(name: str) -> Any:
        return call(SetParameters, "set_parameters", SetParameters.Request(parameters=[string("model", name)]))

    try:
        state()  # the services are discovered
        configured = change_state(Transition.TRANSITION_CONFIGURE)
        ros_client.spin_until(lambda: node._engines.started, "the load")
        assert state() == "unconfigured" and set_model("first").results[0].successful
        assert not configured.done()
        go_on.set()
        ros_client.spin_until(configured.done, "the configured node")
        assert configured.result().success and state() == "inactive"
        activated = change_state(Transition.TRANSITION_ACTIVATE)
        ros_client.spin_until(activated.done, "the active node")

        go_on.clear()
        for name in ("second", "first", "second", "first"):
            assert set_model(name).results[0].successful
        assert state() == "active" and not node._engines.loading
        assert "cannot be used" not in capfd.readouterr().err, "to think again is no failure"
        cause.append(EngineError("no memory for it"))
        assert set_model("second").results[0].successful
        assert state() == "active" and node._engines.loading == "loading model second"
        deactivated = change_state(Transition.TRANSITION_DEACTIVATE)
        ros_client.spin_until(deactivated.done, "the end")
        assert state() == "inactive"
        go_on.set()
        ros_client.spin_until(lambda: node.parameters.model == "first", "the model before")
        assert node.get_parameter("model").value == "first"
    finally:
        executor.shutdown()
        thread.join(10.0)
        node.close()
        node.destroy_node()


def test_a_model_that_fails_late_leaves_the_old_one_and_its_groups(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, where a device can be made to fail."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.parameter import Parameter

    from clustvit_ros.engine import create_engine
    from clustvit_ros.errors import EngineError
    from clustvit_ros.node.node import SegmentationNode

    def create(model: str, *arguments: Any, **options: Any) -> Any:
        if model == str(models["five"]):
            raise EngineError("no memory for it")
        return create_engine(model, *arguments, **options)

    def values(model: str, groups: str) -> list[Parameter]:
        return [Parameter("model", value=str(models[model])), Parameter("class_groups", value=groups)]

    monkeypatch.setattr("clustvit_ros.node.engine_control.create_engine", create)
    context = rclpy.Context()
    rclpy.init(context=context)
    before = values("three", "last: class_2")
    others = [Parameter("device", value="cpu"), Parameter("threads", value=1), Parameter("lazy", value=False)]
    node = SegmentationNode(context=context, parameter_overrides=[*before, *others])
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        executor.spin_until_future_complete(node.load())
        assert node.autostart()
        adopt = node._engines.adopt_change

        def adopt_after_a_frame(*changed: Any) -> None:
            node._engines.session.handle(Frame(image_message(np.zeros((48, 64, 3), np.uint8), "rgb8", Header()), 1))
            adopt(*changed)

        node._engines.adopt_change = adopt_after_a_frame
        assert node.set_parameters_atomically(values("five", "last: class_4")).successful
        deadline_s = time.monotonic() + 30.0
        while node.parameters.model == str(models["five"]) and time.monotonic() < deadline_s:
            executor.spin_once(timeout_sec=0.1)
        assert [node.get_parameter(each.name).value for each in before] == [each.value for each in before]
        assert node.parameters.class_groups == (("last", ("class_2",)),)
        counts = node._cameras[""].ledger.counts()
        assert (counts["segmented"], counts["failed"]) == (2, 0), "there and back, of the model whose names they have"
    finally:
        node.close()
        node.destroy_node()
        rclpy.shutdown(context=context)


def test_a_model_that_is_set_and_set_back_when_its_load_has_ended_is_in_charge(own_node: Callable[..., Any]) -> None:
    from rclpy.parameter import Parameter

    from clustvit_ros.engine import ScriptedEngine

    go_on = threading.Event()

    def factory(parameters: Any, _device: str) -> Any:
        if parameters.model == "second":
            go_on.wait(30.0)
        return ScriptedEngine()

    node = own_node(factory, model="first")
    loaded = node.load()
    deadline_s = time.monotonic() + 30.0
    while node._engines.session is None:  # the executor's thread is about to serve these requests first
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    for name in ("second", "first"):
        assert node.set_parameters([Parameter("model", value=name)])[0].successful
    go_on.set()
    assert loaded.done() and not node._engines.loading
    assert node._engines._has_ended.is_set(), "else configuring waits for ever"
    assert node.autostart()


def test_a_budget_set_together_with_a_faster_model_is_that_models(ros_client: Any) -> None:
    """In this process, where models can be as fast as the test needs them."""
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.parameter import Parameter

    from clustvit_ros.engine import ScriptedEngine
    from clustvit_ros.node.node import SegmentationNode

    def factory(parameters: Any, _device: str) -> Any:
        return ScriptedEngine(4.0 if parameters.model == "fast" else 40.0)

    def budget(budget_ms: float, *others: Parameter) -> Any:
        return node.set_parameters_atomically([Parameter("latency_budget_ms", value=budget_ms), *others])

    start = {"model": "slow", "lazy": False, "latency_budget_ms": 1000.0, "min_input_scale": 1.0}
    overrides = [Parameter(name, value=value) for name, value in start.items()]
    node = SegmentationNode(factory, namespace="/swap", parameter_overrides=overrides)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, daemon=True)
    try:
        executor.spin_until_future_complete(node.load())
        assert node.autostart()
        thread.start()
        camera = ros_client.image_publisher("/swap/image")
        frame = image_message(np.zeros((48, 64, 3), np.uint8), "rgb8", Header())

        def is_known() -> bool:
            return not budget(20.0).successful or not budget(1000.0).successful

        ros_client.send_until(camera, frame, is_known, "what the slow model can hold")
        assert budget(20.0, Parameter("model", value="fast")).successful
    finally:
        executor.shutdown()
        thread.join(10.0)
        node.close()
        node.destroy_node()


def test_engines_are_freed_when_replaced_and_when_cleaned_up(models: dict[str, Path]) -> None:
    """In this process, where references can be counted."""
    import rclpy
    from rclpy.parameter import Parameter

    from clustvit_ros.node.engine_control import make_engine
    from clustvit_ros.node.node import SegmentationNode

    made: list[weakref.ref] = []

    def factory(parameters: Any, device: str) -> Any:
        engine = make_engine(parameters, device)
        made.append(weakref.ref(engine))
        return engine

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 60.0
        while not condition():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
            gc.collect()

    context = rclpy.Context()
    rclpy.init(context=context)
    overrides = {"model": str(models["three"]), "device": "cpu", "threads": 1}
    node = SegmentationNode(
        factory, context=context, parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()]
    )
    try:
        for _ in range(2):
            node.trigger_configure()
            for name in ("five", "three"):
                result = node.set_parameters([Parameter("model", value=str(models[name]))])[0]
                assert result.successful, result.reason
                wait_for(lambda name=name: node._engines._host.model == str(models[name]))
            wait_for(lambda: [engine() is not None for engine in made] == [False, False, True])
            node.trigger_cleanup()
            wait_for(lambda: not any(engine() for engine in made))
            # A thread lets its engine go before it ends itself.
            wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "engine"])
            made.clear()
    finally:
        node.close()
        node.destroy_node()
        rclpy.shutdown(context=context)
