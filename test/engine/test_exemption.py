# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Tokens that must not be merged: where they are, and that every engine keeps them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.engine.exemption import class_tokens, exempt_class_ids, exempt_tokens, parse_regions, region_tokens
from clustvit_ros.engine.graph_engine import GraphEngine
from clustvit_ros.engine.ladder import default_ladder
from clustvit_ros.engine.recorded_graph import EagerRecorder
from clustvit_ros.errors import ConfigError


def grid_of(cluster_map):
    """Of a 96x128 image: (6, 8) tokens."""
    return cluster_map[::16, ::16]


@pytest.fixture(scope="module", params=["torch", "cuda_graph", "onnxruntime"])
def engine(request, toy_model, onnx_cache):
    if request.param == "onnxruntime":
        for package in ("onnx", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs {package}, of the extra 'onnx'")
    if request.param == "cuda_graph":
        return GraphEngine.from_model(toy_model, "cpu", recorder=EagerRecorder())
    return create_engine(str(toy_model), request.param, "cpu")


@pytest.fixture
def images():
    return np.random.default_rng(5).integers(0, 256, (2, 96, 128, 3), np.uint8)


def test_a_region_is_kept_and_the_rest_merged(engine, images):
    settings = Settings(merge_threshold=0.0, merge_exempt_region=((0.5, 0.0, 1.0, 0.5),), clusters=True)
    prediction = engine.segment(images[0], settings)
    grid = grid_of(prediction.cluster_map[0])
    assert (grid[3:, :4] == 0).all()
    # 12 tokens are exempt: the next rung of the ladder has no more room than for them.
    assert prediction.stats.tokens_exempt == 12 and prediction.stats.token_capacity == 12
    assert (grid[:3] > 0).all() and (grid[3:, 4:] > 0).all()
    assert (
        grid_of(engine.segment(images[0], Settings(merge_threshold=0.0, clusters=True)).cluster_map[0])[3:] > 0
    ).any()


def test_exemption_wins_over_capacity_and_takes_the_next_rung(engine, images):
    settings = Settings(
        merge_threshold=1.0, token_capacity=7, merge_exempt_region=((0.0, 0.0, 0.3, 1.0),), clusters=True
    )
    prediction = engine.segment(images[0], settings)
    assert prediction.stats.tokens_exempt == 16
    assert prediction.stats.token_capacity == next(rung for rung in default_ladder(48) if rung >= 16)
    assert (grid_of(prediction.cluster_map[0])[:2] == 0).all()


def test_exempting_everything_merges_nothing(engine, images):
    everything = engine.segment(images[0], Settings(merge_threshold=0.0, merge_exempt_region=((0, 0, 1, 1),)))
    plain = engine.segment(images[0], Settings(merge_threshold=1.0))
    assert everything.stats.tokens_kept == 48 and (everything.mask == plain.mask).mean() > 0.999


def test_classes_of_the_previous_mask_are_kept_with_their_neighbours(engine, images):
    mask = np.zeros((96, 128), np.uint8)
    mask[40, 70] = 3  # one pixel, in token (2, 4)
    settings = Settings(merge_threshold=0.0, merge_exempt_classes=(3, 5), previous_mask=mask, clusters=True)
    prediction = engine.segment(images[0], settings)
    assert prediction.stats.tokens_exempt == 9
    assert (grid_of(prediction.cluster_map[0])[1:4, 3:6] == 0).all()
    other = engine.segment(images[0], Settings(merge_threshold=0.0, merge_exempt_classes=(4,), previous_mask=mask))
    assert other.stats.tokens_exempt == 0


def test_what_the_next_frame_looks_in_knows_neither_threshold_nor_size_of_the_mask(engine, images):
    settings = Settings(merge_threshold=0.5, merge_exempt_classes=(0,))
    plain = engine.segment(images[0], settings)
    unsure = engine.segment(images[0], dataclasses.replace(settings, confidence_threshold=1.0, output_size=(2, 2)))
    assert (unsure.mask == IGNORE_INDEX).all() and unsure.mask.shape == (1, 2, 2)
    assert np.array_equal(unsure.class_grid, plain.class_grid) and plain.class_grid.dtype == np.uint8
    cell = np.array(plain.mask.shape[1:]) // plain.class_grid.shape[1:]
    centres = plain.mask[:, cell[0] // 2 :: cell[0], cell[1] // 2 :: cell[1]]
    assert (centres == plain.class_grid).mean() > 0.95
    assert engine.segment(images[0], Settings()).class_grid is None


def test_each_image_of_a_batch_has_its_own_previous_mask(engine, images):
    masks = np.zeros((2, 96, 128), np.uint8)
    masks[0, 40, 70] = masks[1, 0, 0] = 3
    settings = Settings(merge_threshold=0.0, merge_exempt_classes=(3,), previous_mask=masks, clusters=True)
    prediction = engine.segment(images, settings)
    assert prediction.stats.tokens_exempt == 9
    assert (grid_of(prediction.cluster_map[0])[1:4, 3:6] == 0).all()
    assert (grid_of(prediction.cluster_map[1])[:2, :2] == 0).all()


def test_no_call_leaves_an_exemption_behind(engine, images):
    settings = Settings(merge_threshold=0.3, clusters=True)
    before = engine.segment(images[0], settings)
    engine.segment(images[0], Settings(merge_exempt_region=((0.0, 0.0, 1.0, 0.7),)))
    after = engine.segment(images[0], settings)
    assert np.array_equal(before.cluster_map, after.cluster_map) and after.stats.tokens_exempt == 0


def test_two_passes_find_the_classes_in_the_frame_itself(engine, images):
    first = engine.segment(images[0], Settings(merge_threshold=0.0))
    present = int(np.bincount(first.mask.ravel()).argmax())
    settings = Settings(
        merge_threshold=0.0, merge_exempt_classes=(present,), merge_exempt_source="two_pass", clusters=True
    )
    prediction = engine.segment(images[0], settings)
    assert prediction.stats.tokens_exempt > 0 and "first_pass" in prediction.stats.stages_ms
    assert (grid_of(prediction.cluster_map[0]) == 0).sum() >= prediction.stats.tokens_exempt


def test_min_tokens_bounds_merging_below_capacity(engine, images):
    least = engine.segment(images[0], Settings(merge_threshold=0.0)).stats.token_capacity
    assert engine.segment(images[0], Settings(merge_threshold=0.0, min_tokens=20)).stats.token_capacity == 24 > least
    capped = engine.segment(images[0], Settings(merge_threshold=0.0, min_tokens=20, token_capacity=9))
    # Recordings are of the ladder's capacities alone: the largest that the bound allows.
    assert capped.stats.token_capacity == (6 if engine.info.engine == "cuda_graph" else 9)
    assert engine.segment(images[0], Settings(merge_threshold=0.0, min_tokens=9999)).stats.tokens_kept == 48


def test_more_tokens_asked_for_than_there_are_cost_no_second_run(toy_model, images):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")
    engine = create_engine(str(toy_model), "onnxruntime", "cpu")
    runs, run = [], engine._run
    engine._run = lambda *arguments: runs.append(arguments) or run(*arguments)
    assert engine.segment(images[0], Settings(merge_threshold=1.0, min_tokens=1000)).stats.tokens_kept == 48
    assert len(runs) == 1


def test_regions_touch_every_token_they_overlap():
    assert region_tokens((6, 8), [(2 / 3, 0.0, 1.0, 1.0)]).sum() == 16
    assert region_tokens((6, 8), [(0.0, 0.0, 0.01, 0.01)]).sum() == 1
    assert region_tokens((6, 8), []).sum() == 0
    assert exempt_tokens((6, 8), (), None, (1,)) is None


@pytest.mark.parametrize("size", [(6, 8), (3, 5), (97, 131), (480, 640)])
def test_a_class_anywhere_in_a_mask_of_any_size_exempts_its_place(size):
    generator = np.random.default_rng(0)
    for _ in range(20):
        row, column = generator.integers(0, size[0]), generator.integers(0, size[1])
        mask = np.zeros(size, np.uint16)
        mask[row, column] = 300
        tokens = class_tokens((6, 8), mask, [300])[0]
        assert tokens[min(row * 6 // size[0], 5), min(column * 8 // size[1], 7)]
        assert tokens.sum() <= 16 or min(size) < 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0 1", "four numbers"),
        ("a b c d", "four numbers"),
        ("0.5 0 0.2 1", "top < bottom"),
        ("0 0 1 1.5", "right <= 1"),
        ("nan 0 1 1", "fractions of the image"),
    ],
)
def test_regions_that_are_none_are_refused(text, message):
    with pytest.raises(ConfigError, match=f"merge_exempt_region: got .*{message}"):
        parse_regions(text)


def test_regions_and_classes_are_read_from_text():
    assert parse_regions("0.67 0 1 1; 0,0,0.1,0.5;") == ((0.67, 0.0, 1.0, 1.0), (0.0, 0.0, 0.1, 0.5))
    assert parse_regions("") == ()
    assert exempt_class_ids(("sky", "car", "pedestrian"), ("pedestrian", "sky")) == (2, 0)
    with pytest.raises(ConfigError, match="merge_exempt_classes: got dog, expected classes of the model: sky, car"):
        exempt_class_ids(("sky", "car"), ("car", "dog"))


@pytest.mark.parametrize("backbone", ["vit"])
def test_a_network_that_merges_nothing_needs_no_exemption(make_toy_variant, images, backbone):
    engine = create_engine(str(make_toy_variant(backbone=backbone)), "torch", "cpu")
    assert engine.segment(images[0], Settings(merge_exempt_region=((0, 0, 1, 1),))).stats.tokens_exempt == 0


@pytest.mark.slow
@pytest.mark.parametrize("source", ["two_pass", "previous_mask"])
def test_pedestrians_on_camvid_lose_nothing_to_merging(camvid_dir, source):
    """The images of CamVid val do not follow one another, so there is no previous mask.

    `two_pass` finds the class in the frame itself, through merging. For `previous_mask` the frame's unmerged mask
    stands in: what a previous mask would be if nothing had moved.
    """
    import cv2

    engine = create_engine("camvid_tiny", "torch", "cpu")
    names = engine.info.classes.names
    pedestrian, count = names.index("pedestrian"), len(names)
    strongest = {"merge_threshold": 0.0, "token_capacity": 82, "confidence": False}
    confusion = {"full": np.zeros((count, count)), "exempt": np.zeros((count, count))}
    for path in sorted((camvid_dir / "val" / "images").glob("*.jpg")):
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        label = cv2.imread(str(camvid_dir / "val" / "labels" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)
        full = engine.segment(image, Settings(merge_threshold=1.0, confidence=False)).mask[0]
        settings = Settings(
            **strongest, merge_exempt_classes=(pedestrian,), merge_exempt_source=source, previous_mask=full
        )
        labelled = label < count
        for name, mask in (("full", full), ("exempt", engine.segment(image, settings).mask[0])):
            pairs = label[labelled].astype(int) * count + mask[labelled]
            confusion[name] += np.bincount(pairs, minlength=count**2).reshape(count, count)
    iou = {}
    for name, table in confusion.items():
        hits = table[pedestrian, pedestrian]
        iou[name] = 100 * hits / (table[pedestrian].sum() + table[:, pedestrian].sum() - hits)
    assert iou["exempt"] >= iou["full"] - 0.5, iou
