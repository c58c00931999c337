# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Captured graphs under the rules of capture: other threads at work, many sizes, and every step that can fail."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from fake_cuda import ILLEGAL, NOT_PERMITTED, OUT_OF_MEMORY, FakeCuda

from clustvit_ros.engine import Settings, network_engine
from clustvit_ros.engine.fallback import FallbackPolicy, FaultKind, ResilientEngine, classify, steps_for
from clustvit_ros.engine.graph_engine import GraphEngine
from clustvit_ros.engine.recorded_graph import CudaRecorder
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.engine.worker import DeviceLost, RestartNeeded
from clustvit_ros.measure.bench import BenchCase, Pipeline

if not hasattr(torch.library, "custom_op"):
    pytest.skip("the stand-in needs PyTorch 2.4 or later", allow_module_level=True)

MASK_ALONE = Settings(confidence=False)
UNSUPPORTED = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"
LOST = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)

    class Timer(network_engine.StageTimer):
        def __init__(self, device):
            super().__init__(torch.device("cuda"))

    monkeypatch.setattr(network_engine, "StageTimer", Timer)
    yield fake
    assert not fake.races


@pytest.fixture
def make(cuda, toy_model):
    """Makes the engine as the node has it; its graphs' memory is the CPU's."""

    def make(warm=True):
        recorder = CudaRecorder(torch.device("cpu"))
        for name in ("send", "download"):
            setattr(recorder, name, counted(cuda, getattr(recorder, name)))
        inner = GraphEngine.from_model(toy_model, "cpu", recorder=recorder)
        engine = ResilientEngine(inner, FallbackPolicy(steps_for(device_is_cpu=False)))
        engine._on_cpu = False
        if warm:
            engine.warmup((96, 128))
        return engine

    return make


def counted(cuda, method):
    def call(target, source):
        cuda.call("copy")
        return method(target, source)

    return call


@pytest.fixture(scope="module")
def eager(toy_model):
    return TorchEngine.from_model(toy_model, "cpu")


def pictures(count, size=(96, 128)):
    return list(np.random.default_rng(5).integers(0, 256, (count, *size, 3), np.uint8))


def test_replays_compute_what_eager_frames_do(make, eager, cuda):
    engine = make()
    for image in pictures(3):
        for settings in (Settings(clusters=True), Settings(0.3, 12), Settings(confidence_threshold=0.3)):
            ours, reference = engine.segment(image, settings), eager.segment(image, settings)
            assert (ours.mask == reference.mask).mean() > 0.999
            assert ours.stats.tokens_kept == reference.stats.tokens_kept
    assert engine.info.engine == "cuda_graph" and engine.fault == "" and not cuda.collisions


def test_a_frame_waits_twice_and_launches_three_graphs(make, toy_model, cuda):
    engine = make()
    image = pictures(1)[0]
    engine.segment(image)
    cuda.calls.clear()
    stats = engine.segment(image).stats
    assert cuda.calls["stream wait"] == 2 and cuda.calls["replay"] == 3
    assert cuda.calls["device wait"] == cuda.calls["empty_cache"] == cuda.calls["capture"] == 0
    assert cuda.calls["wait between streams"] == 2
    calls = dict(cuda.calls)
    cuda.calls.clear()
    Pipeline(BenchCase("toy", toy_model, "cuda_graph", "cuda", 0, (96, 128), token_capacity=12), engine)()
    assert cuda.calls == {**calls, "copy": calls["copy"] - 1}, "what is timed is a node's frame, without confidence"
    assert list(stats.stages_ms) == ["preprocess", "encode", "finish", "postprocess"]
    assert sum(stats.stages_ms.values()) == pytest.approx(stats.total_ms, rel=0.05)
    cuda.calls.clear()
    engine.segment(image, Settings(merge_threshold=1.0))
    assert cuda.calls["stream wait"] == 1, "nothing is counted where nothing is merged"


def test_the_next_frame_is_brought_while_the_device_is_at_this_one(make, eager, cuda):
    engine, upcoming, copies = make(), [], []
    engine.look_ahead(lambda: upcoming[0])
    for settings in (MASK_ALONE, Settings(merge_threshold=1.0), Settings(0.3, merge_exempt_region=((0, 0, 1, 0.5),))):
        first, second, third, other = pictures(4)
        for image, upcoming[:] in ((first, [second]), (second, [other]), (third, [third]), (third, [None])):
            cuda.calls.clear()
            mask = engine.segment(image, settings).mask
            copies.append(cuda.calls["copy"])
            assert (mask == eager.segment(image, settings).mask).mean() > 0.999
            assert cuda.calls["replay"] == 3 and cuda.calls["stream wait"] + cuda.calls["event wait"] <= 2
    # Back come the kept count, the mask and its kept tokens. There go this image, unless it has come, and the next.
    assert copies[:4] == [3 + 2, 3 + 1, 3 + 2, 3]


