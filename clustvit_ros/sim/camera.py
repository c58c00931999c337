# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A robot's camera driving along the road of a simulated world.

Labelled pictures of many simulated worlds, in the folders that the trainer reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from clustvit_ros.classes import load_class_set
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.sim.renderer import CameraPose, Renderer
from clustvit_ros.sim.world import World

SIM_CLASSES = load_class_set("sim")

_SPEED_M_PER_S = 3.0
_LANE_M = -1.2
_HEIGHT_M = 1.9
_FIELD_OF_VIEW_RAD = np.radians(72.0)
_NOISE_MARGIN_PX = 64


@dataclass(frozen=True)
class SimFrame:
    """What the camera sees at one moment.

    Args:
        image: (H, W, 3) uint8 BGR.
        labels: (H, W) uint8 class ids; None when not asked for.
        points: (H, W, 3) float32 metres in the optical frame (x right, y down, z forward), NaN for the sky; None when
            not asked for.
    """

    image: np.ndarray
    labels: np.ndarray | None
    points: np.ndarray | None


class SimulatedCamera:
    """Renders the frames of a drive. The same seed, size and rate give the same frames, bit for bit.

    Args:
        seed: seed of the world, its weather and the sensor's noise; 0 or more.
        size: (height, width) in pixels.
        rate_hz: frames per second of simulated time.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, seed: int = 0, size: tuple[int, int] = (480, 640), rate_hz: float = 30.0) -> None:
        if seed < 0:
            raise ConfigError(f"sim: seed is {seed}, expected 0 or more")
        if not all(16 <= side <= 4096 for side in size):
            raise ConfigError(f"sim: size is {size[0]}x{size[1]}, expected a height and width of 16 to 4096 pixels")
        if not rate_hz > 0:
            raise ConfigError(f"sim: rate is {rate_hz} Hz, expected more than 0")
        self.seed, self.size, self._rate_hz = seed, size, rate_hz
        self.focal_px = size[1] / 2 / float(np.tan(_FIELD_OF_VIEW_RAD / 2))
        self._world = World(seed)
        self._renderer = Renderer(self._world, SIM_CLASSES, size, self.focal_px)
        rng = np.random.default_rng((seed, 1))
        self._haze_per_m = self._world.weather.haze_per_m
        self._haze = np.full((*size, 3), np.rint(self._world.weather.horizon[::-1] * 255), np.uint8)
        self._start_m = float(rng.uniform(0, self._world.route.length_m))
        sigma = rng.uniform(1.5, 4.0)
        rows, columns = size[0] + _NOISE_MARGIN_PX, size[1] + _NOISE_MARGIN_PX
        self._noise = np.rint(rng.normal(0.0, sigma, (rows, columns, 3))).astype(np.int16)

    def frame(self, index: int, labels: bool = True, points: bool = False) -> SimFrame:
        """Render frame `index` (0 or more) of the drive.

        Args:
            labels: give the class of every pixel.
            points: give the place of every pixel.
        """
        time_s = index / self._rate_hz
        pose = self._pose(time_s)
        picture, faces = self._renderer.render(pose, time_s)
        assert faces is not None
        image = self._expose(picture, faces, pose, index)
        cloud = self._renderer.points(self._renderer.depth(faces, pose)) if points else None
        return SimFrame(image, self._renderer.labels(faces) if labels else None, cloud)

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()

    def _pose(self, time_s: float) -> CameraPose:
        s = self._start_m + _SPEED_M_PER_S * time_s
        sway = 0.15 * np.sin(0.31 * time_s + self.seed)
        x, y, heading = (float(value) for value in self._world.route.at(s, _LANE_M + sway))
        bump = np.sin(5.1 * time_s) * np.sin(0.7 * time_s)
        return CameraPose(
            x, y, _HEIGHT_M + 0.015 * float(bump), heading + 0.05 * float(np.sin(0.4 * time_s + 0.5 * self.seed)),
            float(np.radians(-11.0 + 0.35 * bump)),
        )  # fmt: skip

    def _expose(self, picture: np.ndarray, faces: np.ndarray, pose: CameraPose, index: int) -> np.ndarray:
        """Haze between the camera and things, the lens's softness, and the sensor's noise."""
        # Haze is smooth but at edges: half the resolution is enough, and four times cheaper.
        depth = self._renderer.depth(faces, pose, step=2, bounded=False)
        clear = cv2.exp(np.maximum(depth, 0.0) * np.float32(-self._haze_per_m))
        clear[np.isinf(depth)] = 1.0
        clear = cv2.resize(clear, self.size[::-1], interpolation=cv2.INTER_LINEAR)
        image = cv2.blendLinear(picture, self._haze, clear, 1.0 - clear)
        image = cv2.GaussianBlur(image, (3, 3), 0.6)
        row, column = (index * 37) % _NOISE_MARGIN_PX, (index * 23) % _NOISE_MARGIN_PX
        noise = self._noise[row : row + self.size[0], column : column + self.size[1]]
        return cv2.add(image, noise, dtype=cv2.CV_8U)


FRAMES_PER_WORLD = 8
_SPLITS = ("train", "val")
# A lap takes about this many seconds; frames of one world are spread over it.
_LAP_S = 150.0


def sample_frames(
    count: int, seed: int, split: str = "train", size: tuple[int, int] = (480, 640)
) -> Iterator[tuple[str, SimFrame]]:
    """Frames from as many worlds as needed, a few from each.

    Args:
        count: how many.
        seed: seed of the whole data set; no two splits or seeds share a world.
        split: "train" or "val".
        size: (height, width) in pixels.

    Yields:
        A name that is unique within the split, and the frame with its labels.
    """
    for world in range(-(-count // FRAMES_PER_WORLD)):
        rng = np.random.default_rng((seed, _SPLITS.index(split), world))
        camera = SimulatedCamera(int(rng.integers(1 << 32, 1 << 62)), size, rate_hz=1.0)
        for number in range(min(FRAMES_PER_WORLD, count - world * FRAMES_PER_WORLD)):
            second = rng.uniform(number, number + 1) * _LAP_S / FRAMES_PER_WORLD
            yield f"{world:05d}_{number}", camera.frame(int(second))
        camera.close()


def write_dataset(
    folder: Path, count: int, seed: int, val_share: float = 0.1, size: tuple[int, int] = (480, 640),
    on_frame: Callable[[], None] = lambda: None,
) -> dict[str, int]:  # fmt: skip
    """Write `folder`/{train,val}/{images,labels}, `folder`/dataset.yaml and `folder`/dataset.json.

    Args:
        count: pictures in all.
        seed: the same seed writes the same files.
        val_share: share of the pictures that become the validation split, of worlds of their own.
        size: (height, width) in pixels.
        on_frame: called after each picture.

    Returns:
        Pictures by split.

    Raises:
        ConfigError: a value out of range.
        DataError: the folder holds a data set already, or cannot be written.
    """
    if count < 1:
        raise ConfigError(f"sim-dataset: count is {count}, expected at least 1")
    if seed < 0:
        raise ConfigError(f"sim-dataset: seed is {seed}, expected 0 or more")
    if not 0.0 <= val_share < 1.0:
        raise ConfigError(f"sim-dataset: the validation share is {val_share}, expected 0 to below 1")
    held_out = min(max(round(count * val_share), 1), count - 1) if val_share else 0
    counts = {"train": count - held_out, "val": held_out}
    if any((folder / split).exists() for split in _SPLITS):
        raise DataError(f"{folder}: there is a train or val folder already; remove them, or pass another folder")
    for split, wanted in counts.items():
        images, labels = folder / split / "images", folder / split / "labels"
        for path in (images, labels) if wanted else ():
            path.mkdir(parents=True)
        for name, frame in sample_frames(wanted, seed, split, size):
            assert frame.labels is not None
            _write(images / f"{name}.jpg", frame.image, [cv2.IMWRITE_JPEG_QUALITY, 95])
            _write(labels / f"{name}.png", frame.labels, [])
            on_frame()
    (folder / "dataset.yaml").write_text("classes: sim\n", encoding="utf-8")
    facts = {"classes": list(SIM_CLASSES.names), "seed": seed, "size": list(size), **counts}
    (folder / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return counts


def _write(path: Path, pixels: np.ndarray, options: list[int]) -> None:
    if not cv2.imwrite(str(path), pixels, options):
        raise DataError(f"{path}: cannot be written; check the folder's permissions and the disk's free space")
