# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A demo as a film and as one picture: camera, mask, clusters, and latency against the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from clustvit_ros.classes import ClassSet
from clustvit_ros.errors import DataError
from clustvit_ros.images import read_image, read_stored, write_image
from clustvit_ros.measure.pictures import FilmWriter, class_legend, cluster_overlay, new_figure, titled

if TYPE_CHECKING:
    from clustvit_ros.demo.sim_demo import Phase

_PANEL_WIDTH = 480


def write_film(
    path: Path, phases: Sequence[Phase], frames: Sequence[dict[str, Any]], folder: Path, classes: ClassSet,
    rate_hz: float,
) -> Path:  # fmt: skip
    """Write an MP4 of every frame from the first phase on: camera, mask, clusters, the latency so far, and a legend.

    Args:
        phases: what was set when.
        frames: frames of the recording; those without a picture, mask or clusters are left out.
        folder: what their file names are relative to.
        classes: classes of the masks.
        rate_hz: frames per second.

    Returns:
        The file's path: an AVI where no MP4 can be written.

    Raises:
        DataError: no film can be written there.
    """
    begin_ns = phases[0].facts["after_ns"]  # before, the node was warming up and calibrating
    complete = [frame for frame in frames if all(frame[key] for key in ("image", "mask", "clusters", "stats"))]
    shown = [frame for frame in complete if frame["stamp_ns"] > begin_ns]
    if not shown:
        raise DataError(f"{path}: no frame with picture, mask and clusters was recorded; is the machine overloaded?")
    times_s = _times(shown, shown)
    size = _panel_size(shown[0], folder)
    chart, left_px, right_px = _chart(phases, shown, size, 96)
    legend = class_legend(classes, 2 * size[1])
    with FilmWriter(path, rate_hz) as writer:
        for frame, time_s in zip(shown, times_s, strict=True):
            phase = next((p for p in phases if frame["stamp_ns"] <= p.facts["until_ns"]), phases[-1])
            image, mask, clusters = panels(frame, phase.title, folder, classes)
            progress = chart.copy()
            x = round(left_px + (right_px - left_px) * time_s / max(times_s[-1], 1e-9))
            cv2.line(progress, (x, 24), (x, size[1] - 40), (220, 30, 30), 2)
            whole = np.vstack([np.hstack([image, mask]), np.hstack([clusters, progress])])
            writer.add(np.hstack([whole, legend]))
    return writer.path


def write_summary(path: Path, phases: Sequence[Phase], folder: Path, classes: ClassSet) -> None:
    """Write one moment of the drive under every setting, and the latencies below: a PNG.

    Args:
        phases: with their frames.
        folder: what file names are relative to.
        classes: classes of the masks.
    """
    # The drive starts over for every phase: the same moment has the same name.
    common = set.intersection(*({frame["name"] for frame in phase.frames} for phase in phases))
    names = sorted(common) or [frame["name"] for frame in phases[0].frames]
    moment = int(names[len(names) // 2][-6:])
    rows = []
    for phase in phases:
        frame = min(phase.frames, key=lambda frame: abs(int(frame["name"][-6:]) - moment))
        score = "" if phase.miou is None else f", mIoU {phase.miou:.1f}"
        camera = f"camera; budget {phase.verdict}" if phase.verdict else "camera"
        rows.append(np.hstack(panels(frame, phase.title + score, folder, classes, camera)))
    frames = [frame for phase in phases for frame in phase.frames]
    chart, _, _ = _chart(phases, frames, (rows[0].shape[1], 420), 120)
    write_image(path, np.vstack([*rows, chart]))


def panels(
    frame: dict[str, Any], title: str, folder: Path, classes: ClassSet, camera_title: str = "camera"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Camera, mask over it, and clusters over it, each with a title: (H, 480, 3) uint8 RGB."""
    stats = frame["stats"]
    size = _panel_size(frame, folder)
    image = cv2.resize(read_image(folder / frame["image"]), size, interpolation=cv2.INTER_AREA)
    mask, clusters = (
        cv2.resize(read_stored(folder / frame[key]), size, interpolation=cv2.INTER_NEAREST)
        for key in ("mask", "clusters")
    )
    tinted = cv2.addWeighted(image, 0.4, classes.palette()[mask], 0.6, 0)
    cost = (
        f"{float(stats['tokens_kept']):.0f} of {stats['tokens_total']} tokens at {stats['input_size']}, "
        f"{float(stats['engine_ms']):.0f} ms"
    )
    return (
        titled(image, camera_title), titled(tinted, title), titled(cluster_overlay(image, clusters), cost),
    )  # fmt: skip


def _panel_size(frame: dict[str, Any], folder: Path) -> tuple[int, int]:
    """(width, height) of a panel with the aspect of the frame's picture."""
    height, width = read_image(folder / frame["image"]).shape[:2]
    return _PANEL_WIDTH, max(round(_PANEL_WIDTH * height / width), 160)


def _chart(
    phases: Sequence[Phase], frames: Sequence[dict[str, Any]], size: tuple[int, int], dpi: int
) -> tuple[np.ndarray, int, int]:
    """Latency over time: (H, W, 3) uint8 RGB, and the columns of its first and last moment."""
    figure, ((axes,),) = new_figure((size[0] / dpi, size[1] / dpi))
    figure.set_dpi(dpi)
    times_s = _times(frames, frames)
    engine_ms = np.array([float(frame["stats"]["engine_ms"]) for frame in frames])
    axes.plot(times_s, engine_ms, ".", color="tab:blue", markersize=3, label="engine")
    label = "budget"
    top = 1.35 * float(np.percentile(engine_ms, 98))
    for phase in phases:
        if not phase.frames:
            continue
        start_s, end_s = _times([phase.frames[0], phase.frames[-1]], frames)
        axes.axvspan(start_s, end_s, color="0.93", zorder=0)
        if "budget_ms" in phase.facts:
            axes.plot([start_s, end_s], [phase.facts["budget_ms"]] * 2, color="tab:red", label=label)
            label = ""
        name = f"{100 * phase.facts['share']:.0f} %" if "share" in phase.facts else phase.name
        score = ("" if phase.miou is None else f"\n{phase.miou:.1f}") + f"\n{phase.verdict.partition(',')[0]}"
        axes.text((start_s + end_s) / 2, top * 0.98, name + score, ha="center", va="top", fontsize=7)
    axes.set_ylim(0, top)
    axes.set_xlim(times_s[0], times_s[-1])
    axes.set_xlabel("seconds; below each setting its mIoU" if len(phases) > 1 else "seconds", fontsize=7)
    axes.set_ylabel("milliseconds", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.legend(loc="lower left", fontsize=7)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    left, right = (round(axes.transData.transform((moment, 0))[0]) for moment in (times_s[0], times_s[-1]))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), left, right


def _times(frames: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> np.ndarray:
    """Seconds of frames since the first of `reference`."""
    return np.array([frame["stamp_ns"] - reference[0]["stamp_ns"] for frame in frames]) / 1e9
