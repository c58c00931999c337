# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Pre- and post-processing, the capacity ladder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clustvit_ros.engine.labels import cell_labels, label_maps, static_label_maps
from clustvit_ros.engine.ladder import choose_capacity, default_ladder
from clustvit_ros.engine.network_engine import cluster_map
from clustvit_ros.engine.pixels import device_input, network_size, normalisation, to_input, upsampling
from clustvit_ros.networks.model_folder import InputConfig


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000), classes=st.integers(1, 12), grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)), threshold=st.sampled_from([0.0, 0.3, 0.7]),
)  # fmt: skip
def test_label_maps_equal_the_naive_ones(seed, classes, grid, size, threshold):
    logits = 3 * torch.randn(2, classes, *grid, generator=torch.Generator().manual_seed(seed))
    mask, confidence = label_maps(logits, size, threshold)
    upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    top = upsampled.topk(min(2, classes), dim=1).values
    tie = top[:, 0] - top[:, -1] < 1e-4 if classes > 1 else torch.zeros(2, *size, dtype=torch.bool)
    probability, naive = upsampled.softmax(dim=1).max(dim=1)
    borderline = (probability - threshold).abs() < 1e-5
    naive = torch.where(probability < threshold, 255, naive)
    assert ((mask == naive) | tie | borderline).all()
    expected = torch.where(naive == 255, 0.0, probability * 255)
    assert (((confidence.float() - expected).abs() <= 0.51) | borderline).all()


def test_many_classes_get_a_wider_mask():
    logits = torch.zeros(1, 300, 2, 2)
    logits[:, 299] = 5
    mask, _ = label_maps(logits, (8, 8))
    assert mask.dtype == torch.int32 and (mask == 299).all()


def test_cluster_map_is_nearest():
    ids = torch.tensor([[0, 1, 2, 3, 0, 1]])
    assert cluster_map(ids, (2, 3), (4, 6))[0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 0, 0, 1, 1]] * 2
    many = torch.tensor([[0, 255, 256, 510, 511, 1]])  # 0 says that a token was kept
    assert cluster_map(many, (2, 3), (2, 3))[0].tolist() == [[0, 255, 1], [255, 1, 1]]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((360, 480), (352, 480)),  # the trained shape within a patch: as it is
        ((480, 640), (352, 480)),
        ((720, 1280), (304, 560)),
        ((640, 480), (480, 352)),
        ((376, 1241), (224, 752)),
        # Beyond four times a trained side the aspect is given up.
        ((1, 2000), (16, 1920)),
        ((2000, 1), (1408, 16)),
        ((10, 4000), (16, 1920)),
    ],
)
def test_network_size_keeps_aspect_and_area(image, expected):
    assert network_size(image, (352, 480), 16) == expected


def test_input_is_resized_and_normalised():
    image = np.zeros((1, 40, 60, 3), np.uint8)
    image[..., 0] = 255
    x = to_input(
        image, (20, 30), InputConfig(size=(20, 30), mean=(127.5, 0, 10), std=(127.5, 1, 5)), torch.device("cpu")
    )
    assert x.shape == (1, 3, 20, 30) and x.dtype == torch.float32
    assert x[0, :, 5, 5].tolist() == pytest.approx([1.0, 0.0, -2.0])


@pytest.mark.parametrize("height", [64, 20, 16, 8])
def test_shrinking_averages_along_each_side(height):
    image = np.zeros((1, height, 64, 3), np.uint8)
    image[:, :, ::4] = 255  # a quarter of the columns; sampling every fourth would give 0 or 255
    config = InputConfig(size=(16, 16), mean=(0, 0, 0), std=(1, 1, 1))
    x = to_input(image, (16, 16), config, torch.device("cpu"))
    assert (x - 63.75).abs().max() < 2
    device = device_input(torch.from_numpy(image), (16, 16), *normalisation(config, torch.device("cpu")))
    assert (device - x).abs().max() <= 1.001


def test_ladder_is_ascending_and_ends_with_all_tokens():
    assert default_ladder(660) == (82, 165, 247, 330, 412, 495, 577, 660)
    assert default_ladder(1) == (1,)


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 5000))
def test_chosen_capacity_covers_the_threshold_below_the_ceiling(total, wanted, ceiling):
    wanted = min(wanted, total)
    capacity = choose_capacity(default_ladder(total), wanted, ceiling)
    assert capacity >= (min(wanted, ceiling) if ceiling else wanted)
    assert not ceiling or capacity <= ceiling


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    classes=st.sampled_from([1, 2, 11, 19, 90, 160]),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    factor=st.tuples(st.floats(2, 20), st.floats(2, 20)),
    # Without peaks most classes can win somewhere in a cell, and cells are halved.
    peak=st.sampled_from([0.0, 3.0, 30.0]),
)
def test_classes_that_cannot_win_change_nothing(seed, classes, grid, factor, peak):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(classes, *grid, generator=generator)
    logits[:5] += peak * torch.randn(min(classes, 5), *grid, generator=generator)
    size = (int(grid[0] * factor[0]), int(grid[1] * factor[1]))
    labels = label_maps(logits[None], size, with_confidence=False)[0][0]
    upsampled = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    best = upsampled.gather(0, labels.long()[None])[0]
    assert (best >= upsampled.amax(dim=0) - 1e-4).all()


