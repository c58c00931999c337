"""One camera's status in `/diagnostics`, from everything that knows something about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clustvit_ros.engine import Engine
from clustvit_ros.engine.machine import throttling
from clustvit_ros.node.camera_stream import CameraStream
from clustvit_ros.node.diagnostics import Health, diagnostic_status, engine_pairs, judge
from clustvit_ros.node.frame_runner import Account
from clustvit_ros.node.parameters import SegmentationParameters
from clustvit_ros.policy import BudgetStatus


def camera_status(
    name: str,
    state: str,
    fault: str,
    engine: Engine | None,
    engine_fault: str,
    budget: BudgetStatus,
    accuracy: Mapping[str, str],
    parameters: SegmentationParameters,
    stream: CameraStream | None,
    account: Account | None,
) -> Any:
    """Build a diagnostic_msgs/DiagnosticStatus, and remember in `stream` what was reported.

    Args:
        name: of the status.
        state: label of the lifecycle state.
        fault: why a transition failed, or empty.
        engine: what is loaded; None when nothing is.
        engine_fault: why it does not run as it was asked to, or empty.
        budget: what is known about the latency budget.
        accuracy: what the accuracy checks found, as keys and values.
        parameters: in force.
        stream: the camera's topics; None before they exist.
        account: what became of its frames; None before the first activation.
    """
    account = account if account is not None else Account()
    watch = stream.watch if stream is not None else None
    recent = account.counts.since(stream.reported) if stream is not None else account.counts
    budget_problem = budget.problem()
    input_problem, output_problem = stream.qos_problems() if stream is not None else ("", "")
    level, sentence = judge(
        Health(
            state=state,
            fault=fault,
            input_topic=watch.topic if watch else "",
            input_silence_s=watch.silence_s if watch else 0.0,
            input_timeout_s=parameters.input_timeout_s,
            counts=account.counts,
            recent=recent,
            last_rejection=account.last_rejection,
            last_failure=account.last_failure,
            unstamped=account.unstamped,
            qos_problem=input_problem,
            output_qos_problem=output_problem,
            input_age_s=account.arrival_age_ms / 1000.0,
            budget_problem=budget_problem,
            throttling=throttling() if budget_problem else "",
            engine_fault=engine_fault,
            lossless=parameters.processing == "every_frame",
        )
    )
    pairs = {"state": state, **account.counts.as_pairs()}
    if engine is not None:
        pairs.update(engine_pairs(engine.info))
    pairs.update(budget.as_pairs())
    pairs.update(accuracy)
    if stream is not None:
        pairs.update(stream.statistics.as_pairs("input"))
        pairs["input_dropped_recently"] = str(recent.dropped)
        stream.reported = account.counts
    pairs.update(account.age.as_pairs("age"))
    pairs.update(account.engine.as_pairs("engine"))
    if input_problem or output_problem:
        pairs["incompatible_qos"] = "; ".join(filter(None, (input_problem, output_problem)))
    return diagnostic_status(name, engine.info.device if engine is not None else "", level, sentence, pairs)
