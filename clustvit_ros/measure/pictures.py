# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Pictures that show people what a model does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from clustvit_ros.engine.engine import Prediction
from clustvit_ros.errors import DataError
from clustvit_ros.images import Sample, read_image

_CLUSTER_COLOURS = np.array(
    [[90, 90, 90], [66, 133, 244], [244, 160, 0], [15, 157, 88], [171, 71, 188], [0, 172, 193]], np.uint8
)


def comparison(sample: Sample, prediction: Prediction, palette: np.ndarray) -> np.ndarray:
    """Image, prediction, truth (void black), and clusters over the image, left to right.

    Args:
        sample: (H, W) image with labels.
        prediction: for that image alone, at its size.
        palette: (256 or more, 3) uint8 RGB.

    Returns:
        (H, W * n, 3) uint8 RGB; n is 4, or 3 without a cluster map.
    """
    panels = [
        titled(sample.image, "image"),
        titled(palette[prediction.mask[0]], "prediction"),
        titled(palette[sample.labels], "ground truth"),
    ]
    if prediction.cluster_map is not None:
        stats = prediction.stats
        title = f"{stats.tokens_kept:.0f} of {stats.tokens_total} tokens kept"
        panels.append(titled(cluster_overlay(sample.image, prediction.cluster_map[0]), title))
    return np.concatenate(panels, axis=1)


def cluster_overlay(image: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Tint the merged parts of an (H, W, 3) image by cluster; kept tokens stay as they are."""
    tinted = image // 2 + _CLUSTER_COLOURS[clusters % len(_CLUSTER_COLOURS)] // 2
    return np.where(clusters[..., None] > 0, tinted, image)


def save_picture(path: Path, image: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 RGB image; folders are made.

    Raises:
        DataError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise DataError(f"{path}: cannot be written; check the folder's permissions and the disk's free space")


def titled(image: np.ndarray, title: str) -> np.ndarray:
    """A copy of an (H, W, 3) uint8 image with a line of text in its upper left corner."""
    image = image.copy()
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(image, title, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, colour, thickness, cv2.LINE_AA)
    return image


def contact_sheet(pictures: Sequence[Path], columns: int = 3, rows: int = 2, width: int = 480) -> np.ndarray:
    """A few pictures, evenly chosen, in one: (H, W, 3) uint8 RGB."""
    chosen = [pictures[i * len(pictures) // (columns * rows)] for i in range(min(columns * rows, len(pictures)))]
    first = read_image(chosen[0])
    size = (width, round(first.shape[0] * width / first.shape[1]))
    tiles = [cv2.resize(read_image(path), size, interpolation=cv2.INTER_AREA) for path in chosen]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])
