# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros tune`: accuracy against latency for every merge setting, as a picture and as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from clustvit_ros.cli.arguments import add_threads
from clustvit_ros.engine import Engine, Settings, create_engine
from clustvit_ros.errors import ConfigError
from clustvit_ros.images import read_image
from clustvit_ros.measure.sweep import draw_sweep, ladder_settings, suggest, sweep, sweep_table
from clustvit_ros.training.dataset import LabelledImages, find_images


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("tune", help="what merging costs and saves on your images, drawn")
    parser.add_argument("--model", required=True, help="a shipped model's name or a model folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--labels", type=Path, help="folder of labels; without it, agreement with the unmerged result")
    parser.add_argument("--budget-ms", type=float, help="suggest a setting for this latency (p95)")
    parser.add_argument("--merge-threshold", type=float, default=0.5, help="the current setting, marked in the picture")
    parser.add_argument("--token-capacity", type=int, default=0, help="likewise (default: 0, no bound)")
    parser.add_argument("--limit", type=int, default=50, help="use so many images, evenly chosen (default: 50)")
    parser.add_argument("--engine", default="torch", help="torch or onnxruntime (default: torch)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_threads(parser)
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--plot", type=Path, default=Path("tune.png"), help="the picture (default: tune.png)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.limit < 1:
        raise ConfigError(f"--limit: got {args.limit}, expected at least 1 image")
    current = Settings(args.merge_threshold, args.token_capacity, confidence=False)
    engine = create_engine(args.model, args.engine, args.device, args.threads)
    images, labels = _load(args, len(engine.info.classes))
    settings = _settings(engine, images[0])
    if current not in settings:
        settings.append(current)
    rows = sweep(engine, images, labels, settings)
    measure = "mIoU" if labels is not None else "agreement with the unmerged result"
    suggestion = suggest(rows, args.budget_ms) if args.budget_ms else None
    print(sweep_table(rows, measure, suggestion, args.budget_ms))
    if args.json:
        report = {
            "model": engine.info.model, "engine": engine.info.engine, "device": engine.info.device,
            "images": len(images), "measure": measure, "budget_ms": args.budget_ms,
            "suggestion": asdict(suggestion) if suggestion else None, "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    title = f"{engine.info.model} on {engine.info.device}, {len(images)} images"
    draw_sweep(rows, rows[settings.index(current)], suggestion, args.budget_ms, measure, title, args.plot)
    print(f"picture in {args.plot}")
    return 0


def _load(args: argparse.Namespace, num_classes: int) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    if args.labels is None:
        paths = list(find_images(args.images).values())
        return [read_image(paths[i]) for i in _evenly(len(paths), args.limit)], None
    data = LabelledImages(args.images, args.labels, num_classes)
    samples = [data[i] for i in _evenly(len(data), args.limit)]
    return [sample.image for sample in samples], [sample.labels for sample in samples]


def _evenly(count: int, limit: int) -> list[int]:
    chosen = min(count, limit)
    return [i * count // chosen for i in range(chosen)]


def _settings(engine: Engine, image: np.ndarray) -> list[Settings]:
    return ladder_settings(engine.segment(image).stats.tokens_total)
