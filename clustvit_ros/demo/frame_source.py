# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Where frames come from: pictures, videos, cameras and streams, the simulated world. No ROS in here."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import glob
import itertools
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.images import IMAGE_SUFFIXES, is_image, list_images, read_image
from clustvit_ros.paths import video_path

_STREAM_TIMEOUT_MS = 10_000
_DECODE_AHEAD = 4
_WHOLE_VIDEO = 0.95  # containers estimate how many frames they hold
# What a simulated drive that starts over may keep, to be rendered once: two passes of the demo's frames.
_KEPT_BYTES = 1 << 27


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
    length: int = 0
    """How many frames a pass has, as far as that is known; 0 where it is not."""
    rate_hz: float = 0.0
    """Frames per second of a video; 0 where it is not known."""
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


class PictureSource(FrameSource):
    """Picture files, in order.

    Args:
        files: their paths, at least one; frames are named by them, relative to the folder that they have in common.
        on_unreadable: is told of each that cannot be decoded, and the next one follows; None stops there.
        to_bytes: of 16-bit pictures, as for `read_image`.
    """

    def __init__(
        self, files: Sequence[Path], on_unreadable: Callable[[str], None] | None = None,
        to_bytes: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self._files, self._on_unreadable, self.length, self._to_bytes = files, on_unreadable, len(files), to_bytes
        # Without "..", which in a name would lead out of a folder of results; links stay as they are called.
        whole = [Path(os.path.abspath(file)) for file in files]
        self.folder = Path(os.path.commonpath([file.parent for file in whole]))
        self._names = [str(file.relative_to(self.folder)) for file in whole]
        super().__init__(f"{len(files)} pictures of {self.folder}" if len(files) > 1 else f"picture {files[0]}")

    def __iter__(self) -> Iterator[SourceFrame]:
        for file, name in zip(self._files, self._names, strict=True):
            try:
                pixels = cv2.cvtColor(read_image(file, self._to_bytes), cv2.COLOR_RGB2BGR)
            except DataError as error:
                if self._on_unreadable is None:
                    raise DataError(f"source: {error}") from error
                self._on_unreadable(str(error))
                continue
            yield SourceFrame(pixels, name)


class VideoSource(FrameSource):
    """The frames of a video file, or of a stream (RTSP, HTTP), which is live.

    Args:
        location: path of the file, or URL; what a URL says before its @ is told nobody.
        on_unreadable: is told of a file that ends long before its time.

    Raises:
        DataError: it is no video that this OpenCV can read, or nobody answers there.
    """

    def __init__(self, location: str, on_unreadable: Callable[[str], None] | None = None) -> None:
        self._on_unreadable = on_unreadable
        self._location, self.live = location, is_url(location)
        self._told = re.sub(r"//[^/@]*@", "//", location)
        self._name = re.sub(r"\W+", "_", self._told.partition("//")[2]).strip("_") if self.live else Path(location).stem
        self._first: cv2.VideoCapture | None = self._open()
        keys = cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_COUNT
        width, height, count = (int(self._first.get(key)) for key in keys)
        self.length = 0 if self.live else max(count, 0)
        rate_hz = self._first.get(cv2.CAP_PROP_FPS)
        self.rate_hz = rate_hz if 0.1 <= rate_hz <= 1000.0 else 0.0
        if not self.live:
            self._first.release()
            self._first = None
        super().__init__(f"{'stream' if self.live else 'video'} {self._told} ({width}x{height})")

    def _open(self) -> cv2.VideoCapture:
        if not self.live:
            capture = cv2.VideoCapture(video_path(self._location))
            if not capture.isOpened():
                raise DataError(f"source: {self._location} cannot be read as a video; make it H.264 MP4, MJPEG AVI")
            return capture
        keys = cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, cv2.CAP_PROP_READ_TIMEOUT_MSEC
        limits = [value for key in keys for value in (key, _STREAM_TIMEOUT_MS)]
        capture = cv2.VideoCapture(self._location, cv2.CAP_FFMPEG, limits)
        if not capture.isOpened():
            raise DataError(
                f"source: {self._told} gives no video within {_STREAM_TIMEOUT_MS / 1000:g} s; check address, user and "
                "password (rtsp://USER:PASSWORD@HOST/PATH), and that this machine reaches it"
            )
        return capture

    def __iter__(self) -> Iterator[SourceFrame]:
        capture, self._first = self._first or self._open(), None
        try:
            index = 0
            while True:
                good, pixels = capture.read()
                if not good:
                    break
                yield SourceFrame(pixels, f"{self._name}_{index:06d}")
                index += 1
        finally:
            capture.release()
        if self.live:
            raise DataError(f"source: {self._told} stopped giving frames after {index}")
        if index == 0:
            raise DataError(f"source: {self._location} holds no frame that can be decoded")
        if self._on_unreadable is not None and index < _WHOLE_VIDEO * self.length:
            self._on_unreadable(
                f"{self._location}: ends after {index} of {self.length} frames, cut short or damaged; fetch it again"
            )


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
        # A pass that comes again is not rendered again: on a robot, no renderer takes cores from the node.
        self._kept: list[SourceFrame] = []
        self.focal_px = self._camera.focal_px
        super().__init__(f"simulated camera, seed {seed}, {size[1]}x{size[0]}")

    def __iter__(self) -> Iterator[SourceFrame]:
        for index in range(self._loop_frames) if self._loop_frames else itertools.count():
            if index < len(self._kept):
                yield self._kept[index]
                continue
            rendered = self._camera.frame(index, points=self._points)
            frame = SourceFrame(rendered.image, f"sim_{self._seed}_{index:06d}", rendered.labels, rendered.points)
            maps = (frame.pixels, frame.labels, frame.points)
            size = sum(each.nbytes for each in maps if each is not None)
            if index == len(self._kept) and index < self._loop_frames and (index + 1) * size <= _KEPT_BYTES:
                self._kept.append(frame)
            yield frame


def is_url(source: str) -> bool:
    """Whether `source` names a stream."""
    return re.match(r"(rtsps?|rtmps?|https?|udp|tcp)://", source, re.IGNORECASE) is not None


def sim_seed(source: str, default: int = 0) -> int | None:
    """The seed of "sim:SEED", that of "sim" being `default`; None for a source that is not the simulated camera.

    Raises:
        ConfigError: its seed is none.
    """
    if not re.match(r"sim(:|$)", source):
        return None
    simulated = re.fullmatch(r"sim(?::(\d{1,18}))?", source)
    if simulated is None:
        raise ConfigError(f"source: got {source!r}, expected sim, or sim:SEED with a whole number, e.g. sim:7")
    return int(simulated[1] or default)


def open_source(
    source: str, width: int = 0, height: int = 0, rate_hz: float = 30.0, points: bool = False, loop_frames: int = 0,
    on_unreadable: Callable[[str], None] | None = None, to_bytes: Callable[[np.ndarray], np.ndarray] | None = None,
) -> FrameSource:  # fmt: skip
    """Open whatever `source` names.

    Args:
        source: picture, folder, pattern, video file, "/dev/videoN" or "N", URL of a stream, "sim" or "sim:SEED".
        width: pixels that a device or the simulated camera is asked for; 0 leaves it its own.
        height: likewise.
        rate_hz: frames per second of simulated time.
        points: the simulated camera gives the place of every pixel, too.
        loop_frames: the simulated drive starts over after so many; 0 drives on.
        on_unreadable, to_bytes: as for `PictureSource`.

    Raises:
        ConfigError: the simulated camera cannot be used.
        DataError: nothing there, or nothing usable.
    """
    seed = sim_seed(source)
    if seed is not None:
        return SimSource(seed, (height or 480, width or 640), rate_hz, points, loop_frames)
    device = re.fullmatch(r"(?:/dev/video)?(\d{1,3})", source)
    if device and not Path(source).is_dir():  # of pictures, as drives are numbered
        return DeviceSource(int(device[1]), width, height)
    if is_url(source):
        return VideoSource(source)
    path = Path(source).expanduser()
    if path.is_file():
        if not is_image(path):
            return VideoSource(str(path), on_unreadable)
        return PictureSource([path], on_unreadable, to_bytes)
    return PictureSource(find_pictures(source), on_unreadable, to_bytes)


def find_pictures(source: str) -> list[Path]:
    """The pictures of a folder, or of its `images/` where it has none itself, or those that a pattern matches; sorted.

    Raises:
        DataError: nothing there, or no picture in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        nested = path / "images"
        files = list_images(path) or (list_images(nested) if nested.is_dir() else [])
    elif glob.has_magic(source):
        found = sorted(map(Path, glob.iglob(str(path), recursive=True)))
        files = [file for file in found if is_image(file)]
    else:
        raise DataError(
            f"source: got {source!r}, which is not there; expected a folder of pictures, a picture or video file, a "
            "pattern ('drive/**/*.jpg'), /dev/videoN, N, a stream (rtsp://...) or sim:SEED"
        )
    if not files:
        raise DataError(f"source: {source} holds no pictures, expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return files


class FrameReader:
    """Decodes frames ahead of their time, in a thread of its own.

    Args:
        source: where they come from; a live one is read at its own pace, and only its newest frame is kept.
        loop: start over at the end.
        size: (height, width) to scale to; None keeps the source's.
        pause_s: seconds between a frame's publication and work on another one, while enough are ready. A camera takes
            no processor from what its picture goes to; a renderer that starts when a picture is published would.
    """

    def __init__(self, source: FrameSource, loop: bool, size: tuple[int, int] | None, pause_s: float = 0.0) -> None:
        self._source = source
        self._loop = loop
        self._size, self._pause_s = size, pause_s
        self._frames: queue.Queue[SourceFrame | Exception | None] = queue.Queue(1 if source.live else _DECODE_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="camera-reader", daemon=True)
        self._thread.start()

    def next(self) -> SourceFrame | None:
        """The next frame, or None when none is ready yet.

        Raises:
            StopIteration: there are no more.
            DataError: the source failed.
        """
        try:
            item = self._frames.get_nowait()
        except queue.Empty:
            return None
        if item is None:
            raise StopIteration
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                frame = None
                for frame in self._source:
                    self._put(self._scaled(frame))
                    if self._stop.is_set():
                        return
                if not self._loop:
                    break
                if frame is None:
                    raise DataError(f"source: nothing of {self._source.description} can be read")
            self._put(None)
        except Exception as error:  # whatever the source raises is reported by the node's thread
            self._put(error)

    def _scaled(self, frame: SourceFrame) -> SourceFrame:
        if self._size is None or frame.pixels.shape[:2] == self._size:
            return frame
        pixels = cv2.resize(frame.pixels, self._size[::-1], interpolation=cv2.INTER_AREA)
        return dataclasses.replace(frame, pixels=pixels)

    def _put(self, item: SourceFrame | Exception | None) -> None:
        if self._source.live:
            with contextlib.suppress(queue.Empty):
                self._frames.get_nowait()
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._frames.put(item, timeout=0.1)
                if self._frames.full() and not self._source.live:
                    self._stop.wait(self._pause_s)
                return