@pytest.mark.parametrize("missing", ["receive", "release", "wait", "free"])
def test_every_order_between_copies_graphs_and_the_host_is_needed(make, cuda, monkeypatch, missing):
    engine, (first, second, third) = make(warm=False), pictures(3)
    engine.segment(first, MASK_ALONE)
    engine.look_ahead(lambda: first)
    recorder, images = engine._engine._recorder, engine._engine._plan.images
    if missing == "free":  # a host buffer may be written again
        send = recorder.send
        monkeypatch.setattr(recorder, "send", lambda *buffers: (send(*buffers), lambda: None)[1])
    else:
        monkeypatch.setattr(recorder, missing, lambda: None)
    images.hosts = [(host, lambda: None) for host, _ in images.hosts]
    for image in (second, third, second):  # never the one that was expected
        engine.segment(image, Settings(merge_threshold=1.0, confidence=False))
    assert cuda.races
    cuda.races.clear()


def test_a_swap_under_load_disturbs_nobody(make, eager, cuda):
    old, image = make(), pictures(1)[0]
    expected, stop = eager.segment(image, MASK_ALONE).mask, threading.Event()
    told, masks = set(), []

    def frames():
        while not stop.is_set():
            masks.append(old.segment(image, MASK_ALONE).mask)
            told.add((old.info.engine, old.fault))

    thread = threading.Thread(target=frames, name="running engine")
    thread.start()
    news = []
    loaders = [threading.Thread(target=lambda: news.append(make())) for _ in range(2)]
    for loader in loaders:
        loader.start()
    for loader in loaders:
        loader.join()
    closed = news.pop()
    closed.close()
    before = len(masks)
    while len(masks) < before + 3 and thread.is_alive():
        threading.Event().wait(0.005)
    stop.set()
    thread.join()
    assert told == {("cuda_graph", "")} and not cuda.collisions
    assert all((mask == expected).mean() > 0.999 for mask in masks)
    assert (news[0].segment(image, MASK_ALONE).mask == expected).mean() > 0.999
    assert news[0].info.engine == "cuda_graph"


def test_nothing_is_recorded_in_steady_state(make, eager, cuda):
    engine = make()
    sizes = ((96, 128), (96, 160), (96, 176), (128, 96), (112, 112), (96, 144))
    images = {size: pictures(6, size) for size in sizes}

    def turn():
        for batch in range(1, 7):
            engine.segment(images[96, 128][:batch], MASK_ALONE)
        for of_size in images.values():
            engine.segment(of_size[0], MASK_ALONE)
        for capacity in range(1, 49, 4):
            engine.segment(images[96, 128][0], Settings(1.0, capacity, confidence=False))

    turn()
    cuda.calls.clear()
    turn()
    assert cuda.calls["capture"] == 0
    for batch in (3, 5):
        together = engine.segment(images[96, 128][:batch], Settings(1.0, 12))
        assert together.mask.shape == together.confidence.shape == (batch, 96, 128)
        alone = [eager.segment(image, Settings(1.0, 12)).mask[0] for image in images[96, 128][:batch]]
        assert (together.mask == np.stack(alone)).mean() > 0.999
        assert together.stats.tokens_kept == 12


def test_memory_bounds_what_is_remembered(make, cuda):
    cuda.total_bytes = 8_000_000
    engine = make()
    for width in range(128, 128 + 16 * 8, 16):
        engine.segment(np.zeros((96, width, 3), np.uint8), Settings(output_size=(90, width)))
    plans = engine._engine._plans
    assert 1 <= len(plans) < 6
    assert engine.segment(pictures(1)[0]).mask.shape == (1, 96, 128)


@pytest.mark.parametrize("step", ["capture", "replay", "copy", "stream wait"])
def test_out_of_memory_is_met_with_fewer_tokens_wherever_it_happens(make, cuda, step):
    engine = make(warm=False)
    cuda.fails[step] = OUT_OF_MEMORY
    with pytest.raises(DeviceLost, match="out of memory") as lost:
        engine.segment(pictures(1)[0])
    assert not isinstance(lost.value, RestartNeeded), "another engine goes on with the frame"
    assert engine.info.engine == "cuda_graph" and "out of memory" in engine.fault
    del cuda.fails[step]
    assert engine.segment(pictures(1)[0]).mask.shape == (1, 96, 128)
    assert engine.info.engine == "cuda_graph" and not cuda.collisions


