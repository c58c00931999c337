# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Finished masks: classes in groups, whose ids, names and colours agree, and colours over the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clustvit_ros.classes import IGNORE_INDEX, ClassSet, load_class_set
from clustvit_ros.engine import Prediction, Stats
from clustvit_ros.engine.masks import draw_overlay, group_classes, parse_groups
from clustvit_ros.errors import ConfigError

CAMVID = load_class_set("camvid")
NAV2 = "traversable: road, sidewalk; obstacle: building, pole, tree, sign, fence, car, pedestrian, bicyclist; sky: sky"


def prediction(mask: np.ndarray, confidence: np.ndarray | None) -> Prediction:
    return Prediction(mask, confidence, None, Stats(1, 1.0, 1, 0.5, 1.0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_pixel_gets_the_id_of_its_classes_group(dtype: Any) -> None:
    rng = np.random.default_rng(7)
    grouping = group_classes(CAMVID, parse_groups(NAV2))
    assert grouping.classes.names == ("traversable", "obstacle", "sky")
    assert grouping.classes.colours[0] == CAMVID.colours[CAMVID.names.index("road")]
    mask = rng.integers(0, 11, (2, 40, 60)).astype(dtype)
    mask[0, 0] = 255
    confidence = rng.integers(1, 256, mask.shape).astype(np.uint8)
    confidence[mask == 255] = 0
    grouped = grouping.apply(prediction(mask, confidence))
    assert grouped.mask.dtype == np.uint8
    members = {"traversable": ("road", "sidewalk"), "sky": ("sky",)}
    for value, name in enumerate(CAMVID.names):
        group = next((group for group, names in members.items() if name in names), "obstacle")
        assert set(np.unique(grouped.mask[mask == value])) == {grouping.classes.names.index(group)}
    assert set(np.unique(grouped.mask[mask == 255])) == {255}
    np.testing.assert_array_equal(grouped.confidence, confidence)


def test_what_no_group_names_is_unlabelled() -> None:
    grouping = group_classes(CAMVID, parse_groups("ground: road"))
    assert "sky" in grouping.ungrouped and len(grouping.ungrouped) == 10
    mask = np.arange(11, dtype=np.uint8)[None, None]
    grouped = grouping.apply(prediction(mask, np.full_like(mask, 200)))
    road = CAMVID.names.index("road")
    assert [index for index, value in enumerate(grouped.mask[0, 0]) if value == 0] == [road]
    assert set(grouped.mask[0, 0]) == {0, 255}
    assert [int(value) for value in grouped.confidence[0, 0]] == [200 if index == road else 0 for index in range(11)]


def test_many_classes_become_few() -> None:
    grouping = group_classes(ClassSet.numbered(300), parse_groups("a: class_299, class_0; b: class_256"))
    mask = np.array([[[0, 299, 256, 1]]], np.uint16)
    assert grouping.apply(prediction(mask, None)).mask.tolist() == [[[0, 0, 1, 255]]]
    assert grouping.apply(prediction(mask, None)).mask.dtype == np.uint8


def test_without_groups_nothing_changes() -> None:
    grouping = group_classes(CAMVID, parse_groups(" "))
    assert grouping.classes is CAMVID
    before = prediction(np.zeros((1, 2, 2), np.uint8), None)
    assert grouping.apply(before) is before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ground: road, mud", "the model has no class 'mud', expected sky, building, pole, road"),
        ("a: road; b: sky, road", "class 'road' is in 'a' and in 'b', expected it in one group"),
        ("a: road, road", "class 'road' is in 'a' and in 'a'"),
        ("a: road; a: sky", "group 'a' is given twice"),
        ("road, sky", "got 'road, sky', expected GROUP: CLASS"),
        ("a: road,", "got 'a: road,', expected GROUP: CLASS"),
        (": road", "expected GROUP: CLASS"),
    ],
)
def test_refusals_name_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="class_groups: ") as error:
        group_classes(CAMVID, parse_groups(text))
    assert message in str(error.value)


CLASSES = ClassSet(("road", "sky"), ((200, 100, 0), (0, 100, 200)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_are_blended_and_unlabelled_pixels_untouched(dtype: type) -> None:
    image = np.full((2, 3, 3), 100, np.uint8)
    mask = np.array([[0, 1, IGNORE_INDEX], [1, 1, 0]], dtype)
    overlay = draw_overlay(image, mask, CLASSES.palette(), alpha=0.5)
    assert overlay[0].tolist() == [[150, 100, 50], [50, 100, 150], [100, 100, 100]]


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, (9, 9, 9)), (1.0, (200, 100, 0))])
def test_alpha_reaches_both_ends(alpha: float, expected: tuple[int, int, int]) -> None:
    image = np.full((4, 4, 3), 9, np.uint8)
    overlay = draw_overlay(image, np.zeros((4, 4), np.uint8), CLASSES.palette(), alpha)
    assert tuple(overlay[2, 2]) == expected


def test_mask_of_another_size_is_scaled_to_the_image() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    overlay = draw_overlay(image, np.array([[0, 1]], np.uint8), CLASSES.palette(), alpha=1.0)
    assert overlay.shape == image.shape
    assert (overlay[:, :3] == CLASSES.colours[0]).all()
    assert (overlay[:, 3:] == CLASSES.colours[1]).all()
