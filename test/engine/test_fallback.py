# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Engines that fail on command: what is tried, in which order, and how everything comes back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from failing_machine import IMAGE, Machine, Part

from clustvit_ros.engine import Engine, ScriptedEngine, Settings
from clustvit_ros.engine.fallback import Action, FallbackPolicy, FaultKind, ResilientEngine, classify, steps_for
from clustvit_ros.engine.host import LOAD_LIMIT_S
from clustvit_ros.errors import EngineError, ImageError, ModelError

OUT_OF_MEMORY = EngineError("cuda:0 (Fake) failed on an image of (64, 96): CUDA out of memory. Tried to allocate 2 GiB")
LOST = RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nIt might be reported later")
STICKY = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")


@pytest.fixture(autouse=True)
def no_engine_is_left() -> Iterator[None]:
    yield
    while Machine.all:
        machine = Machine.all.pop()
        machine.may_load.set()
        machine.host.close()


def resilient(*failures: Exception | None) -> ResilientEngine:
    """An engine whose calls fail with these, one after the other and then over again; None is a call that works."""
    script = itertools.cycle(failures or (None,))
    return ResilientEngine(ScriptedEngine(failure=lambda _call: next(script)), FallbackPolicy(steps_for(True)))


def test_a_fault_that_passes_costs_nothing() -> None:
    engine = resilient(EngineError("hiccup"), None)
    assert engine.segment(IMAGE).mask.shape == (1, 64, 96)
    assert engine.fault == ""


def test_out_of_memory_falls_to_the_capacity_that_fits() -> None:
    machine = Machine()
    assert machine.segment() == 24
    machine.failure, machine.most_tokens = OUT_OF_MEMORY, 12
    assert machine.segment() == 12
    assert "runs with half of the tokens after 2 failed calls: cuda:0 (Fake) failed" in machine.host.fault
    assert "CUDA out of memory" in machine.host.fault
    assert "coming back is tried in 10 s" in machine.host.fault
    machine.most_tokens = 3
    assert machine.segment() == 3
    assert machine.segment(token_capacity=2) == 2, "the caller's own bound still holds"
    assert machine.made == ["cuda"]


def test_out_of_memory_at_every_capacity_ends_on_the_cpu() -> None:
    machine = Machine()
    machine.failure = OUT_OF_MEMORY
    assert machine.segment() == 24
    assert machine.made == ["cuda", "cpu"] and machine.closed == ["cuda:0 (Fake)"]
    assert machine.device_in_use == "cpu (fake)"
    reason = machine.host.session.engine.info.device_reason  # type: ignore[union-attr]
    assert reason.startswith("fell back from cuda: cuda:0 (Fake) failed")
    assert "runs on the CPU after 6 failed calls" in machine.host.fault


def test_a_lost_device_goes_to_the_cpu_at_once_and_the_frame_gets_its_mask() -> None:
    machine = Machine()
    machine.failure = LOST
    machine.segment()
    assert len(machine.results) == 1 and machine.made == ["cuda", "cpu"]
    assert "after 2 failed calls: CUDA error: CUDA-capable device(s) is/are busy or unavailable;" in machine.host.fault


def test_comes_back_from_fewer_tokens_and_waits_longer_each_time_it_fails() -> None:
    machine = Machine()
    machine.failure, machine.most_tokens = OUT_OF_MEMORY, 12
    machine.segment()
    policy = machine.host.session.engine._policy  # type: ignore[union-attr]
    attempts = []
    for _ in range(360):
        machine.now_s += 1.0
        before = policy.failures
        assert machine.segment() == 12, "attempts to come back must not cost a frame"
        if policy.failures > before:
            attempts.append(machine.now_s)
    gaps = np.diff([0.0, *attempts])
    np.testing.assert_allclose(gaps[:5], [10, 20, 40, 80, 160], atol=5)
    machine.failure = None
    machine.now_s += 330.0
    machine.segment()
    assert machine.segment() == 24
    assert machine.host.fault == ""


def test_comes_back_from_the_cpu_beside_the_running_engine() -> None:
    machine = Machine()
    machine.segment()
    machine.failure = LOST
    machine.segment()
    machine.gpu_can_be_made = False
    machine.now_s = 11.0
    machine.segment()
    machine.wait_for(lambda: "coming back is tried in 20 s" in machine.host.fault)
    assert "no CUDA-capable device" in machine.host.fault
    assert machine.device_in_use == "cpu (fake)"

    machine.gpu_can_be_made, machine.failure = True, None
    machine.may_load.clear()
    machine.now_s = 32.0
    for _ in range(3):
        machine.segment()
        assert machine.device_in_use == "cpu (fake)", "until the new engine is ready, the old one runs"
    machine.may_load.set()
    machine.wait_for(lambda: machine.device_in_use == "cuda:0 (Fake)")
    machine.segment()
    assert machine.host.fault == ""
    assert machine.made == ["cuda", "cpu", "cuda", "cuda"], "one attempt at a time"
    machine.wait_for(lambda: machine.closed == ["cuda:0 (Fake)", "cpu (fake)"])


def test_a_device_that_comes_back_as_a_cpu_is_not_taken() -> None:
    machine = Machine("auto")
    machine.failure = LOST
    machine.segment()
    machine.gpu_is_a_cpu, machine.now_s = True, 11.0
    machine.segment()
    machine.wait_for(lambda: "coming back is tried in 20 s" in machine.host.fault)
    assert "runs on the CPU" in machine.host.fault