@pytest.mark.parametrize("classes", [2, 11, 150])
@pytest.mark.parametrize("size", [(64, 96), (130, 190), (320, 480)])
def test_areas_of_one_class_are_not_interpolated(classes, size):
    generator = torch.Generator().manual_seed(classes)
    coarse = 10 * torch.randn(1, classes, 2, 2, generator=generator)
    logits = F.interpolate(coarse, size=(16, 24), mode="nearest")
    labels = cell_labels(logits[0], size)
    upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
    assert labels is not None and torch.equal(labels.long(), upsampled.argmax(dim=0))


def test_equal_logits_give_the_first_class_and_numbers_that_are_none_the_plain_way():
    logits = torch.full((60, 4, 4), -5.0)
    logits[[7, 20]] = 1.0
    assert (cell_labels(logits, (64, 64)) == 7).all()
    logits[3, 2, 2] = float("nan")
    assert cell_labels(logits, (64, 64)) is None
    mask, _ = label_maps(logits[None], (64, 64), with_confidence=False)
    assert mask[0, 0, 0] == 7 and (mask == 255).any()


@pytest.mark.parametrize("size", [(33, 50), (130, 20), (5, 4)])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.4])
def test_label_maps_of_static_shapes_equal_the_banded_ones(size, threshold):
    logits = 3 * torch.randn(2, 9, 4, 5, generator=torch.Generator().manual_seed(1))
    logits[0, :, 1, 1] = float("nan")
    how = upsampling((4, 5), size, logits.device)
    mask, confidence = static_label_maps(logits, how, None if threshold is None else torch.tensor(threshold))
    expected, expected_confidence = label_maps(logits, size, threshold or 0.0, threshold is not None)
    assert torch.equal(mask, expected) and mask.dtype == torch.uint8
    if threshold is None:
        assert confidence is None
    else:
        assert (confidence.int() - expected_confidence.int()).abs().max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    classes=st.sampled_from([1, 2, 11, 160]),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    factor=st.tuples(st.floats(0.3, 20), st.floats(0.3, 20)),
    scale=st.sampled_from([0.1, 5.0, 100.0]),  # the last one's exponentials would be too large for float32
    offset=st.sampled_from([0.0, -1000.0]),
)
def test_confidence_is_the_softmax_of_interpolated_logits(seed, classes, grid, factor, scale, offset):
    logits = scale * torch.randn(1, classes, *grid, generator=torch.Generator().manual_seed(seed)) + offset
    size = (max(int(grid[0] * factor[0]), 1), max(int(grid[1] * factor[1]), 1))
    mask, confidence = label_maps(logits, size)
    upsampled = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    probability = upsampled.softmax(dim=1).amax(dim=1) * 255.0
    assert (confidence - probability).abs().max() < 0.51 + 0.0002 * scale
    best = upsampled.gather(1, mask.long()[:, None])[:, 0]
    assert (best >= upsampled.amax(dim=1) - 1e-6 * (scale + abs(offset))).all()
    sure, _ = label_maps(logits, size, confidence_threshold=0.5)
    assert ((sure == 255) == (probability < 127.5))[(probability - 127.5).abs() > 0.05 + 0.001 * scale].all()


def test_the_devices_input_equals_the_hosts():
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), np.uint8)
    config = InputConfig(size=(40, 60), mean=(120, 110, 100), std=(50, 60, 70))
    normalised = normalisation(config, torch.device("cpu"))
    same = device_input(torch.from_numpy(images), (40, 60), *normalised)
    torch.testing.assert_close(same, to_input(images, (40, 60), config, torch.device("cpu")))
    # Along one side alone, OpenCV rounds halves to even values.
    for size, off in (((20, 30), 0.2), ((32, 48), 0.2), ((13, 19), 0.2), ((60, 80), 0.2), ((9, 60), 1), ((40, 14), 1)):
        ours = device_input(torch.from_numpy(images), size, *normalised)
        host = to_input(images, size, config, torch.device("cpu"))
        steps = (ours - host).abs() * torch.tensor(config.std).view(1, 3, 1, 1)
        assert ours.shape == host.shape and steps.max() < 2.01 and steps.mean() < off  # of 255
