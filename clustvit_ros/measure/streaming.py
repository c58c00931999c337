# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Streaming mIoU: what a consumer holds when it acts on a camera's frame, against the truth of that frame.

Streaming perception (Li et al., ECCV 2020, arXiv 2005.10420) scores the newest output that there is at a moment. Here
the moment is the end of a frame's period, just before the camera's next frame: a mask counts for its own frame if it is
out by then; otherwise an older one stands in, and is wrong where the world has moved on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clustvit_ros.engine import Engine, Settings
from clustvit_ros.engine.carrying import Carrier, carry
from clustvit_ros.engine.engine import Prediction
from clustvit_ros.measure.metrics import ConfusionMatrix
from clustvit_ros.measure.pictures import new_figure, save_figure
from clustvit_ros.policy import percentile

MOST_AGE = 8
"""Frames up to which the curves over age go."""


@dataclass(frozen=True)
class StreamRow:
    """One setting, as a consumer sees it; mIoU in percent.

    Args:
        merge_threshold: as set.
        token_capacity: as set; 0 is no bound.
        input_scale: as set.
        latency_ms_p50: of the engine, median.
        fresh: mIoU of the engine's masks on their own frames, as if they took no time.
        held: streaming mIoU when frames are dropped while the engine is busy.
        filled: streaming mIoU when they get carried masks.
        best: whether no other setting streams better, filled.
    """

    merge_threshold: float
    token_capacity: int
    input_scale: float
    latency_ms_p50: float
    fresh: float
    held: float
    filled: float
    best: bool = False


def sources(count: int, period_ms: float, latency_ms: float) -> tuple[list[int | None], list[int | None]]:
    """Which frame's engine mask a consumer holds for each frame.

    The engine takes the newest frame whenever it is free; a filled frame is carried when it arrives, unless the engine
    takes it then and is done before the next one comes.

    Args:
        count: frames, one per period.
        period_ms: of the camera.
        latency_ms: of the engine.

    Returns:
        For each frame, the one whose mask it gets: held (frames dropped), and filled; None before the first mask.
    """
    done: list[tuple[float, int]] = []
    free_ms, taken = 0.0, -1
    while True:
        newest = math.floor(free_ms / period_ms + 1e-9)
        frame = max(newest, taken + 1)  # a frame is taken once: else wait for the next
        if frame >= count:
            break
        free_ms = max(free_ms, frame * period_ms) + latency_ms
        taken = frame
        done.append((free_ms, frame))

    def newest_by(time_ms: float) -> int | None:
        return max((frame for at_ms, frame in done if at_ms <= time_ms + 1e-9), default=None)

    held = [newest_by((index + 1) * period_ms) for index in range(count)]
    filled = [own if own == index else newest_by(index * period_ms) for index, own in enumerate(held)]
    # What the engine made of the very first frames is out late, yet held before anything is carried.
    return held, [held[i] if source is None else source for i, source in enumerate(filled)]


def stream(
    engine: Engine, images: Sequence[np.ndarray], labels: Sequence[np.ndarray], settings: Sequence[Settings],
    rate_hz: float,
) -> list[StreamRow]:  # fmt: skip
    """What each setting is worth to a consumer of a camera.

    Args:
        engine: segments every image at every setting; its median latency is what a frame takes.
        images: (H, W, 3) uint8 RGB, consecutive frames of a drive.
        labels: (H, W) class ids of each.
        settings: what to compare.
        rate_hz: frames per second of the camera.

    Returns:
        One row per setting, in order; fewer when interrupted after the first.
    """
    num_classes, rows = len(engine.info.classes), list[StreamRow]()
    engine.warmup((images[0].shape[0], images[0].shape[1]))
    bar = tqdm(desc="streaming", total=len(settings) * len(images), unit="image", leave=False, mininterval=1.0)
    for setting in settings:
        try:
            engine.segment(images[0], setting)
            results = []
            for image in images:
                results.append(engine.segment(image, setting))
                bar.update()
        except KeyboardInterrupt:
            if not rows:
                raise
            break
        latency_ms = percentile([result.stats.total_ms for result in results], 0.5)
        held, filled = sources(len(images), 1000.0 / rate_hz, latency_ms)
        first = next((index for index, source in enumerate(held) if source is not None), len(images))
        fresh, stale, carried = (ConfusionMatrix(num_classes) for _ in range(3))
        carrier: Carrier[Prediction] = Carrier(len(images))
        for index, image in enumerate(images):
            carrier.see(index, image)
            source = filled[index]
            if source is not None and (carrier.source is None or carrier.source.number != source):
                carrier.adopt(source, results[source])
            if index < first:
                continue
            old = held[index]
            assert old is not None
            fresh.add(labels[index], results[index].mask[0])
            stale.add(labels[index], results[old].mask[0])
            followed = carrier.source
            mask = carry(followed.result, followed.motion, 0.0).mask if followed else results[old].mask
            carried.add(labels[index], mask[0])
        scores = [round(100 * float(matrix.miou()), 2) for matrix in (fresh, stale, carried)]
        rows.append(
            StreamRow(
                setting.merge_threshold, setting.token_capacity, setting.input_scale, round(latency_ms, 2), scores[0],
                scores[1], scores[2],
            )
        )  # fmt: skip
    bar.close()
    best = max(row.filled for row in rows)
    return [replace(row, best=row.filled == best) for row in rows]


def age_curves(
    images: Sequence[np.ndarray], labels: Sequence[np.ndarray], results: Sequence[Prediction], num_classes: int,
    every: int = 3,
) -> dict[str, list[float]]:  # fmt: skip
    """What a mask is worth to later frames, in percent mIoU, over its age of 0 to `MOST_AGE` frames.

    Args:
        images: (H, W, 3) uint8 RGB, consecutive frames.
        labels: (H, W) class ids of each.
        results: the engine's masks of each.
        num_classes: classes of the model.
        every: every how many frames a mask is followed.

    Returns:
        `stale` as it is, `carried` by flow, and `fresh`: the later frame's own mask.
    """
    matrices = {
        name: [ConfusionMatrix(num_classes) for _ in range(MOST_AGE + 1)] for name in ("stale", "carried", "fresh")
    }
    for start in range(0, len(images) - MOST_AGE, every):
        carrier: Carrier[Prediction] = Carrier(MOST_AGE + 1)
        for age in range(MOST_AGE + 1):
            index = start + age
            carrier.see(index, images[index])
            if age == 0:
                carrier.adopt(index, results[index])
            source = carrier.source
            carried = results[start] if source is None else carry(source.result, source.motion, 0.0)
            for name, result in (("stale", results[start]), ("carried", carried), ("fresh", results[index])):
                matrices[name][age].add(labels[index], result.mask[0])
    return {name: [round(100 * float(matrix.miou()), 2) for matrix in ages] for name, ages in matrices.items()}


def draw_ages(curves: dict[str, list[float]], rate_hz: float, title: str, path: Path) -> None:
    """Draw mIoU over a mask's age.

    Args:
        curves: as `age_curves` gives them.
        rate_hz: frames per second of the camera.
        title: what was measured.
        path: picture to write.
    """
    figure, ((axes,),) = new_figure((7, 4.2))
    styles = {"fresh": ("-", "the frame's own mask"), "carried": ("o-", "carried by flow"), "stale": ("s-", "as it is")}
    for name, (style, label) in styles.items():
        axes.plot(range(len(curves[name])), curves[name], style, label=label)
    axes.set_xlabel(f"age of the mask in frames (at {rate_hz:g} Hz, {1000 / rate_hz:.0f} ms each)")
    axes.set_ylabel("mIoU on the present frame (%)")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
