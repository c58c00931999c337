# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What became of one camera's frames, added up from their records, and what that says about the camera's health."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from clustvit_ros.engine.engine import OUTCOMES, OVERTAKEN, FrameRecord
from clustvit_ros.errors import ConfigError

OK, WARN, ERROR = 0, 1, 2
"""Levels of diagnostic_msgs/DiagnosticStatus."""

PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
"""Label -> share, as statistics and diagnostics name them."""
_INPUT_PERCENTILES = {"p50": 0.5, "p95": 0.95, "max": 1.0}


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest-rank percentile: always one of the values, never a latency that did not occur.

    Args:
        values: at least one number.
        share: 0.95 for the 95th percentile; above 0, at most 1.

    Raises:
        ConfigError: there is no value.
    """
    ordered = sorted(map(float, values))
    if not ordered:
        raise ConfigError("percentile: got no value, expected at least one")
    return ordered[max(math.ceil(round(share * len(ordered), 9)), 1) - 1]


_GAP_STAMPS = 41
# Of a camera's period: what a stamp may be off, and how many may be off further.
_OFF_BEAT, _MOST_OFF_BEAT = 0.25, 0.1
_PAUSE_BEATS = 15  # a camera that stood still lost nothing
_RESTART_BEATS = 30  # and after this it may have been started anew, at another pace


def lost_share(stamps_ns: Sequence[int]) -> float:
    """The share of frames missing between stamps that are multiples of one period apart.

    Args:
        stamps_ns: nanoseconds, in the order of arrival.

    Returns:
        0..1; 0 for fewer than `_GAP_STAMPS`, and for a camera that keeps no pace, or may have been started anew at
        another one: of those nothing can be told.
    """
    steps = [later - earlier for earlier, later in pairwise(stamps_ns)]
    if len(steps) + 1 < _GAP_STAMPS or min(steps) <= 0 or not min(stamps_ns):
        return 0.0
    shortest = percentile(steps, 0.1)
    period = percentile((step for step in steps if step < 1.5 * shortest), 0.5)
    if max(steps) >= _RESTART_BEATS * period:
        return 0.0
    steps = [step for step in steps if step < _PAUSE_BEATS * period]
    beats = [max(round(step / period), 1) for step in steps]
    off = sum(abs(step / period - beat) > _OFF_BEAT for step, beat in zip(steps, beats, strict=True))
    return 0.0 if off > _MOST_OFF_BEAT * len(steps) else 1.0 - len(steps) / sum(beats)


class LatencyWindow:
    """The latest latencies, oldest forgotten first.

    Args:
        size: how many are remembered.
    """

    def __init__(self, size: int = 300) -> None:
        self._samples: deque[float] = deque(maxlen=size)

    def add(self, latency_ms: float) -> None:
        """Remember a latency; one that is no number is left out."""
        if math.isfinite(latency_ms):
            self._samples.append(latency_ms)

    def as_pairs(self, name: str, shares: Mapping[str, float] = PERCENTILES) -> dict[str, str]:
        """Percentiles as keys and values, e.g. `age_p95_ms`; nothing without samples.

        Args:
            name: what the keys begin with.
            shares: label -> share of the samples.
        """
        samples = list(self._samples)  # another thread may add one
        return {f"{name}_{label}_ms": f"{percentile(samples, share):.2f}" for label, share in shares.items() if samples}


class Ledger:
    """One camera's frames since the node became active.

    `received` and the input's windows are written by the thread that gets the messages, everything else by any. Any
    thread may read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.received = 0
        """Frames that came over the image topic; each ends in exactly one of the other counts."""
        self.dropped = 0
        """Frames whose turn never came: a newer one took their place, or the queue was full."""
        self.over_rate = 0
        """Frames left out because of `max_rate_hz`."""
        self._segmented = self._failures = 0
        self._points: Counter[str] = Counter()
        self.points_problem = ""
        """What was wrong last with labelled points."""
        self._outcomes: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._age, self._engine = LatencyWindow(), LatencyWindow()
        self._input_age, self._input_period = LatencyWindow(), LatencyWindow()
        self._stamps_ns: deque[int] = deque(maxlen=_GAP_STAMPS)
        self._arrived_s: float | None = None
        self.last_rejection = self.last_failure = ""
        self.newest = FrameRecord()
        """The newest frame that the engine has segmented, whether its mask was published or carried on."""

    @property
    def segmented(self) -> int:
        """Frames that the engine has segmented, those included whose masks were withheld or overtaken."""
        return self._segmented

    def count(self, outcome: str) -> int:
        """How many frames ended like this."""
        return self._outcomes[outcome]

    def receive(self, arrival_s: float, age_ms: float | None, stamp_ns: int = 0) -> None:
        """A frame has arrived.

        Args:
            arrival_s: monotonic seconds.
            age_ms: milliseconds since its stamp; None when it has none.
            stamp_ns: nanoseconds of its stamp; 0 when it has none.
        """
        self._stamps_ns.append(stamp_ns)
        self.received += 1
        if self._arrived_s is not None:
            self._input_period.add((arrival_s - self._arrived_s) * 1000.0)
        if age_ms is not None:
            self._input_age.add(age_ms)
        self._arrived_s = arrival_s

    def add_points(self, fate: str, problem: str) -> None:
        """Labelled points were published, or were not; any thread may say so.

        Args:
            fate: what is counted.
            problem: what is wrong, or empty.
        """
        with self._lock:
            self._points[fate] += 1
            self.points_problem = problem or self.points_problem

    def add(self, record: FrameRecord) -> bool:
        """A frame is done; or, overtaken, the engine is done with a frame that was done before.

        Returns:
            True for the first one that the engine has segmented.
        """
        with self._lock:
            self._outcomes[record.outcome] += 1
            if record.outcome == "rejected":
                self.last_rejection = record.problem
            elif record.problem:
                self.last_failure = record.problem
                self._failures += 1
            elif record.stats is not None:
                if record.outcome != OVERTAKEN:
                    self._age.add(record.age_ms)
                if not record.filled:
                    self.newest = record
                    self._segmented += 1
                    self._engine.add(record.stats.total_ms)
                    return self._segmented == 1
        return False

    def drop(self, over_rate: bool = False) -> None:
        """A frame's turn will never come, perhaps because of `max_rate_hz`."""
        with self._lock:
            self.over_rate += over_rate
            self.dropped += not over_rate

    def counts(self) -> dict[str, int]:
        """Frames by fate."""
        outcomes = {name: self._outcomes[name] for name in OUTCOMES}
        return {
            "received": self.received, "segmented": outcomes.pop("segmented"), "dropped": self.dropped,
            "over_rate": self.over_rate, **outcomes,
        }  # fmt: skip

    def count_pairs(self) -> dict[str, str]:
        """Counts as keys and values of stats and diagnostics."""
        frames = {f"frames_{name}": str(value) for name, value in self.counts().items()}
        return frames | {name: str(value) for name, value in self._points_counts().items()}

    def _points_counts(self) -> dict[str, int]:
        with self._lock:
            return {f"points_{fate}": count for fate, count in self._points.items()}

    def frame_pairs(self, record: FrameRecord) -> dict[str, str]:
        """A frame's statistics, with all counts up to it."""
        camera = {"camera": record.camera} if record.camera else {}
        return {**camera, **self.count_pairs(), **record.as_pairs()}

    def window_pairs(self) -> dict[str, str]:
        """Percentiles of ages, periods and engine times as keys and values of diagnostics."""
        return {
            **self._input_age.as_pairs("input_age", _INPUT_PERCENTILES),
            **self._input_period.as_pairs("input_period", _INPUT_PERCENTILES),
            **self._age.as_pairs("age"),
            **self._engine.as_pairs("engine"),
        }

    @property
    def lost_share(self) -> float:
        """The share of the camera's latest frames that never came, as gaps in the stamps show; 0 where none do."""
        return lost_share(list(self._stamps_ns))

    def take_recent(self) -> Counter[str]:
        """Frames by fate since this was asked last; as segmented and failed every call of the engine counts."""
        counts = {**self.counts(), "segmented": self._segmented, "failed": self._failures}
        now = Counter(counts | self._points_counts())
        recent = Counter({name: now[name] - self._reported[name] for name in now})
        self._reported = now
        return recent


