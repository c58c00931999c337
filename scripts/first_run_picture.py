#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Draws the README's picture of the simulated world: camera, truth, prediction, merged tokens.

scripts/first_run_picture.py docs/pictures/first_run.jpg --seeds 3 5 12
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.images import Sample
from clustvit_ros.measure.pictures import comparison
from clustvit_ros.sim import SIM_CLASSES, SimulatedCamera


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="JPEG to write")
    parser.add_argument("--model", default="sim_tiny", help="shipped model or model folder (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 12], help="one row each (default: 3 5 12)")
    parser.add_argument("--second", type=int, default=10, help="of the drive (default: %(default)s)")
    args = parser.parse_args()
    engine = create_engine(args.model, device="cpu")
    rows = []
    for seed in args.seeds:
        camera = SimulatedCamera(seed, rate_hz=1.0)
        frame = camera.frame(args.second)
        camera.close()
        assert frame.labels is not None
        sample = Sample(cv2.cvtColor(frame.image, cv2.COLOR_BGR2RGB), frame.labels, str(seed))
        rows.append(comparison(sample, engine.segment(sample.image, Settings(clusters=True)), SIM_CLASSES.palette()))
    picture = cv2.resize(np.vstack(rows), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(args.picture), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85]):
        raise SystemExit(f"{args.picture}: cannot be written")


if __name__ == "__main__":
    main()
