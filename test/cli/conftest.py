# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A small random model and a few labelled images to run commands on."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from clustvit_ros.classes import ClassSet


@pytest.fixture(scope="session")
def model_dir(make_toy_model):
    """Folder of an untrained model with three classes."""
    return make_toy_model(ClassSet(("sky", "road", "car"), ((0, 0, 255), (90, 90, 90), (255, 0, 0))))


@pytest.fixture(scope="session")
def labelled_dir(tmp_path_factory):
    """Folder with images/ and labels/, three of each."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (root / name).mkdir()
    for stem in ("a", "b", "c"):
        cv2.imwrite(str(root / "images" / f"{stem}.png"), rng.integers(0, 256, (120, 160, 3), np.uint8))
        labels = rng.integers(0, 3, (12, 16), np.uint8).repeat(10, axis=0).repeat(10, axis=1)
        labels[:10] = 255
        cv2.imwrite(str(root / "labels" / f"{stem}.png"), labels)
    return root
