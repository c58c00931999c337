# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Joint augmentation of image and labels: one affine warp into the crop, flip, then what light and cameras do.

What a crop looks like is drawn on the CPU from the recipe's seed alone; the drawing is then carried out wherever the
image lies, with the same operations on a CPU and a GPU. Hue and saturation turn and stretch the chroma plane of YIQ,
so that all colour changes of a crop, its white balance included, are one 3x3 matrix and an offset. Shadow, colour,
gamma, blur, noise and JPEG follow each other as they do on the way from a scene to a recorded file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.classes import IGNORE_INDEX, Sample
from clustvit_ros.errors import ConfigError

_FILL = 127.0
# RGB to luma and two chroma axes (NTSC), and back.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)
# A thinned copy of the labels is enough to find a place, and sixteen times faster to search.
_THINNING = 4
# A shadow leaves this much of the light; its edge is soft over this share of the crop.
_SHADOW_LEAVES, _SHADOW_EDGE = (0.3, 0.8), (0.005, 0.05)
_BEST_JPEG_QUALITY = 95
# Far beyond what makes sense, and within what memory holds.
_MOST_CROP_PIXELS, _LEAST_SCALE, _MOST = 4096 * 4096, 0.01, 1000.0


class Crop(NamedTuple):
    """A crop as drawn.

    Attributes:
        to_source: (2, 3) maps (x, y, 1) of the crop to (x, y) of the image, in pixels with edges at integers.
        colour: (3, 4) maps (r, g, b, 1) to the new colour, on the 0..255 scale.
        blur_px: standard deviation of a Gaussian blur, 0 = none.
        noise: standard deviation of additive noise, on the 0..255 scale.
        noise_seed: seed of the noise itself.
        gamma: exponent of brightness.
        shadow: (x, y, offset, leaves): a pixel at (u, v), -1..1 each, lies in the shadow where x u + y v > offset, and
            the longer (x, y), the harder the edge; `leaves` is the share of the light there, 1 = no shadow.
        jpeg_quality: quality of a JPEG file in between, 0 = none.
    """

    to_source: np.ndarray
    colour: np.ndarray
    blur_px: float
    noise: float
    noise_seed: int
    gamma: float = 1.0
    shadow: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 1.0)
    jpeg_quality: int = 0


class ClassPlaces:
    """Where the classes of an image are, so that crops can be centred on rare ones.

    Args:
        labels: (H, W) uint8 class ids.
    """

    def __init__(self, labels: np.ndarray) -> None:
        thin = labels[::_THINNING, ::_THINNING]
        ids = [int(value) for value in np.unique(thin) if value != IGNORE_INDEX]
        self.positions = [np.argwhere(thin == value).astype(np.int16) for value in ids]

    def draw(self, rng: np.random.Generator) -> tuple[float, float] | None:
        """A pixel (y, x) of a class drawn uniformly from those present; None if there is none."""
        if not self.positions:
            return None
        positions = self.positions[int(rng.integers(len(self.positions)))]
        row, column = positions[int(rng.integers(len(positions)))]
        return float(row) * _THINNING, float(column) * _THINNING


