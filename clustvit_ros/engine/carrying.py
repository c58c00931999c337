# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Label maps carried from the picture that they were made of to later ones of the same camera, by dense optical flow.

Flow is dense inverse search (Kroeger et al., ECCV 2016, arXiv 1603.03590) in OpenCV, between neighbouring pictures at
about 160x120. Motions over several pictures are composed, so that labels are sampled once, from the picture that they
belong to, however far they are carried. Where flow there and back disagree (Sundaram et al., ECCV 2010, equation 5), a
pixel was hidden before, or is not followed: its confidence falls, the more the nearer another label is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Generic, TypeVar

import cv2
import numpy as np

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.engine.engine import Prediction

# With a finer scale than the preset's, flow at 160x120 takes 0.3 ms and carries labels as well as the preset's does at
# 320x240 in 0.7 (a simulated drive at 640x480; at most 0.2 mIoU apart up to four frames); larger, it costs more than
# it brings.
_FLOW_PIXELS = 160 * 120
# DIS raises on pictures smaller than its patches.
_LEAST_SIDE = 16
# Levels of grey: less contrast than sensor noise has gives nothing to follow.
_LEAST_CONTRAST = 2.0
# Neighbouring pictures of a drive agree on 90 % of their pixels, of a dark and noisy one on 60 to 80; four frames apart
# they agree on 65 %, unrelated pictures on up to 11 %, noise on 26 %.
_LEAST_AGREEMENT = 0.3
_NEIGHBOURS = np.ones((3, 3), np.uint8)
UNSEEN = 1e6
"""Error of what no earlier picture shows."""

T = TypeVar("T")


