"""What to do when an engine fails: try again, then do with less, then with the CPU, and come back when that works.

Pure decisions, the clock injected; `ResilientEngine` carries them out.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class FaultKind(enum.Enum):
    """What an exception says about the device."""

    OUT_OF_MEMORY = "out of memory"
    DEVICE_LOST = "device lost"
    OTHER = "engine failed"


# Texts of CUDA, cuBLAS, cuDNN, TensorRT and ONNX Runtime; PyTorch raises most of them as plain RuntimeErrors.
_OUT_OF_MEMORY_TEXTS = (
    "out of memory", "failed to allocate memory", "alloc_failed", "bad allocation", "bad_alloc",
    "can't allocate memory",
)  # fmt: skip
_DEVICE_LOST_TEXTS = (
    "cuda error", "cuda failure", "cudaerror", "cublas_status", "cudnn_status", "cuda driver", "device lost",
    "device-side assert", "unspecified launch failure", "illegal memory access", "illegal address", "xid",
)  # fmt: skip


def classify(error: BaseException) -> FaultKind:
    """Tell the kinds of failure apart by what the exception and its causes say."""
    texts: list[str] = []
    link: BaseException | None = error
    while link is not None and len(texts) < 8:
        texts.append(f"{type(link).__name__}: {link}".lower())
        link = link.__cause__ or link.__context__
    said = " | ".join(texts)
    # First: "CUDA error: out of memory" leaves the device usable.
    if any(text in said for text in (*_OUT_OF_MEMORY_TEXTS, "outofmemoryerror", "memoryerror")):
        return FaultKind.OUT_OF_MEMORY
    if any(text in said for text in (*_DEVICE_LOST_TEXTS, "acceleratorerror")):
        return FaultKind.DEVICE_LOST
    return FaultKind.OTHER


@dataclass(frozen=True)
class Step:
    """One way to run, on the way down from what was asked for.

    Args:
        name: for people, as in "running <name>".
        on_cpu: on the CPU instead of the device that was asked for.
        capacity_share: share of the capacity ladder that may be used, 0..1; its lowest rung always may.
    """

    name: str
    on_cpu: bool = False
    capacity_share: float = 1.0


AS_CONFIGURED = Step("as configured")


def steps_for(device_is_cpu: bool) -> tuple[Step, ...]:
    """The way down for an engine: half of the tokens, the fewest tokens, then the CPU where it was not on it."""
    merging = (Step("with half of the tokens", capacity_share=0.5), Step("with the fewest tokens", capacity_share=0.0))
    return (AS_CONFIGURED, *merging, *(() if device_is_cpu else (Step("on the CPU", on_cpu=True),)))


class Action(enum.Enum):
    """What to do about a failed call."""

    RETRY = "retry"
    STEP_DOWN = "step down"
    GIVE_UP = "give up"


class FallbackPolicy:
    """Which step an engine is on.

    Every call may fail once and is tried again. When that fails too, the next step is taken, and when there is none,
    the call is given up. A lost device skips the steps that stay on it. From a lower step the first one is tried again
    after a pause, which doubles with every attempt that fails.

    Args:
        steps: from what was asked for to the last resort.
        clock: monotonic seconds.
        first_pause_s: before the first attempt to come back.
        longest_pause_s: between attempts, at most.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        clock: Callable[[], float] = time.monotonic,
        first_pause_s: float = 10.0,
        longest_pause_s: float = 300.0,
    ) -> None:
        self._steps = tuple(steps)
        self._clock = clock
        self._first_pause_s, self._longest_pause_s = first_pause_s, longest_pause_s
        self._pause_s = first_pause_s
        self._index = 0
        self._retried = False
        self._due_s = 0.0
        self._back_s: float | None = None
        self.failures = 0
        """Failed calls so far."""

    @property
    def step(self) -> Step:
        """The step in force."""
        return self._steps[self._index]

    @property
    def degraded(self) -> bool:
        """Not on the first step."""
        return self._index > 0

    @property
    def pause_left_s(self) -> float:
        """Seconds until coming back is tried; 0 when it is due or there is nothing to come back to."""
        return max(self._due_s - self._clock(), 0.0) if self.degraded else 0.0

    @property
    def due(self) -> bool:
        """It is time to try the first step again."""
        return self.degraded and self._clock() >= self._due_s

    def failed(self, kind: FaultKind) -> Action:
        """Decide about a call that failed on the step in force."""
        self.failures += 1
        if not self._retried:
            self._retried = True
            return Action.RETRY
        self._retried = False
        lost = kind is FaultKind.DEVICE_LOST
        following = range(self._index + 1, len(self._steps))
        useful = [i for i in following if not lost or self._steps[i].on_cpu != self.step.on_cpu]
        if not useful:
            return Action.GIVE_UP
        if not self.degraded:
            self._schedule()
        self._index = useful[0]
        return Action.STEP_DOWN

    def succeeded(self) -> None:
        """A call came back with a prediction."""
        self._retried = False
        if self._back_s is not None and not self.degraded and self._clock() - self._back_s > self._pause_s:
            # It has held for longer than it was kept waiting: forget the past.
            self._pause_s, self._back_s = self._first_pause_s, None

    def come_back(self) -> None:
        """Take the first step again; whether it holds, the next calls will tell."""
        self._index, self._retried = 0, False
        self._back_s = self._clock()

    def cannot_come_back(self) -> None:
        """The first step could not even be prepared; wait for longer."""
        self._back_s = self._clock()
        self._schedule()

    def _schedule(self) -> None:
        if self._back_s is not None:
            self._pause_s = min(self._pause_s * 2.0, self._longest_pause_s)
        self._due_s = self._clock() + self._pause_s
