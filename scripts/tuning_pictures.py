#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Draws the pictures of docs/tuning.md from a model and labelled images.

scripts/tuning_pictures.py --model camvid_tiny --data ../shared/data/camvid/val
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from clustvit_ros.cli.main import main as clustvit_ros
from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.images import list_images
from clustvit_ros.measure.pictures import cluster_overlay

_THRESHOLDS = (1.0, 0.5, 0.2)
_WIDTH_PX = 300
_LARGEST_BYTES = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="camvid_tiny", help="a shipped model or a model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--budget-ms", type=float, help="drawn into the curve, with the setting that keeps it")
    parser.add_argument("--limit", type=int, default=30, help="images for the curve (default: 30)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    strip = args.output / "merging.jpg"
    picture = merging(args.model, list_images(args.data / "images"))
    cv2.imwrite(str(strip), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    curve = args.output / "tune.png"
    command = ["tune", "--model", args.model, "--images", f"{args.data}/images", "--labels", f"{args.data}/labels"]
    command += ["--limit", f"{args.limit}", "--plot", str(curve), "--json", str(curve.with_suffix(".json"))]
    code = clustvit_ros(command + (["--budget-ms", f"{args.budget_ms:g}"] if args.budget_ms else []))
    if code:
        raise SystemExit(code)
    for path in (strip, curve):
        print(f"{path}: {path.stat().st_size} bytes")
        if path.stat().st_size > _LARGEST_BYTES:
            raise SystemExit(f"{path} is larger than {_LARGEST_BYTES} bytes; make it smaller")


def merging(model: str, images: list[Path]) -> np.ndarray:
    """Rows of images; by threshold, what was merged (tinted) above the mask that came of it."""
    engine = create_engine(model)
    palette = engine.info.classes.palette()
    rows = []
    for path in (images[len(images) // 5], images[3 * len(images) // 4]):
        image = cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        columns = []
        for threshold in _THRESHOLDS:
            prediction = engine.segment(image, Settings(threshold, clusters=True))
            stats = prediction.stats
            assert prediction.cluster_map is not None
            merged = _small(cluster_overlay(image, prediction.cluster_map[0]))
            share = 100.0 * stats.tokens_kept / stats.tokens_total
            _write(merged, f"merge_threshold {threshold:g}: {share:.0f} % of tokens kept")
            columns.append(np.vstack([merged, _small(palette[prediction.mask[0]])]))
        rows.append(np.hstack(columns))
    return np.vstack(rows)


def _small(image: np.ndarray) -> np.ndarray:
    height = round(image.shape[0] * _WIDTH_PX / image.shape[1])
    return cv2.resize(image, (_WIDTH_PX, height), interpolation=cv2.INTER_AREA)


def _write(image: np.ndarray, text: str) -> None:
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(image, text, (5, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, thickness, cv2.LINE_AA)


if __name__ == "__main__":
    main()