@dataclass(frozen=True)
class Health:
    """Everything that one camera's status in `/diagnostics` is judged by.

    Args:
        state: label of the lifecycle state.
        ledger: the camera's frames so far.
        recent: frames by fate since the last report.
        fault: why a transition failed or an engine cannot be had; empty when neither is so.
        loading: what is being loaded while nothing else runs; else empty.
        input_topic: resolved name of the image topic.
        input_silence_s: seconds without an image while active; 0 when not active.
        input_timeout_s: more silence than this is an error.
        input_qos_problem: a policy that keeps a camera from being heard, or empty.
        output_qos_problem: a policy that keeps a consumer from hearing this node, or empty.
        budget_problem: what keeps the latency budget from being held, or empty.
        throttling: why the platform makes the machine slower than it could be, or empty.
        engine_fault: why the engine does not run as it was asked to, or empty.
        lossless: whether every frame was to be segmented.
        clock_problem: why the node's clock tells no time, or empty.
        losses: what of the input gets lost, or empty.
    """

    state: str
    ledger: Ledger = field(default_factory=Ledger)
    recent: Counter[str] = field(default_factory=Counter)
    fault: str = ""
    loading: str = ""
    input_topic: str = ""
    input_silence_s: float = 0.0
    input_timeout_s: float = 3.0
    input_qos_problem: str = ""
    output_qos_problem: str = ""
    budget_problem: str = ""
    throttling: str = ""
    engine_fault: str = ""
    lossless: bool = False
    clock_problem: str = ""
    losses: str = ""


