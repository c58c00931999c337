"""Engines that fail on command: what is tried, in which order, and how everything comes back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from clustvit_ros.engine import Engine, ScriptedEngine, Settings
from clustvit_ros.engine.fallback import Action, FallbackPolicy, FaultKind, classify, steps_for
from clustvit_ros.engine.resilient_engine import ResilientEngine
from clustvit_ros.errors import EngineError, ImageError, ModelError

IMAGE = np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3)  # 24 tokens: rungs of 3
OUT_OF_MEMORY = EngineError("cuda:0 (Fake) failed on an image of (64, 96): CUDA out of memory. Tried to allocate 2 GiB")
LOST = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")


class Machine:
    """A GPU that fails while `failure` is set, and optionally only above `most_tokens`; a CPU that always works."""

    def __init__(self, device: str = "cuda", gpu_works_at_start: bool = True) -> None:
        self.now_s = 0.0
        self.failure: Exception | None = None
        self.most_tokens = 0
        self.made: list[str] = []
        self.closed: list[str] = []
        self.later: list[Callable[[], None]] = []
        self.gpu_can_be_made = gpu_works_at_start
        self.engine = ResilientEngine(self.make, device, clock=lambda: self.now_s, background=self.later.append)

    def make(self, device: str) -> Engine:
        self.made.append(device)
        if device != "cpu" and not self.gpu_can_be_made:
            raise RuntimeError("CUDA error: no CUDA-capable device is detected")
        return Part(self, "cpu (fake)" if device == "cpu" else "cuda:0 (Fake)")

    def segment(self, **settings: float) -> int:
        """The token capacity that a frame was segmented with."""
        prediction = self.engine.segment(IMAGE, Settings(**{"merge_threshold": 1.0, **settings}))  # type: ignore[arg-type]
        np.testing.assert_array_equal(prediction.mask[0], IMAGE[..., 1] >> 6)
        return prediction.stats.token_capacity

    def run_later(self) -> None:
        for work in self.later:
            work()
        self.later.clear()


class Part(ScriptedEngine):
    """One of the machine's engines."""

    def __init__(self, machine: Machine, device: str) -> None:
        super().__init__(device=device)
        self.machine = machine
        self.calls = 0

    def segment(self, images, settings=Settings()):
        self.calls += 1
        prediction = super().segment(images, settings)
        machine, tokens = self.machine, prediction.stats.token_capacity
        if machine.failure is not None and "cuda" in self.info.device and tokens > machine.most_tokens:
            raise machine.failure
        return prediction

    def close(self) -> None:
        self.machine.closed.append(self.info.device)


def test_a_fault_that_passes_costs_nothing() -> None:
    failures = iter([EngineError("hiccup")])
    parts = [ScriptedEngine(failure=lambda _call: next(failures, None))]
    engine = ResilientEngine(lambda _device: parts[0], "cpu")
    assert engine.segment(IMAGE).mask.shape == (1, 64, 96)
    assert engine.fault == ""


def test_out_of_memory_falls_to_the_capacity_that_fits() -> None:
    machine = Machine()
    assert machine.segment() == 24
    machine.failure, machine.most_tokens = OUT_OF_MEMORY, 12
    assert machine.segment() == 12
    assert "runs with half of the tokens after 2 failed calls: cuda:0 (Fake) failed" in machine.engine.fault
    assert "CUDA out of memory" in machine.engine.fault
    assert "coming back is tried in 10 s" in machine.engine.fault
    machine.most_tokens = 3
    assert machine.segment() == 3
    assert machine.segment(token_capacity=2) == 2, "the caller's own bound still holds"
    assert machine.made == ["cuda"]


def test_out_of_memory_at_every_capacity_ends_on_the_cpu() -> None:
    machine = Machine()
    machine.failure = OUT_OF_MEMORY
    assert machine.segment() == 24
    assert machine.made == ["cuda", "cpu"]
    assert machine.closed == ["cuda:0 (Fake)"]
    assert machine.engine.info.device == "cpu (fake)"
    assert machine.engine.info.device_reason.startswith("fell back from cuda: cuda:0 (Fake) failed")
    assert "runs on the CPU after 6 failed calls" in machine.engine.fault


def test_a_lost_device_goes_to_the_cpu_at_once() -> None:
    machine = Machine()
    machine.failure = LOST
    machine.segment()
    assert machine.made == ["cuda", "cpu"]
    assert "after 2 failed calls: CUDA error: unspecified launch failure;" in machine.engine.fault


def test_comes_back_from_fewer_tokens_and_waits_longer_each_time_it_fails() -> None:
    machine = Machine()
    machine.failure, machine.most_tokens = OUT_OF_MEMORY, 12
    machine.segment()
    attempts = []
    for _ in range(700):
        machine.now_s += 1.0
        before = machine.engine._policy.failures
        assert machine.segment() == 12, "attempts to come back must not cost a frame"
        if machine.engine._policy.failures > before:
            attempts.append(machine.now_s)
    gaps = np.diff([0.0, *attempts])
    np.testing.assert_array_equal(gaps[:5], [10, 20, 40, 80, 160])
    machine.failure = None
    machine.now_s += 300.0
    assert machine.segment() == 24
    assert machine.engine.fault == ""