def test_auto_starts_on_the_cpu_when_the_gpu_fails_at_the_start() -> None:
    machine = Machine("auto", gpu_works_at_start=False)
    machine.segment()
    assert machine.made == ["auto", "cpu"]
    assert "no CUDA-capable device" in machine.host.fault
    (error,) = Machine("cuda:0", gpu_works_at_start=False).ended
    assert "no CUDA-capable device" in str(error)


def test_warming_may_fail_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def warmup(part: Part, image_size: tuple[int, int] | None = None) -> None:
        if "cuda" in part.info.device:
            raise LOST

    monkeypatch.setattr(Part, "warmup", warmup)
    assert Machine().device_in_use == "cpu (fake)"


@pytest.mark.parametrize("when", ["frame", "warmup", "start", "way back"])
def test_after_a_sticky_error_nothing_is_loaded_and_whoever_can_end_the_process_is_told(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, told = Machine("auto"), []
    machine.host._on_restart = told.append
    machine.segment()
    if when == "frame":
        machine.failure = STICKY
        machine.slot.put(Settings())
    elif when == "way back":
        machine.failure = LOST
        machine.segment()
        monkeypatch.setattr(Part, "warmup", raising(STICKY))
        machine.now_s = 11.0
        machine.segment()
    else:
        monkeypatch.setattr(*((Part, "warmup") if when == "warmup" else (machine, "make")), raising(STICKY))
        machine.start("b")
    machine.wait_for(lambda: bool(told))
    assert "unspecified launch failure" in str(told[0])
    made = list(machine.made)
    machine.now_s += 1000.0
    machine.host.check()
    assert machine.made == made and machine.host.session is None and not machine.host.loading


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


def test_callers_mistakes_are_not_repeated() -> None:
    engine = resilient()
    with pytest.raises(ImageError):
        engine.segment(IMAGE.astype(np.float32))
    assert engine.fault == ""


def test_a_call_that_fails_everywhere_raises_the_engines_error() -> None:
    engine = resilient(EngineError("broken"))
    for _ in range(3):
        with pytest.raises(EngineError, match="broken"):
            engine.segment(IMAGE)
    assert "runs with the fewest tokens" in engine.fault
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.segment(IMAGE)


def test_without_adaptation_nothing_but_a_retry_happens() -> None:
    machine = Machine(adapts=False)
    machine.failure = OUT_OF_MEMORY
    with pytest.raises(EngineError, match="out of memory"):
        machine.segment()
    machine.failure = None
    assert machine.segment() == 24
    assert machine.made == ["cuda"]


def test_another_model_takes_over_when_it_is_warm_and_not_when_it_is_given_up() -> None:
    machine = Machine()
    machine.segment()
    machine.may_load.clear()
    machine.start("b")
    machine.start("c")
    assert machine.segment() == 24 and machine.host.model == "a" and machine.host.loading
    assert "cancelled" in str(machine.ended[1])
    assert machine.host.keep("a") and not machine.host.loading
    machine.start("d")
    assert not machine.host.keep("x")
    machine.may_load.set()
    machine.wait_for(lambda: machine.host.model == "d")
    machine.segment()
    machine.wait_for(lambda: machine.closed == ["cuda:0 (Fake)"] * 3)
    assert machine.ended[-1] is None and len(machine.warmed) == 2, "what was given up costs no more"


def test_a_model_that_fails_or_takes_too_long_changes_nothing() -> None:
    machine = Machine()
    machine.gpu_can_be_made = False
    machine.start("b")
    machine.wait_for(lambda: len(machine.ended) == 2)
    assert "no CUDA-capable device" in str(machine.ended[1]) and machine.host.model == "a"
    machine.may_load.clear()
    machine.start("c")
    machine.now_s += LOAD_LIMIT_S + 1.0
    machine.host.check()
    assert "not warm after" in str(machine.ended[2]) and not machine.host.loading
    machine.may_load.set()
    assert machine.segment() == 24


def test_when_no_engine_can_be_had_that_is_said_and_tried_again() -> None:
    machine = Machine("cuda")
    machine.failure = LOST

    def make(device: str) -> Engine:
        raise EngineError("no device at all")

    machine.make, working = make, machine.make  # type: ignore[method-assign]
    machine.host._order.make = make  # type: ignore[union-attr]
    machine.slot.put(Settings(merge_threshold=1.0))
    machine.wait_for(lambda: "no engine runs: no device at all; another attempt" in machine.host.fault)
    machine.host.check()
    machine.failure = None
    machine.host._order.make = working  # type: ignore[union-attr]
    machine.now_s += 1000.0
    machine.host.check()
    machine.wait_for(lambda: len(machine.results) == 1)
    assert machine.device_in_use == "cuda:0 (Fake)"


def test_a_model_that_cannot_be_loaded_is_no_fault_of_the_device() -> None:
    machine = Machine("auto")

    def make(_device: str) -> Engine:
        raise ModelError("no such model")

    machine.make = make  # type: ignore[method-assign]
    machine.start("b")
    machine.wait_for(lambda: len(machine.ended) == 2)
    assert isinstance(machine.ended[1], ModelError)
    assert machine.host.fault == ""


def test_closing_frees_what_runs_and_what_was_prepared() -> None:
    machine = Machine()
    machine.may_load.clear()
    machine.start("b")
    assert machine.host.close()
    machine.may_load.set()
    machine.wait_for(lambda: machine.closed == ["cuda:0 (Fake)"] * 2)
    assert machine.host.session is None


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
        assert [policy.failed(ValueError("x")) for _ in range(2)] == [Action.RETRY, Action.STEP_DOWN]
        pauses.append(policy.pause_left_s)
        now[0] += pauses[-1]
        assert policy.due
        policy.come_back()
        now[0] += good_s
        policy.succeeded()
    assert pauses == [10.0, 20.0, 40.0, 10.0]
