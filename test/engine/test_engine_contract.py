# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What every engine promises, whatever runs behind it."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from clustvit_ros.engine import ENGINES, Settings, create_engine
from clustvit_ros.engine.graph_engine import GraphEngine
from clustvit_ros.engine.recorded_graph import EagerRecorder
from clustvit_ros.errors import ConfigError, EngineError, ImageError, ModelError
from clustvit_ros.networks.vit_config import MERGINGS


@pytest.fixture(params=[*ENGINES, "torch int8"])
def engine(request, toy_model, onnx_cache):
    name, _, precision = request.param.partition(" ")
    if name.startswith("onnxruntime"):
        for package in ("onnx", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs {package}, of the extra 'onnx'")
    if precision == "int8":
        request.getfixturevalue("vnni")
    engine = create_engine(str(toy_model), name, device="cpu", precision=precision or "float32")
    engine.warmup((120, 160))
    yield engine
    engine.close()


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)


def test_maps_have_the_images_size_and_type(engine, image):
    prediction = engine.segment(image, Settings(clusters=True))
    for array in (prediction.mask, prediction.confidence, prediction.cluster_map):
        assert array.shape == (1, 120, 160) and array.dtype == np.uint8
    assert prediction.mask.max() < len(engine.info.classes)


@pytest.mark.parametrize("size", [(1, 1), (7, 333), (300, 200)])
def test_output_size_is_kept(engine, image, size):
    prediction = engine.segment(image, Settings(output_size=size, clusters=True))
    assert prediction.mask.shape == prediction.confidence.shape == prediction.cluster_map.shape == (1, *size)


def test_same_input_same_mask(engine, image):
    first, second = engine.segment(image), engine.segment(image)
    assert np.array_equal(first.mask, second.mask) and np.array_equal(first.confidence, second.confidence)


def test_settings_do_not_outlive_their_call(engine, image):
    before = engine.segment(image)
    engine.segment(image, Settings(merge_threshold=0.0, token_capacity=3, confidence_threshold=0.9))
    assert np.array_equal(engine.segment(image).mask, before.mask)


def test_a_batch_equals_its_images(engine, image):
    other = image[::-1].copy()
    together = engine.segment([image, other], Settings(merge_threshold=1.0))
    for index, single in enumerate((image, other)):
        alone = engine.segment(single, Settings(merge_threshold=1.0))
        assert (together.mask[index] == alone.mask[0]).mean() > 0.999


def test_unsure_pixels_are_unlabelled_with_zero_confidence(engine, image):
    sure = engine.segment(image)
    threshold = float(np.median(sure.confidence)) / 255
    prediction = engine.segment(image, Settings(confidence_threshold=threshold))
    unlabelled = prediction.mask == 255
    assert 0 < unlabelled.mean() < 1
    assert np.array_equal(prediction.confidence == 0, unlabelled)
    assert np.array_equal(prediction.mask[~unlabelled], sure.mask[~unlabelled])


def test_optional_maps_are_left_out(engine, image):
    prediction = engine.segment(image, Settings(confidence=False, clusters=False))
    assert prediction.confidence is None and prediction.cluster_map is None
    with_threshold = engine.segment(image, Settings(confidence=False, confidence_threshold=1.0))
    assert with_threshold.confidence is None and (with_threshold.mask == 255).any()


def test_capacity_bounds_the_kept_tokens(engine, image):
    stats = engine.segment(image, Settings(merge_threshold=1.0, token_capacity=10)).stats
    # Engines that record or build what they run round it to their ladder.
    assert stats.token_capacity in (10, max(c for c in engine.capacities(image.shape[:2]) if c <= 10))
    assert stats.tokens_kept <= stats.token_capacity < stats.tokens_total
    stats = engine.segment(image, Settings(merge_threshold=1.0)).stats
    assert stats.tokens_kept == stats.token_capacity == stats.tokens_total


