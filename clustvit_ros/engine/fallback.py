# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What to do when an engine fails: try again, then do with less, then with the CPU, and come back when that works.

`FallbackPolicy` decides, its clock injected; `ResilientEngine` carries out what one engine can do about it; moving to
another device and back is the business of `EngineHost`.
"""

from __future__ import annotations

import contextlib
import enum
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from clustvit_ros.engine.engine import Engine, EngineInfo, Prediction, Settings
from clustvit_ros.engine.worker import DeviceLost, RestartNeeded
from clustvit_ros.errors import ConfigError, EngineError, ImageError, ModelError

T = TypeVar("T")

_LONGEST_CAUSE = 300


class FaultKind(enum.Enum):
    """What an exception says about the device."""

    OUT_OF_MEMORY = "out of memory"
    CAPTURE = "cannot capture graphs"
    STICKY = "process lost its device"
    DEVICE_LOST = "device lost"
    OTHER = "engine failed"


# Texts of CUDA, cuBLAS, cuDNN, TensorRT, ONNX Runtime and Tegra's driver, in the order in which they decide; PyTorch
# raises most of them as plain RuntimeErrors. "CUDA error: out of memory" leaves the device usable; so does what a
# library does not support, and what is not permitted while a graph is captured (errors 900 to 906).
_TEXTS = (
    (FaultKind.OUT_OF_MEMORY, (
        "out of memory", "failed to allocate memory", "alloc_failed", "bad allocation", "bad_alloc",
        "can't allocate memory", "outofmemoryerror", "memoryerror", "nvml_success == r internal assert failed",
        "nvmapmemalloc",
    )),
    # After these every call to CUDA fails with the same error, until the process ends.
    (FaultKind.STICKY, (
        "illegal memory access", "illegal address", "illegal instruction", "misaligned address",
        "invalid program counter", "address space error", "hardware stack error", "device-side assert",
        "unspecified launch failure", "launch timed out", "uncorrectable ecc error",
    )),
    (FaultKind.CAPTURE, (
        "when stream is capturing", "previous error during capture", "merge of separate capture sequences",
        "capture was not ended in the same stream", "capturing stream has unjoined work",
        "dependency created on uncaptured work", "depend on a capturing blocking stream",
        "captures_underway.empty() internal assert",
    )),
    (FaultKind.OTHER, ("cudnn_status_not_supported",)),
    (FaultKind.DEVICE_LOST, (
        "cuda error", "cuda failure", "cudaerror", "cublas_status", "cudnn_status", "cuda driver", "device lost", "xid",
        "acceleratorerror",
    )),
)  # fmt: skip


def classify(error: BaseException) -> FaultKind:
    """Tell the kinds of failure apart by what the exception and its causes say."""
    texts: list[str] = []
    link: BaseException | None = error
    while link is not None and len(texts) < 8:
        texts.append(f"{type(link).__name__}: {link}".lower())
        link = link.__cause__ or link.__context__
    said = " | ".join(texts)
    return next((kind for kind, known in _TEXTS if any(text in said for text in known)), FaultKind.OTHER)


@dataclass(frozen=True)
class Step:
    """One way to run, on the way down from what was asked for.

    Args:
        name: words for people, as in "engine runs <name>".
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
    RESTART = "restart the process"


class FallbackPolicy:
    """Which step an engine is on.

    Every call may fail once and is tried again. When that fails too, the next step is taken, and when there is none,
    the call is given up. A lost device skips the steps that stay on it; after an error that no later call of the
    process gets over, only a new process helps. From a lower step the first one is tried again after a pause, which
    doubles with every attempt that fails.

    Args:
        steps: ways to run, from what was asked for to the last resort.
        clock: gives monotonic seconds.
        first_pause_s: seconds before the first attempt to come back.
        longest_pause_s: most seconds between two attempts.
    """

    def __init__(
        self, steps: Sequence[Step], clock: Callable[[], float] = time.monotonic, first_pause_s: float = 10.0,
        longest_pause_s: float = 300.0,
    ) -> None:  # fmt: skip
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
        self.cause = ""
        """What the device said last, in one line."""

    @property
    def step(self) -> Step:
        """The step in force."""
        return self._steps[self._index]

    @property
    def degraded(self) -> bool:
        """Whether the engine runs otherwise than asked for."""
        return self._index > 0

    @property
    def fault(self) -> str:
        """Why the engine does not run as it was asked to, in a sentence; empty while it does."""
        if not self.degraded:
            return ""
        pause_s = self.pause_left_s
        when = f"in {pause_s:.0f} s" if pause_s else "now"
        return (
            f"engine runs {self.step.name} after {self.failures} failed calls: {self.cause}; "
            f"coming back is tried {when}"
        )

    @property
    def pause_left_s(self) -> float:
        """Seconds until coming back is tried; 0 when it is due or there is nothing to come back to."""
        return max(self._due_s - self._clock(), 0.0) if self.degraded else 0.0

    @property
    def due(self) -> bool:
        """It is time to try the first step again."""
        return self.degraded and self._clock() >= self._due_s

    def failed(self, error: Exception, kind: FaultKind | None = None) -> Action:
        """Decide about a call that failed on the step in force.

        Args:
            error: what the engine raised.
            kind: what that says about the device; None finds out from the error's text.
        """
        self.failures += 1
        self.cause = first_line(error)
        kind = kind or classify(error)
        if kind is FaultKind.STICKY:
            return Action.RESTART
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

    def fall_to_cpu(self, error: Exception) -> None:
        """The device could not even be started: take the step that does without it.

        Raises:
            RestartNeeded: the process can use no device any more.
            Exception: `error`, where there is no such step.
        """
        if classify(error) is FaultKind.STICKY:
            raise RestartNeeded(first_line(error)) from error
        while self.failed(error, FaultKind.DEVICE_LOST) is not Action.GIVE_UP:
            if self.step.on_cpu:
                return
        raise error

    def cannot_come_back(self, error: BaseException) -> None:
        """The first step could not even be prepared; wait for longer."""
        self.cause = first_line(error)
        self._back_s = self._clock()
        self._schedule()

    def _schedule(self) -> None:
        if self._back_s is not None:
            self._pause_s = min(self._pause_s * 2.0, self._longest_pause_s)
        self._due_s = self._clock() + self._pause_s


