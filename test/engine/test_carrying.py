# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Masks carried by optical flow: where labels go, where confidence falls, and what cannot be followed."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustvit_ros.engine.carrying import Carrier, PictureFlow, carry
from clustvit_ros.engine.engine import Prediction, Stats

STATS = Stats(24, 24.0, 24, 0.5, 1.0)


def world(seed: int = 0, size: tuple[int, int] = (600, 800)) -> tuple[np.ndarray, np.ndarray]:
    """A textured plane, and its labels: blobs of four classes."""
    rng = np.random.default_rng(seed)
    grey = cv2.GaussianBlur(rng.normal(0.0, 1.0, size).astype(np.float32), (0, 0), 3.0)
    broad = cv2.GaussianBlur(rng.normal(0.0, 1.0, size).astype(np.float32), (0, 0), 40.0)
    labels = np.digitize(broad, np.quantile(broad, (0.25, 0.5, 0.75))).astype(np.uint8)
    grey = cv2.normalize(grey, None, 0, 180, cv2.NORM_MINMAX).astype(np.uint8) + 15 * labels
    return np.repeat(grey[..., None], 3, axis=2), labels


def view(plane: np.ndarray, x: int, y: int, size: tuple[int, int] = (240, 320)) -> np.ndarray:
    return np.ascontiguousarray(plane[100 + y : 100 + y + size[0], 100 + x : 100 + x + size[1]])


def prediction(mask: np.ndarray, confidence: int | None = 255) -> Prediction:
    maps = None if confidence is None else np.full((1, *mask.shape), confidence, np.uint8)
    return Prediction(mask[None], maps, mask[None] + 1, STATS)


@settings(max_examples=12, deadline=None)
@given(st.integers(-6, 6), st.integers(-4, 4), st.integers(1, 8), st.integers(0, 3))
def test_labels_go_where_the_picture_goes(dx: int, dy: int, frames: int, seed: int) -> None:
    picture, labels = world(seed)
    carrier: Carrier[Prediction] = Carrier(16)
    for index in range(frames + 1):
        carrier.see(index, view(picture, index * dx, index * dy))
        if index == 0:
            assert carrier.adopt(0, prediction(view(labels, 0, 0)))
    assert carrier.source is not None
    carried = carry(carrier.source.result, carrier.source.motion, 0.0)
    right = carried.mask[0] == view(labels, frames * dx, frames * dy)
    inside = np.zeros((240, 320), bool)
    inside[abs(frames * dy) : 240 - abs(frames * dy) or None, abs(frames * dx) : 320 - abs(frames * dx) or None] = True
    assert right[inside].mean() > 0.985
    assert carried.confidence is not None and carried.cluster_map is not None
    np.testing.assert_array_equal(carried.cluster_map, carried.mask + 1)  # clusters move with the mask
    assert carried.confidence[0][inside].mean() > 200
    assert carried.stats is STATS


def test_what_enters_the_picture_has_no_confidence_and_may_become_unlabelled() -> None:
    picture, labels = world()
    carrier: Carrier[Prediction] = Carrier(16)
    for index in range(6):
        carrier.see(index, view(picture, 8 * index, 0))
        if index == 0:
            carrier.adopt(0, prediction(view(labels, 0, 0)))
    assert carrier.source is not None
    carried = carry(carrier.source.result, carrier.source.motion, 0.0)
    assert carried.confidence is not None
    entered = carried.confidence[0, :, -32:]
    assert (entered == 0).mean() > 0.9 and (carried.confidence[0, :, 20:-60] > 128).mean() > 0.9
    assert not (carried.mask == 255).any()
    bounded = carry(carrier.source.result, carrier.source.motion, 0.3)
    assert bounded.confidence is not None
    assert (bounded.mask[0, :, -32:] == 255).mean() > 0.9 and (bounded.mask[0, :, 20:-60] == 255).mean() < 0.1
    assert (bounded.confidence[bounded.mask == 255] == 0).all()
    # Nobody asked the engine for confidence: the threshold holds for what flow alone is sure of.
    plain = carry(prediction(view(labels, 0, 0), None), carrier.source.motion, 0.3)
    assert plain.confidence is None
    np.testing.assert_array_equal(plain.mask, bounded.mask)


