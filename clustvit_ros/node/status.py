# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""One camera's status in `/diagnostics`, from everything that knows something about it."""

from __future__ import annotations

import os

from diagnostic_msgs.msg import DiagnosticStatus

from clustvit_ros.dds import dds_environment
from clustvit_ros.engine import EngineInfo
from clustvit_ros.engine.machine import throttling
from clustvit_ros.node.camera import Camera
from clustvit_ros.node.messages import diagnostic_status
from clustvit_ros.policy import BudgetStatus
from clustvit_ros.policy.ledger import Health, Ledger, judge
from clustvit_ros.policy.parameters import SegmentationParameters

_MOST_LOST = 0.2
_CHOSEN_BY_NOBODY = {name: value for name, value in os.environ.items() if name == "ROS_DISTRO"}


def losses_of(camera: Camera) -> str:
    """What of a camera's pictures gets lost, on the way or from 16 bits to 8, and what helps; empty while little is."""
    share = camera.ledger.lost_share
    if share < _MOST_LOST:
        return camera.intensities.problem
    profile = " ".join(f"{name}={value}" for name, value in dds_environment(_CHOSEN_BY_NOBODY).items())
    return (
        f"about {share:.0%} of the camera's frames do not arrive, as gaps in their stamps show. Either the camera does "
        "not keep its rate (its own log, or `ros2 topic hz` beside it, tells), or they are lost on the way: then start "
        f"the camera's process and this one with the same Fast DDS profile (export {profile}), or have the camera "
        "compress (image_transport:=compressed)"
    )


def camera_status(
    name: str, state: str, fault: str, loading: str, info: EngineInfo | None, engine_fault: str, budget: BudgetStatus,
    parameters: SegmentationParameters, camera: Camera | None, clock_problem: str = "", losses: str = "",
) -> DiagnosticStatus:  # fmt: skip
    """Build one camera's DiagnosticStatus.

    Args:
        name: name of the status.
        state: label of the lifecycle state.
        fault: why a transition failed or no engine can be had, or empty.
        loading: what is being loaded, or empty.
        info: what runs; None while nothing does.
        engine_fault: why the engine does not run as it was asked to, or empty.
        budget: what is known about the latency budget.
        parameters: values in force.
        camera: the camera; None before it has topics.
        clock_problem: why the node's clock tells no time, or empty.
        losses: what of the input gets lost, or empty.
    """
    ledger = camera.ledger if camera is not None else Ledger()
    watch = camera.watch if camera is not None else None
    recent = ledger.take_recent()
    budget_problem = budget.problem()
    input_problem, output_problem = camera.qos_problems() if camera is not None else ("", "")
    health = Health(
        state=state, ledger=ledger, recent=recent, fault=fault, loading=loading,
        input_topic=watch.topic if watch else "", input_silence_s=watch.silence_s if watch else 0.0,
        input_timeout_s=parameters.input_timeout_s, input_qos_problem=input_problem,
        output_qos_problem=output_problem, budget_problem=budget_problem,
        throttling=throttling() if budget_problem else "", engine_fault=engine_fault,
        lossless=not parameters.adapts, clock_problem=clock_problem, losses=losses,
    )  # fmt: skip
    level, sentence = judge(health)
    pairs = {"state": state, **ledger.count_pairs()}
    if info is not None:
        pairs |= {
            "model": info.model, "engine": info.engine, "device": info.device, "device_reason": info.device_reason,
            "precision": info.precision, "classes": str(len(info.classes)),
        }  # fmt: skip
        if info.execution_providers:
            pairs["execution_providers"] = info.execution_providers
    if loading:
        pairs["loading"] = loading
    pairs |= budget.as_pairs() | ledger.window_pairs()
    if camera is not None:
        pairs["input_dropped_recently"] = str(recent["dropped"])
        pairs["input_lost_share"] = f"{ledger.lost_share:.2f}"
    if input_problem or output_problem:
        pairs["incompatible_qos"] = "; ".join(filter(None, (input_problem, output_problem)))
    return diagnostic_status(name, info.device if info is not None else "", level, sentence, pairs)
