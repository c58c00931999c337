#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Every way to merge on the same weights, at the same work: mIoU and time of each, as a table.

The mergeable work lies between no merging and all tokens merged in the model's own way (ALGM's where it has none). At
each share of it a way keeps as many tokens as fit. Several models are folds of one training: each is scored on the
group that stands at its place in `--group`, and means are told. Times are of the first model, all in turns. What was
scored is kept in OUT.json and not scored again.

`scripts/ways_table.py MODEL... --data DIR --out OUT [--group NAME...]`
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clustvit_ros.cli.arguments import parse_fractions, parse_names, write_variant
from clustvit_ros.engine.engine import Settings
from clustvit_ros.engine.machine import machine_name
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.measure.bench import markdown_table, median_times
from clustvit_ros.measure.evaluation import evaluate, gflops_counter
from clustvit_ros.networks.model_folder import check_folder, load_config
from clustvit_ros.networks.vit_config import MERGINGS, ViTConfig
from clustvit_ros.paths import find_model
from clustvit_ros.training.dataset import LabelledImages, group_images, joined
from clustvit_ros.training.layouts import open_data_set

_TIMED_CALLS = 15


class Row(NamedTuple):
    """A way at a share of the mergeable work, and what it keeps there."""

    way: str
    share: float
    tokens_kept: int
    gflops: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model's name or folder, or those of all folds")
    parser.add_argument("--data", type=Path, required=True, help="a data set as `train` takes it")
    parser.add_argument("--split", nargs="+", default=["val"], help="its splits (default: val)")
    parser.add_argument("--group", nargs="+", default=[], help="for each model the group of images that it held out")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md are written")
    parser.add_argument("--merge", type=parse_names, default=(), help="ways (default: all that the weights can)")
    parser.add_argument(
        "--work", type=parse_fractions, default=(0.5, 0.25, 0.125), help="shares of it (default: 0.5,0.25,0.125)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    try:
        return run(parser.parse_args(argv))
    except ClustvitError as error:
        print(f"ways_table: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    if args.group and len(args.group) != len(args.models):
        raise ConfigError(f"--group: got {len(args.group)} groups, expected one for each of {len(args.models)} models")
    models = [find_model(model) for model in args.models]
    images = _images(args, len(load_config(models[0]).classes))
    where = args.group or [" ".join(args.split)] * len(models)
    file = args.out.with_suffix(".json")
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with tempfile.TemporaryDirectory(prefix="clustvit_ways_") as folder:
        first = _ways(models[0], Path(folder, "0"), args.merge)
        rows = _rows(models[0], first, args.work)
        scores: dict[Row, list[float]] = {row: [] for row in rows}
        for index, (model, held_out) in enumerate(zip(models, images, strict=True)):
            for way, variant in (first if not index else _ways(model, Path(folder, str(index)), tuple(first))).items():
                engine = TorchEngine.from_model(variant, "cpu", args.threads)
                for row in (row for row in rows if row.way == way):
                    key = f"{model.resolve()} {way} {row.tokens_kept} {args.data.resolve()} {where[index]}"
                    if key not in known:
                        known[key] = evaluate(engine, held_out, _settings(row))["miou"]
                        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                        print(f"{args.models[index]}, {way}, {row.tokens_kept} kept: {known[key]:.2f}", flush=True)
                    scores[row].append(known[key])
        times = _times(rows, {way: TorchEngine.from_model(path, "cpu", args.threads) for way, path in first.items()})
        text = _table(rows, scores, times, args)
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _settings(row: Row) -> Settings:
    return Settings(merge_threshold=1.0, token_capacity=row.tokens_kept, confidence=False)


def _images(args: argparse.Namespace, num_classes: int) -> list[LabelledImages]:
    """What each model is scored on."""
    opened = open_data_set(args.data)
    if not args.group:
        return [joined([opened.open(split, num_classes) for split in args.split], same_classes=True)] * len(args.models)
    images = joined([opened.open(split, num_classes) for split in opened.splits], same_classes=True)
    groups = group_images(images, opened.group)
    if unknown := [name for name in args.group if name not in groups]:
        raise ConfigError(f"--group: got {unknown[0]!r}, expected of {', '.join(groups)}")
    return [images.subset(groups[name]) for name in args.group]


def _ways(model: Path, folder: Path, asked: tuple[str, ...]) -> dict[str, Path]:
    """A variant of the model for each way, no merging first.

    Raises:
        ConfigError, ModelError: a way that is asked for and that the weights cannot; others are left out.
    """
    if not isinstance(load_config(model).network, ViTConfig):
        raise ConfigError(f"{model}: is of another family than ViT and ClustViT, which merge tokens in these ways")
    found = {}
    for way in ("none", *(name for name in asked or MERGINGS if name != "none")):
        variant = folder / way
        try:
            write_variant(model, variant, {"merging": way})
            check_folder(variant)
        except ClustvitError:
            if asked:
                raise
            continue
        found[way] = variant
    return found


def _rows(model: Path, ways: dict[str, Path], shares: tuple[float, ...]) -> list[Row]:
    """What each way keeps at each share of the work; shares that it cannot come down to are left out."""
    counters = {way: gflops_counter(load_config(variant)) for way, variant in ways.items()}
    config = load_config(model)
    size = config.input.size
    total = size[0] * size[1] // config.network.patch_size**2
    own = config.network.merge_method
    most = counters["none"](size, total)
    least = counters[own if own in counters and own != "none" else "algm"](size, 1)
    rows = [Row("none", 1.0, total, most)]
    for way, share in itertools.product((way for way in ways if way != "none"), shares):
        bound, (low, high) = least + share * (most - least), (0, total + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if counters[way](size, middle) <= bound else (low, middle)
        if low:
            rows.append(Row(way, share, low, counters[way](size, low)))
    return rows


def _times(rows: list[Row], engines: dict[str, TorchEngine]) -> dict[Row, float]:
    """Median milliseconds of a call at each row, all in turns."""
    image = np.random.default_rng(0).integers(0, 256, (*engines["none"].info.input_size, 3), np.uint8)
    calls = {row: functools.partial(engines[row.way].segment, image, _settings(row)) for row in rows}
    return median_times(calls, _TIMED_CALLS)


def _table(
    rows: list[Row], scores: dict[Row, list[float]], times: dict[Row, float], args: argparse.Namespace
) -> str:  # fmt: skip
    unmerged = rows[0]
    names = args.group if len(args.group) > 1 else []
    lines = [["way", "work", "tokens kept", "GFLOPs", *names, "mean mIoU" if names else "mIoU", "time"]]
    for row in rows:
        share = "-" if row is unmerged else f"{row.share:g}"
        of_each = [f"{miou:.2f}" for miou in scores[row]] if names else []
        lines.append([
            row.way, share, f"{row.tokens_kept}", f"{row.gflops:.1f}", *of_each,
            f"{statistics.fmean(scores[row]):.2f}", f"{times[row] / times[unmerged]:.2f}",
        ])  # fmt: skip
    return "\n".join([
        f"{machine_name()}, {args.threads} thread(s), {times[unmerged]:.0f} ms with nothing merged, to which times are "
        f"relative: medians of {_TIMED_CALLS} calls in turns.", "",
        *markdown_table(lines),
    ])  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
