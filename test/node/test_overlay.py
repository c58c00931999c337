# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Overlay pictures show the classes' colours, and nothing where there is no class."""

from __future__ import annotations

import numpy as np
import pytest

from clustvit_ros.classes import IGNORE_INDEX, ClassSet
from clustvit_ros.engine.masks import draw_overlay

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
