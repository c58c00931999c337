# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""From uint8 camera images to the network's normalised input, and how to get from its grid to the image's pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.networks.model_folder import InputConfig

# Times the trained input's side.
_LONGEST = 4


def network_size(image_size: tuple[int, int], input_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The size at which the network sees an image: about as many pixels as it was trained for, the image's aspect kept.

    Args:
        image_size: (height, width) of the camera image.
        input_size: (height, width) the model was trained for.
        patch_size: side of a patch in pixels; the result is whole patches, unless it is `input_size` itself.

    Returns:
        (height, width). It depends on the camera's image size alone, so shapes stay static while a camera runs.
    """
    aspect = image_size[0] / image_size[1]
    trained_aspect = input_size[0] / input_size[1]
    # Within one patch of the trained shape: use that, and its position embedding, as it is.
    if abs(aspect - trained_aspect) * input_size[1] <= patch_size:
        return input_size
    area = input_size[0] * input_size[1]
    height = max(round(math.sqrt(area * aspect) / patch_size), 1) * patch_size
    width = max(round(area / height / patch_size), 1) * patch_size
    # A line of pixels is no reason for an input of one patch by hundreds, which nothing was trained for.
    longest_height, longest_width = (max(_LONGEST * side // patch_size, 1) * patch_size for side in input_size)
    return min(height, longest_height), min(width, longest_width)


def to_input(images: np.ndarray, size: tuple[int, int], config: InputConfig, device: torch.device) -> Tensor:
    """Resize and normalise: (B, H, W, 3) uint8 RGB -> (B, 3, *size) float32 on `device`.

    Only uint8 crosses the bus; shrinking averages, so that thin structures do not alias away.
    """
    if device.type == "cpu":
        if images.shape[1:3] != size:
            if images.shape[1:3] == (1, 1):  # OpenCV 4.5.4, JetPack's, cannot enlarge a single pixel
                images = np.broadcast_to(images, (len(images), *size, 3))
            else:
                images = np.stack([_resized(image, size) for image in images])
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
        # A number is several times faster than three of them along the innermost dimension.
        mean, std = (
            values[0] if len(set(values)) == 1 else _per_channel(values, device) for values in (config.mean, config.std)
        )
        return x.sub_(mean).div_(std)
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device, non_blocking=True)
    return device_input(pixels, size, *normalisation(config, device))


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear; before it, pairs of pixels are averaged as long as twice the side is left (Williams 1983).

    As accurate as averaging by area (camvid_tiny on CamVid val, mIoU at 3/4, 5/8, 1/2 and 3/8 of the sides: 63.25,
    62.35, 61.03 and 56.40; by area 63.20, 62.37, 60.80 and 56.36) in a seventh of the time where the sizes are no
    multiples of each other: 0.1 to 0.3 ms instead of 1.0 to 2.2 for 640x480.
    """
    for halves in _halvings(image.shape[:2], size):
        image = cv2.resize(image, halves[::-1], interpolation=cv2.INTER_AREA)
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR) if image.shape[:2] != size else image


def _halvings(sides: Sequence[int], size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Sizes on the way to another one: each side is halved as long as twice the wanted one is left."""
    height, width = sides
    while height >= 2 * size[0] or width >= 2 * size[1]:
        height = height // 2 if height >= 2 * size[0] else height
        width = width // 2 if width >= 2 * size[1] else width
        yield height, width


@lru_cache(maxsize=16)
def normalisation(config: InputConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Offset and scale with which normalised = offset + scale * value: (1, 3, 1, 1) each, on the device."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return (-mean / std).to(device, dtype), (1.0 / std).to(device, dtype)


def device_input(images: Tensor, size: tuple[int, int], offset: Tensor, scale: Tensor) -> Tensor:
    """Resize as on a CPU, to whole values, and normalise on the images' own device, as a CUDA graph can record it.

    Args:
        images: (B, H, W, 3) uint8 RGB.
        size: (height, width) of the result.
        offset, scale: as `normalisation` has them, of the type of the result; float16 has all of a byte's values.

    Returns:
        (B, 3, *size), channels last in memory.
    """
    x = images.permute(0, 3, 1, 2).to(scale.dtype)
    for halves in _halvings(images.shape[1:3], size):
        x = F.interpolate(x, size=halves, mode="area").add_(0.5).floor_()
    if tuple(x.shape[2:]) != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False).add_(0.5).floor_()
    return torch.addcmul(offset, x, scale)


@lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


class Upsampling(NamedTuple):
    """Bilinear interpolation from a grid to a size, as tensors on a device.

    Attributes:
        columns: (w, W), two weights in each column.
        upper, lower: (H,) int64, the two source rows of each row.
        down: (H, 1), weight of the lower one.
    """

    columns: Tensor
    upper: Tensor
    lower: Tensor
    down: Tensor


@lru_cache(maxsize=16)
def upsampling(
    grid_size: tuple[int, int], size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Upsampling:
    """How to get from a grid (h, w) to (H, W).

    A recorded graph must hold on to what it was recorded with: the cache here forgets.
    """
    upper, lower, weights = zip(*_interpolation(grid_size[0], size[0]), strict=True)
    return Upsampling(
        _interpolation_matrix(grid_size[1], size[1], dtype, device), torch.tensor(upper, device=device),
        torch.tensor(lower, device=device), torch.tensor(weights, dtype=dtype, device=device)[:, None],
    )  # fmt: skip


@lru_cache(maxsize=16)
def _interpolation(length: int, target: int) -> tuple[tuple[int, int, float], ...]:
    """For each of `target` samples the two source positions and the weight of the second (`align_corners=False`)."""
    samples = []
    for index in range(target):
        position = max((index + 0.5) * length / target - 0.5, 0.0)
        lower = min(int(position), length - 1)
        samples.append((lower, min(lower + 1, length - 1), position - lower))
    return tuple(samples)


@lru_cache(maxsize=16)
def _interpolation_matrix(length: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Interpolation as a matrix: (length, target), two weights in each column."""
    matrix = np.zeros((length, target), np.float32)
    for column, (lower, upper, weight) in enumerate(_interpolation(length, target)):
        matrix[lower, column] += 1.0 - weight
        matrix[upper, column] += weight
    return torch.from_numpy(matrix).to(device, dtype)
