"""What the node knows about itself, as levels, sentences and key-value pairs; no ROS until the last function."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from clustvit_ros.engine import EngineInfo

if TYPE_CHECKING:
    from clustvit_ros.node.frame_pipeline import FrameReport

OK, WARN, ERROR = 0, 1, 2
"""Levels of diagnostic_msgs/DiagnosticStatus."""


@dataclass
class FrameCounts:
    """Frames since the node started; each received frame ends in exactly one of the other counts.

    Args:
        received: came over the image topic.
        segmented: a mask was published.
        dropped: a newer frame came before this one's turn.
        late: segmented after its deadline and, as `deadline_policy: drop` wants it, not published.
        rejected: a message that cannot be segmented.
        failed: the engine raised.
    """

    received: int = 0
    segmented: int = 0
    dropped: int = 0
    late: int = 0
    rejected: int = 0
    failed: int = 0

    def since(self, earlier: FrameCounts) -> FrameCounts:
        """What was added after `earlier`."""
        return FrameCounts(**{name: value - getattr(earlier, name) for name, value in vars(self).items()})

    def as_pairs(self) -> dict[str, str]:
        """Keys as they appear in stats and diagnostics."""
        return {f"frames_{name}": str(value) for name, value in vars(self).items()}


@dataclass
class LatencyWindow:
    """The newest latencies, in milliseconds."""

    samples: collections.deque[float] = field(default_factory=lambda: collections.deque(maxlen=300))

    def as_pairs(self, name: str) -> dict[str, str]:
        """`<name>_p50_ms`, `_p95_ms` and `_p99_ms`; nothing without samples."""
        values = list(self.samples)
        if not values:
            return {}
        percentiles = np.percentile(values, (50, 95, 99))
        return {f"{name}_p{p}_ms": f"{value:.2f}" for p, value in zip((50, 95, 99), percentiles, strict=True)}


@dataclass(frozen=True)
class Health:
    """Everything `/diagnostics` is made of.

    Args:
        state: label of the lifecycle state.
        fault: why configuring or activating failed, or what went wrong since; empty when nothing did.
        input_topic: resolved name.
        input_silence_s: seconds without an image while active; 0 when not active.
        input_timeout_s: more silence than this is an error.
        counts: frames so far.
        recent: frames since the last report.
        last_rejection: why the last rejected frame was.
        last_failure: what the engine last raised.
        unstamped: frames come without a stamp, so that their age is unknown.
        qos_problem: a policy that kept a camera from being heard, or empty.
        output_qos_problem: a policy that keeps a consumer from hearing this node, or empty.
        input_age_s: how old the newest image was when it came; negative when it was stamped in the future.
        budget_problem: what keeps the latency budget from being held, or empty.
        throttling: why the platform makes the machine slower than it could be, or empty.
        engine_fault: why the engine does not run as it was asked to, or empty.
        lossless: every frame was to be segmented.
    """

    state: str
    fault: str = ""
    input_topic: str = ""
    input_silence_s: float = 0.0
    input_timeout_s: float = 3.0
    counts: FrameCounts = field(default_factory=FrameCounts)
    recent: FrameCounts = field(default_factory=FrameCounts)
    last_rejection: str = ""
    last_failure: str = ""
    unstamped: bool = False
    qos_problem: str = ""
    output_qos_problem: str = ""
    input_age_s: float = 0.0
    budget_problem: str = ""
    throttling: str = ""
    engine_fault: str = ""
    lossless: bool = False


def judge(health: Health) -> tuple[int, str]:
    """The worst thing that is true now.

    Returns:
        Level, and a sentence that says what is wrong and what to do.
    """
    recent = health.recent
    if health.fault:
        return ERROR, health.fault
    if health.state != "active":
        return OK, f"{health.state}: waiting for a lifecycle transition"
    if recent.failed and not recent.segmented + recent.late:
        return ERROR, f"engine fails on every frame: {health.last_failure}"
    if health.input_silence_s > health.input_timeout_s:
        because = f" ({health.qos_problem})" if health.qos_problem else ""
        return ERROR, f"no image on {health.input_topic} for {health.input_silence_s:.1f} s{because}"
    if health.engine_fault:
        return ERROR, health.engine_fault
    if health.lossless and recent.dropped:
        return ERROR, (
            f"{recent.dropped} frames found the queue full and were dropped: replay slower or raise queue_limit_mb"
        )
    if recent.failed:
        return WARN, f"engine failed on {recent.failed} frames: {health.last_failure}"
    if recent.rejected:
        return WARN, f"{recent.rejected} unusable images: {health.last_rejection}"
    if health.budget_problem:
        return WARN, "; ".join(filter(None, (health.budget_problem, health.throttling)))
    if abs(health.input_age_s) > health.input_timeout_s:
        side = "old when they arrive" if health.input_age_s > 0 else "from the future"
        return WARN, (
            f"images are {abs(health.input_age_s):.1f} s {side}: the camera lags, or its clock differs from this "
            "node's (set use_sim_time where a bag is replayed)"
        )
    if health.qos_problem or health.output_qos_problem:
        return WARN, "; ".join(filter(None, (health.qos_problem, health.output_qos_problem)))
    if health.unstamped:
        return WARN, "images come without a time stamp: latency is unknown and time synchronisation will fail"
    if not health.counts.segmented + health.counts.late:
        return OK, "waiting for the first image"
    return OK, "segmenting"


def engine_pairs(info: EngineInfo) -> dict[str, str]:
    """What runs where."""
    return {
        "model": info.model,
        "engine": info.engine,
        "device": info.device,
        "device_reason": info.device_reason,
        "precision": info.precision,
        "classes": str(len(info.classes)),
    }


def frame_pairs(report: FrameReport, counts: FrameCounts) -> dict[str, str]:
    """One frame's statistics, for `segmentation/stats`.

    Args:
        report: what the frame went through.
        counts: frames so far, this one included.
    """
    engine = report.engine
    pairs = {
        "merge_threshold": f"{engine.merge_threshold:g}",
        "confidence_threshold": f"{report.confidence_threshold:g}",
        "token_capacity": str(engine.token_capacity),
        "tokens_total": str(engine.tokens_total),
        "tokens_kept": f"{engine.tokens_kept:g}",
        "tokens_exempt": str(engine.tokens_exempt),
        "threads": str(engine.threads),
        "image_size": "{}x{}".format(*report.image_size),
        "mask_size": "{}x{}".format(*report.mask_size),
        "batch": str(report.batch),
        "decode_ms": f"{report.decode_ms:.3f}",
        "engine_ms": f"{engine.total_ms:.3f}",
        "publish_ms": f"{report.publish_ms:.3f}",
        "age_ms": f"{report.age_ms:.3f}",
        "deadline_missed": str(report.deadline_missed).lower(),
        "deadline_misses": str(report.misses.total),
        "published": str(report.published).lower(),
    }
    pairs.update(report.allowance.as_pairs())
    pairs.update({f"stage.{name}_ms": f"{value:.3f}" for name, value in engine.stages_ms.items()})
    pairs.update(counts.as_pairs())
    return pairs


def diagnostic_status(name: str, hardware_id: str, level: int, sentence: str, pairs: Mapping[str, str]) -> Any:
    """Build a diagnostic_msgs/DiagnosticStatus.

    Args:
        name: "<node>: <what>".
        hardware_id: the device that computes.
        level: OK, WARN or ERROR.
        sentence: the status message.
        pairs: keys and values.
    """
    from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

    return DiagnosticStatus(
        level=bytes([level]),
        name=name,
        message=sentence,
        hardware_id=hardware_id,
        values=[KeyValue(key=key, value=value) for key, value in pairs.items()],
    )


def diagnostic_array(
    header: Any, name: str, hardware_id: str, level: int, sentence: str, pairs: Mapping[str, str]
) -> Any:
    """Build a diagnostic_msgs/DiagnosticArray of one status; see `diagnostic_status`.

    Args:
        header: std_msgs/Header.
        name, hardware_id, level, sentence, pairs: of the status.
    """
    from diagnostic_msgs.msg import DiagnosticArray

    return DiagnosticArray(header=header, status=[diagnostic_status(name, hardware_id, level, sentence, pairs)])