@dataclass(frozen=True)
class Motion:
    """From where in an earlier picture the pixels of a later one came; (h, w) is the size that flow works at.

    Args:
        ways: (h, w, 3) float32: pixels from a place in the later picture to the same thing in the earlier one, to the
            right and down, and pixels by which flow there and back miss each other, added up over all steps; about
            `UNSEEN` for what was outside an earlier picture.
    """

    ways: np.ndarray

    def after(self, earlier: Motion) -> Motion:
        """The motion over both spans: this one from picture 1 to 2, `earlier` from 0 to 1."""
        x, y = _places(self.ways[..., 0], self.ways[..., 1])
        # Replicated at the border: what leaves the picture there has an error of its own already.
        return Motion(self.ways + cv2.remap(earlier.ways, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


class PictureFlow:
    """Follows a camera from picture to picture."""

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)  # type: ignore[attr-defined]
        self._dis.setFinestScale(1)
        self._dis.setPatchStride(6)
        self._previous: np.ndarray | None = None
        self._image_size: tuple[int, ...] = ()

    def see(self, image: np.ndarray) -> Motion | None:
        """Take the camera's next picture.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            The motion since the picture before; None where there is none to tell: it is the first, has another size,
            shows something else, or shows nothing.
        """
        grey, previous = _grey(image), self._previous
        same_size = image.shape == self._image_size
        self._image_size, self._previous = image.shape, None
        if min(grey.shape) < _LEAST_SIDE or float(cv2.meanStdDev(grey)[1][0, 0]) < _LEAST_CONTRAST:
            return None
        self._previous = grey
        if previous is None or not same_size:
            return None
        x, y = cv2.split(self._dis.calc(grey, previous, None))
        error, agreement = _errors(x, y, self._dis.calc(previous, grey, None))
        return Motion(cv2.merge([x, y, error])) if agreement >= _LEAST_AGREEMENT else None


@dataclass
class Source(Generic[T]):
    """What is carried: an engine's result.

    Args:
        number: the picture that it was made of.
        result: whatever the caller carries along.
        motion: from that picture to the newest one; None while it is the newest.
        carried: how many pictures it has been carried to.
    """

    number: int
    result: T
    motion: Motion | None = None
    carried: int = 0


class Carrier(Generic[T]):
    """Knows how the newest picture of a camera moved since the newest engine result was made. For one thread.

    Args:
        memory: how many pictures a result may be late; what came before the newest result's is forgotten.
    """

    def __init__(self, memory: int) -> None:
        self._flow = PictureFlow()
        # From each picture's predecessor to it; None where it could not be followed.
        self._motions: deque[tuple[int, Motion | None]] = deque(maxlen=memory)
        self.source: Source[T] | None = None
        """What can be carried to the newest picture; None when nothing can."""

    def see(self, number: int, image: np.ndarray) -> bool:
        """Take the camera's next picture.

        Args:
            number: larger than of any picture before; not every number need come.
            image: (H, W, 3) uint8 RGB.

        Returns:
            False when nothing can be carried to it: it cannot be followed from the one before.
        """
        is_first, motion = not self._motions, self._flow.see(image)
        self._motions.append((number, motion))
        source = self.source
        if source is not None and number > source.number:
            if motion is None:
                self.source = None
            else:
                source.motion = motion if source.motion is None else motion.after(source.motion)
        return is_first or motion is not None

    def adopt(self, number: int, result: T) -> bool:
        """Carry another result from now on, brought forward to the newest picture.

        Args:
            number: the picture that it was made of.
            result: whatever the caller carries along.

        Returns:
            False when it cannot be: the picture was never seen, is too long ago, or something else came since.
        """
        if number not in (seen for seen, _ in self._motions):
            return False
        source = Source(number, result)
        for later, motion in self._motions:
            if later <= number:
                continue
            if motion is None:
                return False
            source.motion = motion if source.motion is None else motion.after(source.motion)
        self.source = source
        while self._motions[0][0] < number:
            self._motions.popleft()
        return True

    def has_forgotten(self, number: int) -> bool:
        """Whether a picture is longer ago than `memory` pictures, so that no result of it can be carried."""
        return len(self._motions) == self._motions.maxlen and number < self._motions[0][0]

    def forget(self) -> None:
        """What comes next has nothing to do with what was."""
        self._flow = PictureFlow()
        self._motions.clear()
        self.source = None


def carry(prediction: Prediction, motion: Motion | None, confidence_threshold: float) -> Prediction:
    """Bring label maps from their own picture to a later one.

    Args:
        prediction: maps of one image, (1, H, W).
        motion: from its picture to the other; None is no motion.
        confidence_threshold: pixels less confident than this become unlabelled, as engines have it.

    Returns:
        Maps of the same size: mask and clusters sampled at the nearest pixel; confidence less where flow errs by as
        much as another label is away, 0 for what was not seen before. Statistics stay those of the engine's call.
    """
    if motion is None:
        return prediction
    height, width = prediction.mask.shape[1:]
    right, down, error = cv2.split(motion.ways)
    h, w = error.shape
    columns, rows = _grid(height, width)
    x = cv2.scaleAdd(cv2.resize(right, (width, height), interpolation=cv2.INTER_LINEAR), width / w, columns)
    y = cv2.scaleAdd(cv2.resize(down, (width, height), interpolation=cv2.INTER_LINEAR), height / h, rows)
    nearest = cv2.convertMaps(x, y, cv2.CV_16SC2, nninterpolation=True)[0]

    def sample(maps: np.ndarray) -> np.ndarray:
        return cv2.remap(maps[0], nearest, np.empty(0, np.uint16), cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)

    mask, confidence = sample(prediction.mask), None
    if prediction.confidence is not None or confidence_threshold:
        trust = cv2.resize(_trust(mask, error), (width, height), interpolation=cv2.INTER_LINEAR)
        confidence = trust
        if prediction.confidence is not None:
            confidence = cv2.multiply(sample(prediction.confidence), trust, scale=1 / 255)
        if confidence_threshold:
            mask[confidence < 255 * confidence_threshold] = IGNORE_INDEX
        confidence = cv2.copyTo(confidence, (mask != IGNORE_INDEX).view(np.uint8))
    clusters = None if prediction.cluster_map is None else sample(prediction.cluster_map)[None]
    return replace(
        prediction, mask=mask[None], cluster_map=clusters,
        confidence=None if confidence is None or prediction.confidence is None else confidence[None],
    )  # fmt: skip


def _trust(mask: np.ndarray, error: np.ndarray) -> np.ndarray:
    """How sure a carried label is, 0..255: flow that errs by some pixels matters only that near to another label."""
    small = cv2.resize(mask, error.shape[::-1], interpolation=cv2.INTER_NEAREST)
    inner = cv2.compare(cv2.dilate(small, _NEIGHBOURS), cv2.erode(small, _NEIGHBOURS), cv2.CMP_EQ)
    distance = cv2.distanceTransform(inner, cv2.DIST_L2, 3)
    share = error / (distance + 0.5)
    share *= share
    share += 1.0
    return cv2.divide(255.0, share, dtype=cv2.CV_8U)


def _grey(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = (_FLOW_PIXELS / (height * width)) ** 0.5
    if scale < 1.0:
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _errors(x: np.ndarray, y: np.ndarray, forth: np.ndarray) -> tuple[np.ndarray, float]:
    """By how many pixels flow back (x, y) and forth miss each other, and the share of pixels where they do not."""
    places = _places(x, y)
    outside = (UNSEEN, UNSEEN)
    returned = cv2.remap(forth, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=outside)
    forth_x, forth_y = cv2.split(returned)
    error = cv2.magnitude(x + forth_x, y + forth_y)
    there, back = cv2.magnitude(x, y), cv2.magnitude(forth_x, forth_y)
    return error, float((error * error < 0.01 * (there * there + back * back) + 0.5).mean())


def _places(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    columns, rows = _grid(*x.shape)
    return x + columns, y + rows


@lru_cache(maxsize=8)
def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of each pixel, (height, width) float32."""
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return columns, rows