def test_comes_back_from_the_cpu_beside_the_running_engine() -> None:
    machine = Machine()
    machine.failure = LOST
    machine.segment()
    machine.gpu_can_be_made = False
    machine.now_s = 11.0
    machine.segment()
    assert len(machine.later) == 1
    machine.segment()
    assert len(machine.later) == 1, "one attempt at a time"
    machine.run_later()
    assert machine.engine.info.device == "cpu (fake)"
    assert "no CUDA-capable device" in machine.engine.fault
    assert "coming back is tried in 20 s" in machine.engine.fault

    machine.gpu_can_be_made, machine.failure = True, None
    machine.now_s = 32.0
    machine.segment()
    assert machine.engine.info.device == "cpu (fake)", "until the new engine is ready, the old one runs"
    machine.run_later()
    machine.segment()
    assert machine.engine.info.device == "cuda:0 (Fake)"
    assert machine.engine.fault == ""
    assert machine.closed == ["cuda:0 (Fake)", "cpu (fake)"]


def test_a_device_that_comes_back_as_a_cpu_is_not_taken() -> None:
    machine = Machine("auto")
    machine.failure = LOST
    machine.segment()
    machine.make = lambda device: Part(machine, "cpu (fake)")  # type: ignore[method-assign]
    machine.engine._make = machine.make
    machine.now_s = 11.0
    machine.segment()
    machine.run_later()
    assert "runs on the CPU" in machine.engine.fault


def test_auto_starts_on_the_cpu_when_the_gpu_fails_at_the_start() -> None:
    machine = Machine("auto", gpu_works_at_start=False)
    machine.segment()
    assert machine.made == ["auto", "cpu"]
    assert "no CUDA-capable device" in machine.engine.fault
    with pytest.raises(RuntimeError, match="no CUDA-capable device"):
        Machine("cuda:0", gpu_works_at_start=False)


def test_a_model_that_cannot_be_loaded_is_no_fault_of_the_device() -> None:
    def make(_device: str) -> Engine:
        raise ModelError("no such model")

    with pytest.raises(ModelError):
        ResilientEngine(make, "auto")


def test_callers_mistakes_are_not_repeated() -> None:
    machine = Machine()
    with pytest.raises(ImageError):
        machine.engine.segment(IMAGE.astype(np.float32))
    assert machine.engine.fault == ""


def test_a_call_that_fails_everywhere_raises_the_engines_error() -> None:
    engine = ResilientEngine(lambda _device: ScriptedEngine(failure=lambda _call: EngineError("broken")), "cpu")
    for _ in range(3):
        with pytest.raises(EngineError, match="broken"):
            engine.segment(IMAGE)
    assert "runs with the fewest tokens" in engine.fault


def test_without_adaptation_nothing_but_a_retry_happens() -> None:
    calls: list[int] = []

    def failure(call: int) -> Exception | None:
        calls.append(call)
        return OUT_OF_MEMORY if call != 1 else None

    engine = ResilientEngine(lambda _device: ScriptedEngine(failure=failure, device="cuda:0"), "cuda", adapt=False)
    assert engine.segment(IMAGE, Settings(merge_threshold=1.0)).stats.token_capacity == 24
    with pytest.raises(EngineError, match="out of memory"):
        engine.segment(IMAGE)
    assert calls == [0, 1, 2, 3]


def test_warming_may_fail_as_well() -> None:
    machine = Machine()

    def broken(image_size: tuple[int, int] | None = None) -> None:
        raise LOST

    machine.engine._engine.warmup = broken  # type: ignore[union-attr, method-assign]
    machine.engine.warmup((64, 96))
    assert machine.engine.info.device == "cpu (fake)"


def test_closing_frees_what_runs_and_what_was_prepared() -> None:
    machine = Machine()
    machine.failure = LOST
    machine.segment()
    machine.failure, machine.now_s = None, 11.0
    machine.segment()
    machine.engine.close()
    machine.run_later()
    assert sorted(machine.closed) == ["cpu (fake)", "cuda:0 (Fake)", "cuda:0 (Fake)"]
    with pytest.raises(EngineError, match="closed"):
        machine.engine.segment(IMAGE)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OUT_OF_MEMORY, FaultKind.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), FaultKind.OUT_OF_MEMORY),
        (RuntimeError("[ONNXRuntimeError] Failed to allocate memory for buffer"), FaultKind.OUT_OF_MEMORY),
        (MemoryError(), FaultKind.OUT_OF_MEMORY),
        (LOST, FaultKind.DEVICE_LOST),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"), FaultKind.DEVICE_LOST),
        (ValueError("shapes differ"), FaultKind.OTHER),
    ],
)  # fmt: skip
def test_kinds_of_failure(error: Exception, kind: FaultKind) -> None:
    assert classify(error) is kind
    try:
        raise EngineError("the engine failed") from error
    except EngineError as wrapped:
        assert classify(wrapped) is kind


def test_pauses_start_over_once_the_device_has_held() -> None:
    now = [0.0]
    policy = FallbackPolicy(steps_for(True), lambda: now[0])
    pauses = []
    for good_s in (1.0, 1.0, 100.0, 1.0):
        assert [policy.failed(FaultKind.OTHER) for _ in range(2)] == [Action.RETRY, Action.STEP_DOWN]
        pauses.append(policy.pause_left_s)
        now[0] += pauses[-1]
        assert policy.due
        policy.come_back()
        now[0] += good_s
        policy.succeeded()
    assert pauses == [10.0, 20.0, 40.0, 10.0]
