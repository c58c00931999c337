#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Draws the README's moving picture: a simulated drive while the merge threshold is turned.

Camera, mask and merged tokens (coloured), frame by frame, of a world that the model has not seen. Needs Pillow.

scripts/moving_picture.py docs/pictures/demo.webp
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.engine.masks import draw_overlay
from clustvit_ros.measure.pictures import class_legend, cluster_overlay, titled
from clustvit_ros.sim import SIM_CLASSES, SimulatedCamera

_RATE_HZ = 8.0
_THRESHOLDS = (1.0, 0.7, 0.5, 0.3, 0.1)
_PANEL = (320, 240)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="WebP to write")
    parser.add_argument("--model", default="sim_tiny", help="shipped model or model folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=3, help="of the world (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=80, help="frames, at 8 Hz (default: %(default)s)")
    args = parser.parse_args()
    engine = create_engine(args.model, device="cpu")
    camera = SimulatedCamera(args.seed, rate_hz=_RATE_HZ / 2)  # twice as fast as it drives
    legend = class_legend(SIM_CLASSES, _PANEL[1])
    pictures = []
    for index in range(args.frames):
        threshold = _THRESHOLDS[index * len(_THRESHOLDS) // args.frames]
        image = cv2.cvtColor(camera.frame(index).image, cv2.COLOR_BGR2RGB)
        prediction = engine.segment(image, Settings(threshold, clusters=True))
        assert prediction.cluster_map is not None
        stats = prediction.stats
        panels = (
            (image, "camera"),
            (draw_overlay(image, prediction.mask[0], SIM_CLASSES.palette(), 0.6), f"merge_threshold {threshold:g}"),
            (
                cluster_overlay(image, prediction.cluster_map[0]),
                f"{stats.tokens_kept:.0f} of {stats.tokens_total} tokens",
            ),
        )
        small = [titled(cv2.resize(panel, _PANEL, interpolation=cv2.INTER_AREA), title) for panel, title in panels]
        pictures.append(Image.fromarray(np.hstack([*small, legend])))
    camera.close()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(
        args.picture, save_all=True, append_images=pictures[1:], duration=round(1000 / _RATE_HZ), loop=0, quality=60,
        method=4,
    )  # fmt: skip


if __name__ == "__main__":
    main()
