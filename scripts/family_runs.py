#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Accuracy against latency of systems that learnt alike, on drives that none of them saw: a table and a plot.

Takes run folders of `clustvit-ros train RECIPE --data DIR --folds group --folds-only`, those of several seeds of one
recipe together, and scores each fold's model on what it held out, at several input sizes and, where it merges, shares
of tokens kept. Latencies are of all systems in turns. What was scored is kept in OUT.json and not scored again.

`scripts/family_runs.py RUN... --data DIR --out OUT`
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clustvit_ros.cli.arguments import parse_fractions
from clustvit_ros.config import read_yaml
from clustvit_ros.engine.engine import Settings
from clustvit_ros.engine.machine import machine_name
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.measure.bench import markdown_table, median_times
from clustvit_ros.measure.evaluation import evaluate
from clustvit_ros.measure.pictures import new_figure, save_figure
from clustvit_ros.training.dataset import LabelledImages, group_images, joined
from clustvit_ros.training.layouts import open_data_set

_TIMED_CALLS = 15


class Point(NamedTuple):
    """How a system is run: side of its input relative to its own, and the share of tokens kept."""

    system: str
    scale: float
    share: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of a training by folds")
    parser.add_argument("--data", type=Path, required=True, help="the data that it was trained on, with its groups")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, OUT.md and OUT.png are written")
    parser.add_argument(
        "--input-scale", type=parse_fractions, default=(1.0, 0.75, 0.5), help="sides of the input (default: 1,0.75,0.5)"
    )
    parser.add_argument(
        "--kept", type=parse_fractions, default=(1.0, 0.5, 0.25), help="shares of tokens kept (default: 1,0.5,0.25)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    try:
        return run(parser.parse_args(argv))
    except ClustvitError as error:
        print(f"family_runs: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    file = args.out.with_suffix(".json")
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    drives = _drives(args.data)
    systems: dict[str, list[Path]] = {}
    for folder in args.runs:
        systems.setdefault(str(read_yaml(folder / "recipe.yaml").get("name")), []).append(folder)
    points: dict[Point, list[float]] = {}
    engines: dict[str, TorchEngine] = {}
    for system, folders in systems.items():
        for folder, (drive, images) in itertools.product(folders, drives.items()):
            model = folder / f"fold_{drive}" / "model"
            if not model.is_dir():
                raise ConfigError(f"{model}: is not there; expected the run of a training by folds that has ended")
            engine = TorchEngine.from_model(model, "cpu", args.threads)
            engines.setdefault(system, engine)
            for point in _points(system, engine, args):
                key = f"{folder.resolve()} {drive} {point.scale:g} {point.share:g}"
                if key not in known:
                    known[key] = evaluate(engine, images, _settings(engine, point))["miou"]
                    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                    print(f"{system} on {drive}, {point.scale:g}, {point.share:.0%} kept: {known[key]:.2f}", flush=True)
                points.setdefault(point, []).append(known[key])
    latencies = _latencies(engines, list(points), next(iter(drives.values()))[0].image)
    first = next(iter(points))
    rows = [["system", "input", "tokens kept", *(f"{drive}" for drive in drives), "mean", "spread", "time"]]
    for point, mious in points.items():
        of_drives = [statistics.fmean(mious[index :: len(drives)]) for index in range(len(drives))]
        of_seeds = [statistics.fmean(mious[start : start + len(drives)]) for start in range(0, len(mious), len(drives))]
        spread = f"{max(of_seeds) - min(of_seeds):.1f}" if len(of_seeds) > 1 else "-"
        rows.append([
            point.system, f"{point.scale:g}", f"{point.share:.0%}", *(f"{miou:.1f}" for miou in of_drives),
            f"{statistics.fmean(mious):.1f}", spread, f"{latencies[point] / latencies[first]:.2f}",
        ])  # fmt: skip
    text = "\n".join([
        f"{machine_name()}, {args.threads} thread(s), {latencies[first]:.0f} ms for the first row's network, to which "
        f"times are relative: medians of {_TIMED_CALLS} calls in turns. Spread: between the means of seeds.", "",
        *markdown_table(rows),
    ])  # fmt: skip
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    times = {point: ms / latencies[first] for point, ms in latencies.items()}
    _draw(points, times, first, args.out.with_suffix(".png"))
    print(text)
    return 0


def _drives(data: Path) -> dict[str, LabelledImages]:
    """The images of each group, of all splits."""
    opened = open_data_set(data)
    if not opened.group or opened.classes is None:
        raise ConfigError(f"{data}: says no classes or no group, expected both in its dataset.yaml")
    parts = [opened.open(name, len(opened.classes)) for name in ("train", "val")]
    images = joined(parts, same_classes=True)
    return {name: images.subset(indices) for name, indices in group_images(images, opened.group).items()}


def _points(system: str, engine: TorchEngine, args: argparse.Namespace) -> Iterator[Point]:
    merges = len(engine.capacities(engine.info.input_size)) > 1
    for scale in args.input_scale:
        for share in args.kept if merges else (1.0,):
            yield Point(system, scale, share)


def _settings(engine: TorchEngine, point: Point) -> Settings:
    tokens_total = engine.capacities(engine.info.input_size, point.scale)[-1]
    capacity = max(round(point.share * tokens_total), 1)
    return Settings(merge_threshold=1.0, token_capacity=capacity, input_scale=point.scale, confidence=False)


def _latencies(engines: dict[str, TorchEngine], points: list[Point], image: Any) -> dict[Point, float]:
    """Median milliseconds of a call at each point, all in turns."""
    calls = {}
    for point in points:
        engine = engines[point.system]
        calls[point] = functools.partial(engine.segment, image, _settings(engine, point))
    return median_times(calls, _TIMED_CALLS)


def _draw(points: dict[Point, list[float]], times: dict[Point, float], first: Point, path: Path) -> None:
    figure, ((axes,),) = new_figure((7.0, 4.5))
    for system, share in dict.fromkeys((point.system, point.share) for point in points):
        line = sorted((times[p], statistics.fmean(mious)) for p, mious in points.items() if p[::2] == (system, share))
        axes.plot(*zip(*line, strict=True), marker="o", label=f"{system}, {share:.0%} kept" if share < 1 else system)
    axes.set_xlabel(f"time, relative to {first.system}")
    axes.set_ylabel("mIoU on drives held out")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(main())