def test_confidence_falls_beside_another_label_where_something_was_hidden() -> None:
    """A square moves over a plane; behind it appears what the engine's picture did not show."""
    picture, _ = world(1)
    square, _ = world(2)
    carrier: Carrier[Prediction] = Carrier(16)
    for index in range(5):
        image, left = view(picture, 0, 0), 60 + 8 * index
        image[80:160, left : left + 80] = view(square, 0, 0, (80, 80))
        mask = np.zeros((240, 320), np.uint8)
        mask[80:160, left : left + 80] = 1
        carrier.see(index, image)
        if index == 0:
            carrier.adopt(0, prediction(mask))
    assert carrier.source is not None
    carried = carry(carrier.source.result, carrier.source.motion, 0.0)
    assert carried.confidence is not None
    uncovered, plane = carried.confidence[0, 90:150, 66:88], carried.confidence[0, :60, :]
    assert uncovered.mean() < 0.6 * plane.mean()
    assert (carried.mask[0, 84:156, left + 6 : left + 74] == 1).mean() > 0.95


@pytest.mark.parametrize("size", [(480, 640), (48, 64), (200, 333), (720, 1280)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_maps_keep_size_and_type_whatever_the_flow_works_at(size: tuple[int, int], dtype: type) -> None:
    picture, labels = world(size=(1000, 1500))
    carrier: Carrier[Prediction] = Carrier(16)
    carrier.see(0, view(picture, 0, 0, size))
    carrier.adopt(0, prediction(view(labels, 0, 0, size).astype(dtype)))
    carrier.see(1, view(picture, 3, 2, size))
    assert carrier.source is not None
    carried = carry(carrier.source.result, carrier.source.motion, 0.0)
    assert carried.mask.shape == (1, *size) and carried.mask.dtype == dtype
    assert (carried.mask[0][4:-4, 4:-4] == view(labels, 3, 2, size)[4:-4, 4:-4]).mean() > 0.97


def test_a_result_that_comes_late_is_brought_to_the_present() -> None:
    picture, labels = world()
    carrier: Carrier[Prediction] = Carrier(16)
    for index in range(10):
        carrier.see(index, view(picture, 3 * index, 0))
    assert carrier.adopt(4, prediction(view(labels, 12, 0)))
    assert carrier.source is not None and carrier.source.number == 4
    late = carry(carrier.source.result, carrier.source.motion, 0.0)
    assert (late.mask[0, :, :-20] == view(labels, 27, 0)[:, :-20]).mean() > 0.985
    carrier.see(10, view(picture, 30, 0))
    later = carry(carrier.source.result, carrier.source.motion, 0.0)
    assert (later.mask[0, :, :-24] == view(labels, 30, 0)[:, :-24]).mean() > 0.985


def test_results_too_old_unknown_or_from_before_a_cut_are_not_taken() -> None:
    picture, labels = world()
    result = prediction(view(labels, 0, 0))
    carrier: Carrier[Prediction] = Carrier(4)
    assert not carrier.adopt(0, result)
    for index in range(6):
        carrier.see(index, view(picture, index, 0))
    assert carrier.has_forgotten(1) and not carrier.has_forgotten(2)
    assert not carrier.adopt(1, result) and carrier.adopt(3, result)
    assert not carrier.adopt(2, result), "a newer one is carried"
    carrier.see(6, world(5)[0][100:340, 100:420].copy())
    assert carrier.source is None and not carrier.adopt(5, result)
    assert carrier.adopt(6, result)
    carrier.forget()
    assert carrier.source is None and not carrier.adopt(6, result)


def test_nothing_is_carried_to_another_scene_size_or_an_empty_picture() -> None:
    first, second = view(world(0)[0], 0, 0), view(world(5)[0], 0, 0)
    blank = np.full_like(first, 90)
    noise = np.random.default_rng(0)
    for other in (
        second, second[:, ::-1].copy(), view(world(0)[0], 0, 0, (240, 300)), blank, np.zeros_like(first),
        noise.integers(0, 256, first.shape, np.uint8), np.zeros((3, 500, 3), np.uint8), np.zeros((1, 1, 3), np.uint8),
    ):  # fmt: skip
        flow = PictureFlow()
        assert flow.see(first) is None  # nothing came before
        assert flow.see(other) is None
        assert flow.see(first) is None or other.shape != first.shape
    flow = PictureFlow()
    flow.see(blank)
    assert flow.see(blank) is None


@pytest.mark.parametrize("change", [lambda p: np.clip(p * 1.3 + 10, 0, 255), lambda p: p * 0.4, lambda p: 20 + p * 0.8])
def test_another_exposure_is_followed(change) -> None:
    picture, _ = world()
    flow = PictureFlow()
    flow.see(view(picture, 0, 0))
    motion = flow.see(change(view(picture, 4, 1)).astype(np.uint8))
    assert motion is not None
    right, down = (np.median(motion.ways[..., index]) * 320 / motion.ways.shape[1] for index in (0, 1))
    assert (right, down) == pytest.approx((4, 1), abs=0.5)