def test_capacities_are_what_it_runs_with(engine, image):
    ladder = engine.capacities(image.shape[:2])
    assert ladder == tuple(sorted(set(ladder)))
    assert ladder[-1] == engine.segment(image, Settings(merge_threshold=1.0)).stats.tokens_total
    used = [engine.segment(image, Settings(merge_threshold=1.0, token_capacity=c)).stats.token_capacity for c in ladder]
    assert tuple(used) == ladder
    assert engine.segment(image, Settings(merge_threshold=0.5)).stats.token_capacity in ladder


@pytest.mark.parametrize("input_scale", [1.0, 0.75, 0.5])
def test_every_operating_point_runs_as_asked(engine, image, input_scale):
    ladder = engine.capacities(image.shape[:2], input_scale)
    for capacity in (ladder[0], ladder[len(ladder) // 2], ladder[-1]):
        prediction = engine.segment(image, Settings(1.0, capacity, input_scale=input_scale, clusters=True))
        stats = prediction.stats
        assert stats.operating_point == (input_scale, capacity, ladder[-1])
        assert stats.input_size == engine.input_size(image.shape[:2], input_scale)
        assert prediction.mask.shape == prediction.cluster_map.shape == (1, 120, 160)
        assert stats.tokens_kept <= capacity


def test_a_smaller_input_keeps_aspect_and_whole_patches(engine, image):
    full = engine.input_size(image.shape[:2])
    for input_scale in (0.25, 0.4, 0.75):
        size = engine.input_size(image.shape[:2], input_scale)
        assert all(abs(small - input_scale * side) <= 8 for small, side in zip(size, full, strict=True))
        assert len(engine.capacities(image.shape[:2], input_scale)) >= 1


def test_a_size_leaves_nothing_behind_for_the_next(engine, image):
    full, small = engine.segment(image, Settings(1.0)), engine.segment(image, Settings(1.0, input_scale=0.5))
    assert np.array_equal(engine.segment(image, Settings(1.0)).mask, full.mask)
    assert np.array_equal(engine.segment(image, Settings(1.0, input_scale=0.5)).mask, small.mask)


class CountingRecorder(EagerRecorder):
    """Counts what is recorded."""

    recorded = 0

    def record(self, work):
        self.recorded += 1
        return super().record(work)


@pytest.mark.parametrize("kind", ["cuda_graph", "onnxruntime"])
@pytest.mark.parametrize("merging", [merging for merging in MERGINGS if merging not in ("none", "clusters")])
def test_every_way_to_merge_keeps_the_contract(merging, kind, make_toy_variant, onnx_cache):
    """At three sizes and capacities as asked, equal to the torch engine, and with nothing to record once warm.

    ONNX Runtime needs a file for each size, so it is asked for one.
    """
    if kind == "onnxruntime":
        for package in ("onnx", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs {package}, of the extra 'onnx'")
    model, recorder = str(make_toy_variant(merging=merging, depth=4)), CountingRecorder()
    reference = create_engine(model, "torch", "cpu", precision="float32")
    if kind == "onnxruntime":
        engine, scales = create_engine(model, kind, "cpu"), (1.0,)
    else:
        engine, scales = GraphEngine.from_model(model, "cpu", recorder=recorder), (1.0, 0.75, 0.5)
    noise = np.random.default_rng(4).integers(0, 256, (2, 6, 8, 3), np.uint8)
    # Multiples of 36 stay whole at 3/4 and 1/2 of the sides: however an engine rounds, it sees the same.
    images = [cv2.resize(image, (128, 96), interpolation=cv2.INTER_CUBIC) // 36 * 36 for image in noise]
    recorded, masks = 0, {}
    for again in (False, True):
        for scale in scales:
            ladder = engine.capacities((96, 128), scale)
            for capacity in (ladder[0], ladder[len(ladder) // 2], ladder[-1]):
                settings = Settings(1.0, capacity, input_scale=scale, clusters=True)
                ours, theirs = engine.segment(images[0], settings), reference.segment(images[0], settings)
                for stats in (ours.stats, theirs.stats):
                    assert stats.operating_point == (scale, capacity, ladder[-1])
                assert ours.stats.tokens_kept == theirs.stats.tokens_kept <= capacity
                for one, other in ((ours.mask, theirs.mask), (ours.cluster_map, theirs.cluster_map)):
                    assert (one == other).mean() > 0.99
                assert (capacity == ladder[-1]) == (not ours.cluster_map.any())
                mask = masks.setdefault((scale, capacity), ours.mask)
                assert np.array_equal(ours.mask, mask), "other settings leave nothing behind"
        assert recorder.recorded == recorded or not again
        recorded = recorder.recorded
    few = Settings(1.0, ladder[0])
    alone = [engine.segment(image, few).mask for image in images]
    assert (engine.segment(images, few).mask == np.concatenate(alone)).mean() > 0.99
    kept = [engine.segment(images[0], Settings(threshold)).stats.tokens_kept for threshold in (0.0, 0.3, 0.6, 1.0)]
    assert kept == sorted(kept) and kept[0] < kept[-1]
    engine.close()
    reference.close()


def test_fewer_tokens_are_kept_as_the_threshold_falls(engine, image):
    kept = [engine.segment(image, Settings(merge_threshold=t)).stats.tokens_kept for t in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert kept == sorted(kept) and kept[0] < kept[-1]


def test_stats_say_what_was_used(engine, image):
    stats = engine.segment(image, Settings(merge_threshold=0.25)).stats
    assert stats.merge_threshold == 0.25
    assert stats.total_ms > 0 and sum(stats.stages_ms.values()) == pytest.approx(stats.total_ms, rel=0.05)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        [],
    ],
)
def test_wrong_images_are_refused_and_the_next_one_works(engine, image, bad):
    with pytest.raises(ImageError, match="expected"):
        engine.segment(bad)
    assert engine.segment(image).mask.shape == (1, 120, 160)


def test_images_of_several_sizes_are_no_batch(engine, image):
    with pytest.raises(ImageError, match="one size per batch"):
        engine.segment([image, image[:50]])


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (5, 900), (900, 5)])
def test_any_image_size_is_segmented(engine, size):
    assert engine.segment(np.full((*size, 3), 99, np.uint8)).mask.shape == (1, *size)


def test_info_describes_the_engine(engine):
    info = engine.info
    assert info.engine in ENGINES and info.device.startswith("cpu") and len(info.classes) > 1 and info.tokens_total > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"merge_threshold": 1.5}, "merge_threshold: got 1.5, expected 0.0 to 1.0"),
        ({"merge_threshold": float("nan")}, "merge_threshold: got nan"),
        ({"confidence_threshold": -0.1}, "confidence_threshold"),
        ({"token_capacity": -1}, "token_capacity: got -1"),
        ({"output_size": (0, 5)}, "output_size"),
        ({"input_scale": 0.0}, "input_scale: got 0.0, expected above 0.0 to 1.0"),
        ({"input_scale": 1.25}, "input_scale: got 1.25"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(Settings(), **values)
    assert message in str(error.value)


def test_unknown_names_are_refused(toy_model):
    with pytest.raises(ConfigError, match="engine: got 'openvino', expected one of"):
        create_engine(str(toy_model), "openvino")
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N"):
        create_engine(str(toy_model), device="gpu")
    with pytest.raises(ModelError, match="is not shipped"):
        create_engine("nonsense")


@pytest.mark.parametrize(("gpu", "provider"), [(True, "tensorrt"), (False, "")])
def test_onnxruntimes_tensorrt_provider_is_reached_by_name(toy_model, monkeypatch, gpu, provider):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")
    import torch

    from clustvit_ros.engine import network_engine, onnx_engine

    asked = []
    monkeypatch.setattr(network_engine, "select_device", lambda name: (torch.device("cuda" if gpu else "cpu"), ""))
    monkeypatch.setattr(onnx_engine, "OnnxEngine", lambda *arguments, **options: asked.append((arguments, options)))
    create_engine(str(toy_model), "onnxruntime_tensorrt", precision="auto")
    assert asked == [((str(toy_model), "auto", 0, provider), {"precision": "auto"})]


def test_a_named_gpu_that_is_absent_is_an_error_and_auto_says_why(toy_model):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match="set device to cpu or auto"):
        create_engine(str(toy_model), device="cuda")
    info = create_engine(str(toy_model), device="auto").info
    assert info.device.startswith("cpu") and "CUDA" in info.device_reason