@dataclass(frozen=True)
class Augmentation:
    """How training crops are drawn.

    Args:
        crop_size: (height, width) in pixels.
        scale: (smallest, largest) zoom relative to the model's input size, drawn log-uniformly.
        stretch: largest extra zoom of one axis against the other, drawn log-uniformly up to this ratio.
        rotation_deg: largest rotation either way.
        flip: mirror half of the crops.
        jitter: largest relative change of brightness, contrast and saturation.
        hue_deg: largest hue shift either way.
        rare_class: share of crops that are centred on a pixel of a class drawn uniformly from those in the image.
        blur_px: largest blur (standard deviation); half of the crops stay sharp.
        noise: largest standard deviation of noise, on the 0..255 scale; half of the crops stay clean.
        vertical_flip: mirror half of the crops upside down as well, for cameras that look down.
        gamma: largest exponent of brightness; its smallest is the inverse, and 1 is none.
        white_balance: largest relative gain of red, with the inverse of blue, either way.
        shadow: share of crops with a straight, soft edge beyond which there is less light.
        jpeg_quality: lowest quality of a JPEG file that half of the crops go through; 0 is none.
        paste: share of crops into which the pixels of one class of the batch's next crop are pasted, a rare class more
            often than a common one (as ClassMix does; Olsson et al., arXiv 2007.07936).
    """

    crop_size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    stretch: float = 1.15
    rotation_deg: float = 5.0
    flip: bool = True
    jitter: float = 0.4
    hue_deg: float = 10.0
    rare_class: float = 0.3
    blur_px: float = 0.0
    noise: float = 0.0
    vertical_flip: bool = False
    gamma: float = 1.0
    white_balance: float = 0.0
    shadow: float = 0.0
    jpeg_quality: int = 0
    paste: float = 0.0

    def __post_init__(self) -> None:
        if min(self.crop_size) < 1:
            raise ConfigError(f"augmentation: crop_size is {list(self.crop_size)}, expected positive (height, width)")
        if self.crop_size[0] * self.crop_size[1] > _MOST_CROP_PIXELS:
            raise ConfigError(
                f"augmentation: crop_size is {list(self.crop_size)}, expected at most {_MOST_CROP_PIXELS} pixels"
            )
        if not _LEAST_SCALE <= self.scale[0] <= self.scale[1] <= 1.0 / _LEAST_SCALE:
            raise ConfigError(
                f"augmentation: scale is {list(self.scale)}, expected (smallest, largest) from {_LEAST_SCALE:g} to "
                f"{1 / _LEAST_SCALE:g}"
            )
        for name in ("stretch", "gamma"):
            if getattr(self, name) < 1.0:
                raise ConfigError(f"augmentation: {name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.jpeg_quality <= _BEST_JPEG_QUALITY:
            raise ConfigError(
                f"augmentation: jpeg_quality is {self.jpeg_quality}, expected 1 to {_BEST_JPEG_QUALITY}, or 0 for none"
            )
        for name in ("jitter", "rare_class", "white_balance", "shadow", "paste"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"augmentation: {name} is {getattr(self, name)}, expected 0 to 1")
        for name in ("rotation_deg", "hue_deg", "blur_px", "noise"):
            if not 0.0 <= getattr(self, name) <= _MOST:
                raise ConfigError(f"augmentation: {name} is {getattr(self, name)}, expected 0 to {_MOST:g}")

    def __call__(
        self, sample: Sample, input_size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw one crop and carry it out.

        Args:
            sample: the whole image with its labels.
            input_size: (height, width) of the model's input for the whole image: the meaning of scale 1.
            rng: the only source of randomness.

        Returns:
            (h, w, 3) uint8 image and (h, w) uint8 labels of `crop_size`, void where the crop leaves the image.
        """
        crop = self.draw(sample.labels.shape, ClassPlaces(sample.labels), input_size, rng)
        image = torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
        images, labels = self.cut([image], [torch.from_numpy(sample.labels)], [crop])
        return images[0].round().byte().permute(1, 2, 0).numpy(), labels[0].byte().numpy()

    def draw(
        self, image_size: Sequence[int], places: ClassPlaces, input_size: tuple[float, float], rng: np.random.Generator,
    ) -> Crop:  # fmt: skip
        """Draw a crop of an image of (height, width) `image_size`; other arguments as for a call."""
        height, width = self.crop_size
        zoom = math.exp(rng.uniform(*np.log(self.scale)))
        stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(self.stretch))
        scale_y = input_size[0] / image_size[0] * zoom * stretch
        scale_x = input_size[1] / image_size[1] * zoom / stretch
        centre_y, centre_x = self._centre(image_size, places, (height / scale_y, width / scale_x), rng)
        angle = math.radians(rng.uniform(-self.rotation_deg, self.rotation_deg))
        cos, sin = math.cos(angle), math.sin(angle)
        mirror_x = -1.0 if self.flip and rng.random() < 0.5 else 1.0
        mirror_y = -1.0 if self.vertical_flip and rng.random() < 0.5 else 1.0
        linear = np.array([[mirror_x * cos, mirror_y * sin], [-mirror_x * sin, mirror_y * cos]])
        linear = np.diag([1.0 / scale_x, 1.0 / scale_y]) @ linear
        offset = np.array([centre_x, centre_y]) - linear @ np.array([width / 2, height / 2])
        return Crop(
            np.hstack([linear, offset[:, None]]), self._draw_colour(rng),
            rng.uniform(0.0, self.blur_px) if rng.random() < 0.5 else 0.0,
            rng.uniform(0.0, self.noise) if rng.random() < 0.5 else 0.0, int(rng.integers(2**31)),
            math.exp(rng.uniform(-1.0, 1.0) * math.log(self.gamma)), self._draw_shadow(rng),
            int(rng.integers(self.jpeg_quality, _BEST_JPEG_QUALITY, endpoint=True))
            if self.jpeg_quality and rng.random() < 0.5 else 0,
        )  # fmt: skip

    def cut(self, images: Sequence[Tensor], labels: Sequence[Tensor], crops: Sequence[Crop]) -> tuple[Tensor, Tensor]:
        """Carry out drawn crops on the device where the images lie.

        Args:
            images: (3, H, W) uint8 RGB each; sizes may differ.
            labels: (H, W) uint8 class ids, 255 = void, each.
            crops: what `draw` gave, one for each.

        Returns:
            images: (B, 3, h, w) float32, 0..255. labels: (B, h, w) int64, void where a crop leaves its image.
        """
        warped = [
            self._warp(image, label, crop.to_source) for image, label, crop in zip(images, labels, crops, strict=True)
        ]
        batch = torch.stack([image for image, _ in warped])
        if any(crop.shadow[3] < 1.0 for crop in crops):
            batch = batch * _shadows([crop.shadow for crop in crops], self.crop_size, batch.device)
        colour = torch.from_numpy(np.stack([crop.colour for crop in crops])).to(batch.device, torch.float32)
        batch = torch.einsum("bij,bjhw->bihw", colour[:, :, :3], batch) + colour[:, :, 3, None, None]
        batch = batch.clamp(0.0, 255.0)
        if any(crop.gamma != 1.0 for crop in crops):
            gamma = torch.tensor([crop.gamma for crop in crops], device=batch.device)[:, None, None, None]
            batch = 255.0 * (batch / 255.0) ** gamma
        if any(crop.blur_px > 0 for crop in crops):
            batch = _blur(batch, [crop.blur_px for crop in crops])
        for image, crop in zip(batch, crops, strict=True):
            if crop.noise > 0:
                generator = torch.Generator(batch.device).manual_seed(crop.noise_seed)
                noise = torch.randn(image.shape, generator=generator, device=batch.device)
                image.add_(noise, alpha=crop.noise).clamp_(0.0, 255.0)
            if crop.jpeg_quality:
                image.copy_(_through_jpeg(image, crop.jpeg_quality))
        return batch, torch.stack([label for _, label in warped]).long()

    def paste_classes(
        self, images: Tensor, labels: Tensor, takes_part: Sequence[bool], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Paste pixels of one class of the next crop into some of the crops.

        Args:
            images, labels: as `cut` gives them; stay as they are.
            takes_part: which crops may give and take.
            rng: the only source of randomness.
        """
        pasted, pasted_labels = images.clone(), labels.clone()
        places = [index for index, takes in enumerate(takes_part) if takes]
        for place, donor in zip(places, places[1:] + places[:1], strict=True):
            if rng.random() >= self.paste or place == donor:
                continue
            counts = labels[donor].flatten().bincount(minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX].cpu().numpy()
            present = np.flatnonzero(counts)
            if not present.size:
                continue
            rarity = 1.0 / counts[present]
            mask = labels[donor] == int(rng.choice(present, p=rarity / rarity.sum()))
            pasted[place] = torch.where(mask, images[donor], pasted[place])
            pasted_labels[place] = torch.where(mask, labels[donor], pasted_labels[place])
        return pasted, pasted_labels

    def _warp(self, image: Tensor, labels: Tensor, to_source: np.ndarray) -> tuple[Tensor, Tensor]:
        height, width = self.crop_size
        # affine_grid and grid_sample speak of both sides as -1..1.
        from_unit = np.array([[width / 2, 0.0, width / 2], [0.0, height / 2, height / 2], [0.0, 0.0, 1.0]])
        source = np.vstack([to_source, [0.0, 0.0, 1.0]]) @ from_unit
        to_unit = np.array([[2.0 / image.shape[2], 0.0, -1.0], [0.0, 2.0 / image.shape[1], -1.0]])
        theta = torch.from_numpy(to_unit @ source).to(image.device, torch.float32)[None]
        grid = F.affine_grid(theta, [1, 3, height, width], align_corners=False)
        # Outside of the image grid_sample gives 0, which is moved to where grey and void are.
        crop = F.grid_sample(image[None].float() - _FILL, grid, mode="bilinear", align_corners=False)[0] + _FILL
        void = labels[None, None].float() - IGNORE_INDEX
        crop_labels = F.grid_sample(void, grid, mode="nearest", align_corners=False)[0, 0] + IGNORE_INDEX
        return crop, crop_labels

    def _centre(
        self, image_size: Sequence[int], places: ClassPlaces, extent: tuple[float, float], rng: np.random.Generator,
    ) -> tuple[float, float]:  # fmt: skip
        """Centre (y, x) in image pixels of a crop that covers `extent` (height, width) of them."""
        if rng.random() < self.rare_class:
            place = places.draw(rng)
            if place is not None:
                jitter = rng.uniform(-0.25, 0.25, 2)
                return place[0] + jitter[0] * extent[0], place[1] + jitter[1] * extent[1]
        centre = []
        for length, covered in zip(image_size, extent, strict=True):
            slack = abs(length - covered) / 2
            centre.append(length / 2 + rng.uniform(-slack, slack))
        return centre[0], centre[1]

    def _draw_colour(self, rng: np.random.Generator) -> np.ndarray:
        brightness, contrast, saturation = 1.0 + rng.uniform(-self.jitter, self.jitter, 3)
        hue = math.radians(rng.uniform(-self.hue_deg, self.hue_deg))
        cos, sin = saturation * math.cos(hue), saturation * math.sin(hue)
        chroma = np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
        red = 1.0 + rng.uniform(-self.white_balance, self.white_balance) / 2
        # Contrast turns about mid-grey.
        matrix = contrast * (_RGB @ chroma @ _YIQ @ np.diag([red, 1.0, 1.0 / red]))
        return np.hstack([matrix, np.full((3, 1), 127.5 * (brightness - contrast))])

    def _draw_shadow(self, rng: np.random.Generator) -> tuple[float, float, float, float]:
        if rng.random() >= self.shadow:
            return 1.0, 0.0, 0.0, 1.0
        angle, steepness = rng.uniform(0.0, 2 * math.pi), 1.0 / rng.uniform(*_SHADOW_EDGE)
        x, y = steepness * math.cos(angle), steepness * math.sin(angle)
        return x, y, steepness * rng.uniform(-0.8, 0.8), rng.uniform(*_SHADOW_LEAVES)


def _shadows(
    shadows: Sequence[tuple[float, float, float, float]], size: tuple[int, int], device: torch.device
) -> Tensor:
    """Share of the light that is left: (B, 1, h, w)."""
    x, y, offset, leaves = torch.tensor(shadows, device=device).T[:, :, None, None, None]
    v = torch.linspace(-1.0, 1.0, size[0], device=device)[:, None]
    u = torch.linspace(-1.0, 1.0, size[1], device=device)
    return 1.0 - (1.0 - leaves) * torch.sigmoid(x * u + y * v - offset)


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    """A (3, h, w) image, 0..255, as a JPEG file of a quality has it, on the CPU."""
    # Which channel is called blue matters to the file's colour space: OpenCV wants BGR.
    pixels = image.flip(0).round().byte().permute(1, 2, 0).cpu().numpy()
    _, file = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(file, cv2.IMREAD_COLOR)
    return torch.from_numpy(decoded).permute(2, 0, 1).flip(0).float()


def _blur(images: Tensor, deviations_px: Sequence[float]) -> Tensor:
    """Gaussian blur with one standard deviation per image, separably: (B, 3, h, w)."""
    radius = max(math.ceil(3 * max(deviations_px)), 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernels = torch.stack([torch.exp(-0.5 * (offsets / max(deviation, 1e-3)) ** 2) for deviation in deviations_px])
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).to(images.device)
    B, C, H, W = images.shape
    weight = kernels.repeat_interleave(C, dim=0)[:, None]  # one filter per image and channel
    planes = F.pad(images.reshape(1, B * C, H, W), (radius,) * 4, mode="replicate")
    planes = F.conv2d(planes, weight[:, :, :, None], groups=B * C)
    return F.conv2d(planes, weight[:, :, None, :], groups=B * C).reshape(B, C, H, W)