class ResilientEngine(Engine):
    """Forwards calls to an engine, repeats one that fails, and does with fewer tokens where that helps.

    Args:
        engine: what runs.
        policy: decides; shared by the engines that follow each other for one model.
        device_reason: why the engine runs on this device, where that is not the engine's own choice.
    """

    def __init__(self, engine: Engine, policy: FallbackPolicy, device_reason: str = "") -> None:
        self._engine, self._policy = engine, policy
        self.image_size: tuple[int, int] | None = None
        """(height, width) of the images that it was last warmed for."""
        self._on_cpu = engine.info.device.startswith("cpu")
        self._device_reason = device_reason
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        info = self._engine.info
        return replace(info, device_reason=self._device_reason) if self._device_reason else info

    @property
    def fault(self) -> str:
        return self._policy.fault or self._engine.fault

    @property
    def thread_counts(self) -> tuple[int, ...]:
        return self._engine.thread_counts

    def input_size(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, int]:
        return self._engine.input_size(image_size, input_scale)

    def capacities(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, ...]:
        return self._engine.capacities(image_size, input_scale)

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Warm the engine; a device that fails here is treated as in `segment`."""
        self._attempt(lambda: self._engine.warmup(image_size))
        self.image_size = image_size or self.image_size

    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        """Segment, by whatever step this device allows.

        Raises:
            ImageError, ConfigError: the caller's mistake.
            DeviceLost: only another device can go on, or as `RestartNeeded` only another process.
            Exception: the engine's own, when nothing helps.
        """
        return self._attempt(lambda: self._engine.segment(images, self._limited(images, settings)))

    def look_ahead(self, upcoming: Callable[[], np.ndarray | None]) -> None:
        self._engine.look_ahead(upcoming)

    def close(self) -> None:
        """Free the engine; what a lost device still holds cannot be freed."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(Exception):
                self._engine.close()
            _free_device_memory()

    def _attempt(self, call: Callable[[], T]) -> T:
        if self._closed:
            raise EngineError("the engine is closed; make a new one")
        while True:
            failure: Exception | None = None
            try:
                result = call()
            except (ImageError, ConfigError, ModelError, RestartNeeded):
                raise
            except Exception as error:  # whatever a device raises
                action = self._policy.failed(error)
                if action is Action.GIVE_UP:
                    raise
                if action is Action.RESTART:
                    raise RestartNeeded(self._policy.cause) from error
                if self._policy.step.on_cpu and not self._on_cpu:
                    raise DeviceLost(self._policy.cause) from error
                failure = error
            else:
                self._policy.succeeded()
                return result
            # Outside of the handler: the exception holds the frames, and they the memory of the call that failed.
            out_of_memory, failure = classify(failure) is FaultKind.OUT_OF_MEMORY, None
            if out_of_memory:
                _free_device_memory()

    def _limited(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings) -> Settings:
        share = self._policy.step.capacity_share
        if share >= 1.0:
            return settings
        height, width = images.shape[-3:-1] if isinstance(images, np.ndarray) else images[0].shape[:2]
        ladder = self._engine.capacities((height, width), settings.input_scale)
        rung = ladder[max(round(len(ladder) * share) - 1, 0)]
        return replace(settings, token_capacity=min(rung, settings.token_capacity or rung))


def first_line(error: BaseException) -> str:
    """What an exception says, in one line of bounded length."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:_LONGEST_CAUSE]


def _free_device_memory() -> None:
    """Give PyTorch's cached blocks back to the device, where PyTorch runs on one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        from clustvit_ros.engine.recorded_graph import CAPTURE_LOCK  # needs PyTorch

        with CAPTURE_LOCK, contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