def judge(health: Health) -> tuple[int, str]:
    """The worst thing that is true now.

    Returns:
        Level, and a sentence that says what is wrong and what to do.
    """
    recent, ledger = health.recent, health.ledger
    input_age_s = ledger.newest.arrival_age_ms / 1000.0
    if health.fault:
        return ERROR, health.fault
    if health.loading and health.state in ("unconfigured", "inactive"):
        return OK, f"{health.state}: {health.loading}"
    if health.state == "finalized":
        return ERROR, "finalized: shut down for good; start the process again"
    if health.state != "active":
        return OK, f"{health.state}: waiting for a lifecycle transition"
    if recent["failed"] and not recent["segmented"] + recent["late"]:
        return ERROR, f"engine fails on every frame: {ledger.last_failure}"
    if health.input_silence_s > health.input_timeout_s:
        because = f" ({health.input_qos_problem})" if health.input_qos_problem else ""
        return ERROR, f"no image on {health.input_topic} for {health.input_silence_s:.1f} s{because}"
    if health.engine_fault:
        return ERROR, health.engine_fault
    if health.lossless and recent["dropped"]:
        return ERROR, (
            f"{recent['dropped']} frames found the queue full and were dropped: replay slower or raise queue_limit_mb"
        )
    if recent["failed"]:
        return WARN, f"engine failed on {recent['failed']} frames: {ledger.last_failure}"
    if recent["rejected"]:
        return WARN, f"{recent['rejected']} unusable images: {ledger.last_rejection}"
    qos_problems = "; ".join(filter(None, (health.input_qos_problem, health.output_qos_problem)))
    if recent["unwatched"] and not recent["segmented"] + recent["late"]:
        # What was true of the last frame that was segmented says nothing about now.
        return (WARN, qos_problems) if qos_problems else (
            OK, f"nobody subscribes to an output: {recent['unwatched']} frames counted, not segmented (`lazy`)"
        )  # fmt: skip
    if health.clock_problem:
        return WARN, health.clock_problem
    if health.losses:
        return WARN, health.losses
    if health.budget_problem:
        return WARN, "; ".join(filter(None, (health.budget_problem, health.throttling)))
    if abs(input_age_s) > health.input_timeout_s:
        side = "old when they arrive" if input_age_s > 0 else "from the future"
        return WARN, (
            f"images are {abs(input_age_s):.1f} s {side}: the camera lags, or its clock differs from this "
            "node's (set use_sim_time where a bag is replayed)"
        )
    if qos_problems:
        return WARN, qos_problems
    if recent["points_refused"] or (recent["points_unmatched"] and not recent["points_published"]):
        return WARN, f"no labelled points: {ledger.points_problem}"
    if not ledger.newest.stamped:
        return WARN, "images come without a time stamp: latency is unknown and time synchronisation will fail"
    if not ledger.segmented:
        return OK, "waiting for the first image"
    return OK, "segmenting"