@pytest.mark.parametrize(
    ("step", "warm"),
    [*((step, False) for step in ("capture", "replay", "copy", "stream wait")), ("capture", True), ("replay", True)],
)
def test_after_a_sticky_error_a_new_process_is_needed(make, cuda, step, warm):
    engine = make(warm)
    cuda.fails[step] = ILLEGAL
    image = pictures(1, (96, 176))[0]
    with pytest.raises(RestartNeeded, match="illegal memory access"):
        engine.segment(image)
    assert cuda.calls["capture"] <= 1 + 12 * warm, "it is not tried again"


@pytest.mark.parametrize("step", ["replay", "copy", "stream wait"])
def test_a_lost_device_goes_to_the_cpu(make, cuda, step):
    engine = make()
    cuda.fails[step] = LOST
    with pytest.raises(DeviceLost, match="busy or unavailable") as lost:
        engine.segment(pictures(1)[0])
    assert not isinstance(lost.value, RestartNeeded)


def test_a_failed_capture_is_told_and_frames_go_on_eagerly(make, cuda, caplog):
    engine = make(warm=False)
    cuda.fails["capture"] = NOT_PERMITTED
    image = pictures(1)[0]
    assert engine.segment(image).mask.shape == (1, 96, 128)
    assert engine.info.engine == "torch"
    assert engine.info.device_reason.endswith("frames run without graphs")
    told = f"cannot capture CUDA graphs ({NOT_PERMITTED}): frames run without graphs, which is slower"
    assert told in engine.fault and told in caplog.text
    cuda.fails.clear()
    assert engine.segment(image).mask.shape == (1, 96, 128)


def test_an_allocator_that_does_not_survive_a_failed_capture_needs_a_new_process(make, cuda):
    cuda.allocator_breaks = True
    engine = make(warm=False)
    cuda.fails["capture"] = NOT_PERMITTED
    with pytest.raises(RestartNeeded, match=r"unable to go on .*captures_underway"):
        engine.segment(pictures(1)[0])


@pytest.mark.parametrize(("error", "failures"), [(UNSUPPORTED, 6), (LOST, 2)])
def test_what_a_library_lacks_is_no_lost_device(make, cuda, error, failures):
    engine = make(warm=False)
    cuda.fails["capture"] = error
    with pytest.raises(DeviceLost) as given_up:
        engine.segment(pictures(1)[0])
    assert not isinstance(given_up.value, RestartNeeded) and engine.info.engine == "cuda_graph"
    assert f"after {failures} failed calls" in engine.fault, "with fewer tokens it may work, unless the device is lost"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp"', FaultKind.OUT_OF_MEMORY),
        ("NvMapMemAllocInternalTagged: 1075072515 error 12", FaultKind.OUT_OF_MEMORY),
        (OUT_OF_MEMORY, FaultKind.OUT_OF_MEMORY),
        (NOT_PERMITTED, FaultKind.CAPTURE),
        ("CUDA error: operation failed due to a previous error during capture", FaultKind.CAPTURE),
        (UNSUPPORTED, FaultKind.OTHER),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", FaultKind.DEVICE_LOST),
        (LOST, FaultKind.DEVICE_LOST),
        (ILLEGAL, FaultKind.STICKY),
        ("CUDA error: unspecified launch failure", FaultKind.STICKY),
        ("CUDA error: device-side assert triggered", FaultKind.STICKY),
    ],
)
def test_what_a_gpu_says_is_understood(text, kind):
    assert classify(RuntimeError(text)) is kind


def test_the_stand_in_keeps_to_the_rules(cuda):
    recorder, source = CudaRecorder(torch.device("cpu")), torch.ones(3)
    graph = recorder.record(lambda: source * 2)
    source.fill_(4)
    graph.replay()
    assert graph.outputs.tolist() == [8, 8, 8]
    for offence in (torch.cuda.synchronize, torch.cuda.empty_cache, lambda: source.sum().item()):
        with pytest.raises(RuntimeError, match="captur"):
            recorder.record(lambda offence=offence: (source + 1, offence())[0] if recording(cuda) else source + 1)
    assert len(cuda.collisions) == 2
    lost = torch.ones(3)
    forgotten = torch.cuda.CUDAGraph()
    forgotten.capture_begin(capture_error_mode="thread_local")
    _ = lost * 2
    forgotten.capture_end()
    del lost
    with pytest.raises(RuntimeError, match="illegal memory access"):
        forgotten.replay()


def recording(cuda):
    return torch.cuda.is_current_stream_capturing()
