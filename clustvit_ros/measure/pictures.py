# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Pictures, diagrams and films that show people what a model does."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np

from clustvit_ros.classes import ClassSet, Sample
from clustvit_ros.engine.engine import Prediction
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.images import read_image
from clustvit_ros.paths import video_path

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


def class_legend(classes: ClassSet, height: int) -> np.ndarray:
    """Names beside their colours, one below the other, in as many columns as `height` asks for: (height, W, 3) RGB."""
    row, swatch = 22, 16
    rows = max(height // row, 1)
    columns = [classes.names[start : start + rows] for start in range(0, len(classes), rows)]
    parts, index = [], 0
    for names in columns:
        text_px = max(cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0] for name in names)
        part = np.full((height, swatch + text_px + 20, 3), 255, np.uint8)
        for line, name in enumerate(names):
            top = line * row + 3
            part[top : top + swatch, 6 : 6 + swatch] = classes.colours[index]
            cv2.putText(part, name, (swatch + 12, top + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
            index += 1
        parts.append(part)
    return np.hstack(parts)


def annotated(
    overlay: np.ndarray, classes: ClassSet, rate_hz: float, engine_ms: float, budget_ms: float, tokens_kept: float,
    tokens_total: int,
) -> np.ndarray:  # fmt: skip
    """An (H, W, 3) overlay with what it took above it and the legend beside it, for a window."""
    time_text = f"{engine_ms:.0f}{f' of {budget_ms:g}' if budget_ms else ''} ms"
    text = f"{rate_hz:.1f} fps  {time_text}  {tokens_kept:.0f} of {tokens_total} tokens"
    return np.hstack([titled(overlay, text), class_legend(classes, len(overlay))])


def window_problem(environ: Mapping[str, str]) -> str:
    """Why no window can be opened here; empty when nothing speaks against it."""
    if sys.platform.startswith("linux") and not (environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY")):
        return "there is no screen here (neither DISPLAY nor WAYLAND_DISPLAY is set)"
    build = cv2.getBuildInformation()
    if "GUI:                           NONE" in build:
        return "this OpenCV has no windows; install opencv-python in place of opencv-python-headless"
    return ""


class FilmWriter:
    """Writes a film, as a context: H.264 where PyAV is installed, else what this OpenCV can write.

    Args:
        path: of the MP4; `path` tells what it became.
        rate_hz: frames per second.
    """

    def __init__(self, path: Path, rate_hz: float) -> None:
        self.path, self._rate_hz = path, rate_hz
        self._size = (0, 0)
        self._container: Any = None
        self._stream: Any = None
        self._writer: cv2.VideoWriter | None = None

    @property
    def note(self) -> str:
        """What is wrong with the film's format; empty for H.264."""
        return "browsers do not play this format: pip install av (the 'video' extra)" if self._writer else ""

    def __enter__(self) -> FilmWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        if self._writer is not None:
            self._writer.release()

    def add(self, frame: np.ndarray) -> None:
        """Append an (H, W, 3) uint8 RGB picture; all get the size of the first, made even.

        Raises:
            DataError: no film can be written there.
        """
        if not self._size[0]:
            self._size = (max(frame.shape[1] // 2 * 2, 2), max(frame.shape[0] // 2 * 2, 2))
            self._open()
        if frame.shape[1::-1] != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        if self._writer is not None:
            self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            return
        from av import VideoFrame

        self._container.mux(self._stream.encode(VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))

    def _open(self) -> None:
        try:
            import av
        except ImportError:
            self._open_with_opencv()
            return
        if "libx264" not in av.codecs_available:
            self._open_with_opencv()
            return
        try:
            self._container = av.open(video_path(self.path), "w", options={"movflags": "+faststart"})
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self._stream = self._container.add_stream("libx264", Fraction(self._rate_hz).limit_denominator(1001))
        self._stream.width, self._stream.height = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "23", "preset": "veryfast"}

    def _open_with_opencv(self) -> None:
        for suffix, code in ((".mp4", "mp4v"), (".avi", "MJPG")):
            self.path = self.path.with_suffix(suffix)
            writer = cv2.VideoWriter(video_path(self.path), cv2.VideoWriter.fourcc(*code), self._rate_hz, self._size)
            if writer.isOpened():
                self._writer = writer
                return
        raise DataError(f"{self.path}: this OpenCV can write neither MP4 nor AVI there; check the folder's permissions")


def new_figure(size_in: tuple[float, float], rows: int = 1, columns: int = 1, **layout: Any) -> tuple[Any, Any]:
    """A matplotlib figure that needs no screen and belongs to nobody else, and its axes.

    Args:
        size_in: (width, height) in inches.
        rows: axes below each other.
        columns: axes beside each other.
        layout: further arguments of `Figure.subplots`.

    Returns:
        The figure, and its axes as a (rows, columns) array.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"plot: matplotlib cannot be imported ({error}); install clustvit_ros with its 'train' extra"
        ) from error
    figure = Figure(figsize=size_in, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as the path's suffix says; folders are made.

    Raises:
        ConfigError: a suffix of no picture format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # a suffix that matplotlib does not know
        raise ConfigError(f"{path}: cannot be drawn ({error})") from error
