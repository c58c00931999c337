"""Pre- and post-processing, the capacity ladder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clustvit_ros.modeling.model_folder import InputConfig
from clustvit_ros.runtime.capacity import choose_capacity, default_ladder
from clustvit_ros.runtime.postprocess import cluster_map, label_maps
from clustvit_ros.runtime.preprocess import network_size, to_input


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    classes=st.integers(1, 12),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    threshold=st.sampled_from([0.0, 0.3, 0.7]),
)
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


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((360, 480), (352, 480)),  # the trained shape within a patch: as it is
        ((480, 640), (352, 480)),
        ((720, 1280), (304, 560)),
        ((640, 480), (480, 352)),
        ((10, 4000), (16, 10560)),
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


def test_shrinking_averages():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, :, ::4] = 255  # a quarter of the columns; sampling every fourth would give 0 or 255
    x = to_input(image, (16, 16), InputConfig(size=(16, 16), mean=(0, 0, 0), std=(1, 1, 1)), torch.device("cpu"))
    assert (x - 63.75).abs().max() < 2


def test_ladder_is_ascending_and_ends_with_all_tokens():
    assert default_ladder(660) == (82, 165, 247, 330, 412, 495, 577, 660)
    assert default_ladder(1) == (1,)


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 5000))
def test_chosen_capacity_covers_the_threshold_below_the_ceiling(total, wanted, ceiling):
    wanted = min(wanted, total)
    capacity = choose_capacity(default_ladder(total), wanted, ceiling)
    assert capacity >= (min(wanted, ceiling) if ceiling else wanted)
    assert not ceiling or capacity <= ceiling
