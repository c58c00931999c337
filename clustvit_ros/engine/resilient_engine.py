"""An engine that survives its device: failed calls are repeated, then run with fewer tokens, then on the CPU."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from clustvit_ros.engine.engine import Engine, EngineInfo, Prediction, Settings
from clustvit_ros.engine.fallback import AS_CONFIGURED, Action, FallbackPolicy, FaultKind, classify, steps_for
from clustvit_ros.errors import ConfigError, EngineError, ImageError, ModelError

_LONGEST_CAUSE = 300


def _in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="engine-recovery", daemon=True).start()


class ResilientEngine(Engine):
    """Forwards calls to an engine, and replaces that engine when it fails.

    While it runs otherwise than asked for, `fault` says so, and the device that was asked for is tried again from time
    to time: with fewer tokens by the next call itself, from the CPU by an engine that is made and warmed beside the
    running one.

    Args:
        make: makes an engine on a device ("auto", "cpu", "cuda", "cuda:N").
        device: the device asked for. When it is "auto" and fails at the start, the CPU is used at once.
        adapt: fall back; else failed calls are repeated once, and every prediction is made as configured.
        clock: monotonic seconds.
        background: runs work that takes long elsewhere.
        first_pause_s: before the first attempt to come back; it doubles with every attempt that fails.
        longest_pause_s: between attempts, at most.

    Raises:
        Whatever `make` raises.
    """

    def __init__(
        self,
        make: Callable[[str], Engine],
        device: str = "auto",
        adapt: bool = True,
        clock: Callable[[], float] = time.monotonic,
        background: Callable[[Callable[[], None]], None] = _in_thread,
        first_pause_s: float = 10.0,
        longest_pause_s: float = 300.0,
    ) -> None:
        self._make, self._device = make, device
        self._background = background
        self._lock = threading.Lock()
        self._successor: Engine | None = None
        self._preparing = False
        self._closed = False
        self._cause = ""
        self._image_size: tuple[int, int] | None = None
        self._engine: Engine | None = None
        failure = ""
        try:
            self._engine = make(device)
        except (ConfigError, ModelError):
            raise
        except Exception as error:  # whatever a device raises
            if device != "auto" or not adapt:
                raise
            failure = _first_line(error)
        on_cpu = self._engine is not None and self._engine.info.device.startswith("cpu")
        steps = steps_for(on_cpu) if adapt else (AS_CONFIGURED,)
        self._policy = FallbackPolicy(steps, clock, first_pause_s, longest_pause_s)
        if failure:
            self._cause = failure
            while self._policy.failed(FaultKind.DEVICE_LOST) is not Action.STEP_DOWN:
                pass
        self._info = self._running().info

    @property
    def info(self) -> EngineInfo:
        """What runs now; after a fallback, `device_reason` says why it runs there."""
        return self._info

    @property
    def fault(self) -> str:
        if not self._policy.degraded:
            return ""
        pause_s = self._policy.pause_left_s
        when = f"in {pause_s:.0f} s" if pause_s else "now"
        return (
            f"engine runs {self._policy.step.name} after {self._policy.failures} failed calls: {self._cause}; "
            f"coming back is tried {when}"
        )

    def capacities(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """The engine's ladder for images of (height, width) `image_size`."""
        return self._running().capacities(image_size)

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Warm the engine; a device that fails here is treated as in `segment`."""
        self._image_size = image_size
        self._attempt(lambda engine: engine.warmup(image_size))

    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        """Segment, by whatever step it takes.

        Raises:
            ImageError: wrong shape or type of an image.
            EngineError: even the last resort failed.
        """
        self._come_back()
        shape = images.shape[-3:] if isinstance(images, np.ndarray) else images[0].shape
        size = (shape[0], shape[1])
        self._image_size = size
        return self._attempt(lambda engine: engine.segment(images, self._limited(engine, size, settings)))

    def close(self) -> None:
        """Free what runs, and what was about to."""
        with self._lock:
            self._closed = True
            successor, self._successor = self._successor, None
        for engine in (self._engine, successor):
            if engine is not None:
                engine.close()
        self._engine = None

    def _attempt(self, call: Callable[[Engine], Prediction | None]) -> Prediction:
        while True:
            step = self._policy.step
            try:
                result = call(self._running())
            except (ImageError, ConfigError, ModelError):
                raise  # the caller's, not the device's
            except Exception as error:
                self._cause = _first_line(error)
                kind = classify(error)
                action = self._policy.failed(kind)
                if action is Action.GIVE_UP:
                    raise
            else:
                self._policy.succeeded()
                return result  # type: ignore[return-value]  # warm-up returns nothing
            # Outside of the handler: the exception holds the frames, and they the memory of the call that failed.
            if action is Action.STEP_DOWN and self._policy.step.on_cpu != step.on_cpu:
                self._move_to_cpu(kind)
            elif kind is FaultKind.OUT_OF_MEMORY:
                _free_device_memory()

    def _running(self) -> Engine:
        if self._engine is None:
            if self._closed:
                raise EngineError("the engine is closed; make a new one")
            self._engine = self._make("cpu")
            self._info = replace(self._engine.info, device_reason=f"fell back from {self._device}: {self._cause}")
        return self._engine

    def _limited(self, engine: Engine, image_size: tuple[int, int], settings: Settings) -> Settings:
        share = self._policy.step.capacity_share
        if share >= 1.0:
            return settings
        ladder = engine.capacities(image_size)
        rung = ladder[max(round(len(ladder) * share) - 1, 0)]
        return replace(settings, token_capacity=min(rung, settings.token_capacity or rung))

    def _move_to_cpu(self, kind: FaultKind) -> None:
        failed, self._engine = self._engine, None
        if failed is not None:
            with contextlib.suppress(Exception):  # a lost device cannot be freed
                failed.close()
        del failed
        if kind is not FaultKind.DEVICE_LOST:
            _free_device_memory()

    def _come_back(self) -> None:
        """Adopt an engine that was made on the device asked for, or have one made when it is time."""
        with self._lock:
            successor, self._successor = self._successor, None
        if successor is not None:
            if self._engine is not None:
                self._engine.close()
            self._engine = successor
            self._policy.come_back()
            self._info = successor.info
        elif self._policy.due and not self._preparing:
            if self._policy.step.on_cpu:
                self._preparing = True
                self._background(self._prepare)
            else:
                self._policy.come_back()

    def _prepare(self) -> None:
        engine: Engine | None = None
        try:
            engine = self._make(self._device)
            if engine.info.device.startswith("cpu"):
                raise EngineError(engine.info.device_reason or "the device asked for was not to be had")
            engine.warmup(self._image_size)
        except Exception as error:  # whatever a device raises; the running engine goes on
            self._cause = _first_line(error)
            self._policy.cannot_come_back()
            if engine is not None:
                with contextlib.suppress(Exception):
                    engine.close()
            engine = None
        with self._lock:
            self._preparing = False
            if not self._closed:
                self._successor, engine = engine, None
        if engine is not None:
            engine.close()


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:_LONGEST_CAUSE]


def _free_device_memory() -> None:
    """Give PyTorch's cached blocks back to the device, where PyTorch runs on one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
