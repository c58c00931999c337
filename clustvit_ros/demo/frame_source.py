# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Where demo frames come from: a folder of pictures, a video file or a camera device. No ROS in here."""

from __future__ import annotations

import abc
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from clustvit_ros.errors import DataError
from clustvit_ros.images import IMAGE_SUFFIXES, list_images, read_image


@dataclass(frozen=True)
class SourceFrame:
    """One picture.

    Args:
        pixels: (H, W, 3) uint8 BGR.
        name: file name, or the source and a frame number.
        labels: (H, W) uint8 true class ids, where the source knows them.
        points: (H, W, 3) float32 metres in the optical frame, NaN where nothing is, where the source knows them.
    """

    pixels: np.ndarray
    name: str
    labels: np.ndarray | None = None
    points: np.ndarray | None = None


class FrameSource(abc.ABC):
    """Frames in order; iterating again starts over where the source can.

    Args:
        description: what the source is, in words.
    """

    live: bool = False
    """True for a device: frames come at its own pace, and an old one is worth nothing."""
    focal_px: float = 0.0
    """Of a pinhole camera whose centre is the picture's; 0 where it is not known."""

    def __init__(self, description: str) -> None:
        self.description = description

    @abc.abstractmethod
    def __iter__(self) -> Iterator[SourceFrame]:
        """One pass over the frames.

        Raises:
            DataError: a frame that should be there cannot be read.
        """


class FolderSource(FrameSource):
    """The pictures of a folder, sorted by name.

    Raises:
        DataError: the folder holds no picture.
    """

    def __init__(self, folder: Path) -> None:
        nested = folder / "images"
        self._files = list_images(folder) or (list_images(nested) if nested.is_dir() else [])
        if not self._files:
            raise DataError(f"source: {folder} holds no pictures, expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        super().__init__(f"{len(self._files)} pictures of {self._files[0].parent}")

    def __iter__(self) -> Iterator[SourceFrame]:
        for file in self._files:
            yield SourceFrame(cv2.cvtColor(read_image(file), cv2.COLOR_RGB2BGR), file.name)


class VideoSource(FrameSource):
    """The frames of a video file.

    Raises:
        DataError: the file is no video that this OpenCV can read.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        capture = self._open()
        width, height = (int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        capture.release()
        super().__init__(f"video {file} ({width}x{height})")

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(str(self._file))
        if not capture.isOpened():
            raise DataError(f"source: {self._file} cannot be read as a video; convert it to H.264 MP4 or MJPEG AVI")
        return capture

    def __iter__(self) -> Iterator[SourceFrame]:
        capture = self._open()
        try:
            index = 0
            while True:
                good, pixels = capture.read()
                if not good:
                    break
                yield SourceFrame(pixels, f"{self._file.stem}_{index:06d}")
                index += 1
        finally:
            capture.release()
        if index == 0:
            raise DataError(f"source: {self._file} holds no frame that can be decoded")


class DeviceSource(FrameSource):
    """A V4L2 camera.

    Raises:
        DataError: the device cannot be opened.
    """

    live = True

    def __init__(self, index: int, width: int = 0, height: int = 0) -> None:
        device = Path(f"/dev/video{index}")
        super().__init__(f"camera {device}")
        if not device.exists():
            raise DataError(f"source: {device} does not exist; plug the camera in, `ls /dev/video*` shows those there")
        self._capture = cv2.VideoCapture(index, cv2.CAP_V4L2)
        if not self._capture.isOpened():
            raise DataError(f"source: {device} cannot be opened; is it in use, and is this user in group video?")
        if width and height:
            self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, width)
            self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, height)

    def __iter__(self) -> Iterator[SourceFrame]:
        index = 0
        while True:
            good, pixels = self._capture.read()
            if not good:
                raise DataError(f"source: {self.description} stopped giving frames after {index}; was it unplugged?")
            yield SourceFrame(pixels, f"{self.description.rpartition('/')[2]}_{index:06d}")
            index += 1


class SimSource(FrameSource):
    """The simulated camera.

    Args:
        seed: seed of the world.
        size: (height, width) in pixels.
        rate_hz: frames per simulated second.
        points: give the place of every pixel.
        loop_frames: a pass ends, and the next one starts at the same place, after so many; 0 never ends.

    Raises:
        ConfigError: a value out of range, or its renderer is not installed.
    """

    def __init__(self, seed: int, size: tuple[int, int], rate_hz: float, points: bool, loop_frames: int = 0) -> None:
        # Here and not above: only this source needs the renderer, which is an extra.
        from clustvit_ros.sim import SimulatedCamera

        self._seed, self._points, self._loop_frames = seed, points, loop_frames
        self._camera = SimulatedCamera(seed, size, rate_hz)
        self.focal_px = self._camera.focal_px
        super().__init__(f"simulated camera, seed {seed}, {size[1]}x{size[0]}")

    def __iter__(self) -> Iterator[SourceFrame]:
        for index in range(self._loop_frames) if self._loop_frames else itertools.count():
            frame = self._camera.frame(index, points=self._points)
            yield SourceFrame(frame.image, f"sim_{self._seed}_{index:06d}", frame.labels, frame.points)


def open_source(
    source: str, width: int = 0, height: int = 0, rate_hz: float = 30.0, points: bool = False, loop_frames: int = 0,
) -> FrameSource:  # fmt: skip
    """Open whatever `source` names.

    Args:
        source: folder, video file, "/dev/videoN" or "N", "sim" or "sim:SEED".
        width: pixels that a device or the simulated camera is asked for; 0 leaves it its own.
        height: likewise.
        rate_hz: frames per second of simulated time.
        points: the simulated camera gives the place of every pixel, too.
        loop_frames: the simulated drive starts over after so many; 0 drives on.

    Raises:
        ConfigError: the simulated camera cannot be used.
        DataError: nothing there, or nothing usable.
    """
    simulated = re.fullmatch(r"sim(?::(\d{1,18}))?", source)
    if simulated:
        return SimSource(int(simulated[1] or 0), (height or 480, width or 640), rate_hz, points, loop_frames)
    device = re.fullmatch(r"(?:/dev/video)?(\d{1,3})", source)
    if device:
        return DeviceSource(int(device[1]), width, height)
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        return VideoSource(path)
    raise DataError(f"source: got {source!r}, expected a folder of pictures, a video file, /dev/videoN, N or sim:SEED")
