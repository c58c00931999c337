# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A small made-up data set whose colours tell the classes, and a recipe for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

CLASSES = ("sky", "road", "car")
RECIPE: dict[str, Any] = {
    "name": "toy",
    "architecture": "clustvit_t",
    "network": {"stem": "conv", "embed_dim": 48, "depth": 3, "injection_point": 1, "head_depth": 1},
    "classes": [{"name": name, "colour": [index, 0, 0]} for index, name in enumerate(CLASSES)],
    "input": {"size": [64, 96]},
    "augmentation": {"crop_size": [48, 64], "scale": [0.7, 1.4]},
    "schedule": {
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 0.002,
        "validate_every": 2,
        "precision": "float32",
        "merge_after": 0.0,
        "kept_fractions": [1.0, 0.5],
    },
}


def write_split(folder: Path, count: int, seed: int, size: tuple[int, int] = (64, 96)) -> None:
    """Sky above, road below, a car across the horizon."""
    rng = np.random.default_rng(seed)
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for index in range(count):
        image, labels = scene(rng, size)
        cv2.imwrite(str(folder / "images" / f"{index:03}.png"), image[..., ::-1])
        cv2.imwrite(str(folder / "labels" / f"{index:03}.png"), labels)


def scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An RGB image and its labels."""
    height, width = size
    labels = np.zeros(size, np.uint8)
    horizon = int(rng.integers(height // 3, 2 * height // 3))
    labels[horizon:] = 1
    x = int(rng.integers(0, width - width // 4))
    labels[horizon - height // 8 : horizon + height // 8, x : x + width // 4] = 2
    colours = np.array([[120, 160, 200], [90, 90, 90], [220, 30, 30]])
    noisy = colours[labels] + rng.integers(-20, 21, (*size, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), labels
