# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros tune`: accuracy against latency for every input size and merge setting, as a picture and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from clustvit_ros.cli.arguments import (
    add_input_scale,
    add_threads,
    refuse_other_data,
    refuse_shipped,
    tell_merges_nothing,
)
from clustvit_ros.cli.evaluate import open_labelled
from clustvit_ros.demo.frame_source import sim_seed
from clustvit_ros.engine import Engine, Settings, create_engine
from clustvit_ros.engine.choice import fastest, is_disturbed, measure, store
from clustvit_ros.errors import ConfigError
from clustvit_ros.images import read_image
from clustvit_ros.measure.streaming import MOST_AGE, age_curves, draw_ages, stream
from clustvit_ros.measure.sweep import (
    Rung,
    draw_sweep,
    ladder_rungs,
    ladder_settings,
    measured_points,
    suggest,
    sweep,
    sweep_table,
)
from clustvit_ros.networks.model_folder import (
    MeasuredPoint,
    check_points,
    load_config,
    save_config,
)
from clustvit_ros.paths import MODEL_FILE, find_model, new_run_folder
from clustvit_ros.training.dataset import LabelledImages, find_images

_DEFAULT_LIMIT = 50
_STREAM_LIMIT = 60
_RUNS = Path("runs") / "tune"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("tune", help="what smaller inputs and merging cost and save on your images, drawn")
    parser.add_argument("--model", required=True, help="a shipped model's name or a model folder")
    parser.add_argument("--images", type=Path, help="folder of images, or sim:SEED, a simulated drive with its labels")
    parser.add_argument("--labels", type=Path, help="folder of labels; without it, agreement with the full result")
    parser.add_argument("--data", type=Path, help="a data set as `train` takes it, instead of --images and --labels")
    parser.add_argument("--split", help="split of --data (default: val)")
    parser.add_argument("--budget-ms", type=float, help="suggest a setting for this latency (p95)")
    parser.add_argument("--merge-threshold", type=float, default=0.5, help="the current setting, marked in the picture")
    parser.add_argument("--token-capacity", type=int, default=0, help="likewise (default: 0, no bound)")
    add_input_scale(parser)
    parser.add_argument(
        "--streaming", type=float, nargs="?", const=30.0, metavar="HZ",
        help="the images are consecutive frames of a camera (default: 30 Hz): which setting is best for whoever acts "
        "on the newest mask, with frames dropped and with fill_frames",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int,
        help=f"use so many images, evenly chosen (default: {_DEFAULT_LIMIT}; with --write, all), or the first "
        f"{_STREAM_LIMIT} with --streaming, which needs more than {MOST_AGE}",
    )  # fmt: skip
    parser.add_argument(
        "--engines", action="store_true",
        help="measure which engine and precision is fastest on this CPU and keeps 99.5 %% of the pixels, and have "
        "`auto` take it from then on; --images without labels will do",
    )  # fmt: skip
    parser.add_argument("--engine", default="torch", help="torch or onnxruntime (default: torch)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_threads(parser)
    parser.add_argument(
        "--write", action="store_true",
        help="write the operating points with their accuracy into the model's model.yaml, for latency budgets to go by",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help=f"write all rows to this file (default: {_RUNS}/<n>/tune.json)")
    parser.add_argument("--plot", type=Path, help=f"the picture (default: {_RUNS}/<n>/tune.png)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit: got {args.limit}, expected at least 1 image")
    refuse_other_data(args)
    if args.labels is not None and sim_seed(str(args.images)) is not None:
        raise ConfigError(f"--labels: got {args.labels} for --images {args.images}, which has its own; leave it out")
    if args.write and args.labels is None and args.data is None:
        raise ConfigError("--write: expected labelled images, --data or --labels: without labels there is no accuracy")
    if args.write:
        refuse_shipped([args.model], "--write")
    if args.streaming is not None and not 0 < args.streaming <= 1000:
        raise ConfigError(f"--streaming: got {args.streaming:g} Hz, expected above 0 and at most 1000")
    if args.streaming is not None and args.write:
        raise ConfigError("--streaming, --write: expected one of them; operating points are measured on single images")
    if args.engines and (args.streaming is not None or args.write or args.device not in ("auto", "cpu")):
        raise ConfigError("--engines: measures a CPU and keeps the result; leave out --streaming, --write and --device")
    if args.engines:
        return _choose_engine(args)
    config = load_config(args.model)
    tell_merges_nothing(args, config.name, config.network.merges)
    current = Settings(1.0, confidence=False, input_scale=args.input_scale)
    if config.network.merges:
        current = dataclasses.replace(current, merge_threshold=args.merge_threshold, token_capacity=args.token_capacity)
    engine = create_engine(args.model, args.engine, args.device, args.threads)
    images, labels = _load(args, engine.info.classes.names)
    image_size = (images[0].shape[0], images[0].shape[1])
    rungs = ladder_rungs(config)
    if args.streaming is not None:
        return _stream(args, engine, images, labels, [rung.settings(engine, image_size) for rung in rungs], current)
    merging = ladder_settings(engine.capacities(image_size)[-1]) if config.network.merges else []
    named = {rung.settings(engine, image_size): rung for rung in rungs}
    chosen = named.get(current, current)
    settings: list[Settings | Rung] = list(dict.fromkeys([*(s for s in merging if s not in named), *rungs, chosen]))
    rows = sweep(engine, images, labels, settings)
    measure = "mIoU" if labels is not None else "agreement with the full result"
    suggestion = suggest(rows, args.budget_ms) if args.budget_ms else None
    print(sweep_table(rows, measure, suggestion, args.budget_ms))
    picture = _report(
        args, engine, images=len(images), measure=measure, budget_ms=args.budget_ms,
        suggestion=asdict(suggestion) if suggestion else None, rows=[asdict(row) for row in rows],
    )  # fmt: skip
    title = f"{engine.info.model} on {engine.info.device}, {len(images)} images"
    draw_sweep(rows, rows[settings.index(chosen)], suggestion, args.budget_ms, measure, title, picture)
    print(f"picture in {picture}")
    if args.write:
        measured = [rows[settings.index(rung)] for rung in rungs]
        print(_write(args.model, measured_points(rungs, measured, config)))
    return 0


def _stream(
    args: argparse.Namespace, engine: Engine, images: list[np.ndarray], labels: list[np.ndarray] | None,
    settings: list[Settings], current: Settings,
) -> int:  # fmt: skip
    """Compare settings as a consumer of a camera sees them, and draw what age does to masks; the exit code."""
    if labels is None:
        raise ConfigError("--streaming: expected labels for every frame: --labels, --data or --images sim:SEED")
    sizes = {image.shape for image in images}
    if len(sizes) > 1 or len(images) <= MOST_AGE:
        raise ConfigError(
            f"--streaming: got {len(images)} images of {len(sizes)} sizes, expected more than {MOST_AGE} consecutive "
            "frames of one camera"
        )
    wanted = list(dict.fromkeys([current, *settings]))
    rows = stream(engine, images, labels, wanted, args.streaming)
    print(f"{'scale':>6}{'threshold':>11}{'capacity':>10}{'p50 ms':>9}{'fresh':>8}{'dropped':>9}{'filled':>8}")
    for row in sorted(rows, key=lambda row: -row.filled):
        text = f"{row.input_scale:>6g}{row.merge_threshold:>11g}{row.token_capacity:>10}{row.latency_ms_p50:>9.1f}"
        print(f"{text}{row.fresh:>8.2f}{row.held:>9.2f}{row.filled:>8.2f}{'  best, filled' if row.best else ''}")
    dropped = max(rows, key=lambda row: row.held)
    print(
        f"without fill_frames, the best is input_scale {dropped.input_scale:g}, merge_threshold "
        f"{dropped.merge_threshold:g}, token_capacity {dropped.token_capacity} ({dropped.held:.2f})"
    )
    if len(rows) < len(wanted):
        print(f"interrupted after {len(rows)} of {len(wanted)} settings; nothing is written")
        return 130
    curves = age_curves(images, labels, [engine.segment(image, current) for image in images], len(engine.info.classes))
    facts = {"images": len(images), "rate_hz": args.streaming, "rows": [asdict(row) for row in rows]}
    picture = _report(args, engine, **facts, miou_over_age=curves)
    title = f"{engine.info.model} on {engine.info.device}, {len(images)} frames of {args.images or args.data}"
    draw_ages(curves, args.streaming, title, picture)
    print(f"picture in {picture}")
    return 0


def _choose_engine(args: argparse.Namespace) -> int:
    """Measure engines side by side, and keep the result if nothing disturbed it; exit code 1 where something did."""
    config = load_config(args.model)
    images, _ = _load(args, config.classes.names)
    images = [image for image in images if image.shape == images[0].shape]

    def make(engine: str, precision: str) -> Engine:
        return create_engine(args.model, engine, "cpu", args.threads, precision)

    rows, problems, cores = measure(make, images)
    print(f"{'engine':<14}{'precision':<11}{'p50 ms':>8}{'of float32':>12}{'equal pixels':>14}, {len(images)} images")
    for row in rows:
        share = f"{row.share:>12.2f}{100 * row.equal:>12.2f} %"
        print(f"{row.engine:<14}{row.precision:<11}{row.latency_ms:>8.1f}{share}")
    for name, problem in problems.items():
        print(f"{name}: {problem}")
    if is_disturbed(cores):
        print(f"not kept: other processes used {cores:.1f} cores meanwhile; try again when the machine is quiet")
        return 1
    path = store(args.model, args.threads, rows)
    best = fastest(rows) or rows[0]
    print(f"engine and precision `auto` take {best.engine} in {best.precision} from now on ({path})")
    return 0


def _report(args: argparse.Namespace, engine: Engine, **facts: Any) -> Path:
    """Write all rows where they are wanted, or beside a picture that has no other place; returns the picture's path."""
    picture, rows = args.plot, args.json
    if picture is None:
        folder = new_run_folder(_RUNS)
        picture, rows = folder / "tune.png", rows or folder / "tune.json"
    if rows:
        about = {"model": engine.info.model, "engine": engine.info.engine, "device": engine.info.device}
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text(json.dumps({**about, **facts}, indent=2) + "\n", encoding="utf-8")
    return picture


def _load(
    args: argparse.Namespace, class_names: tuple[str, ...]
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    limit = args.limit or (None if args.write else _STREAM_LIMIT if args.streaming else _DEFAULT_LIMIT)
    seed = sim_seed(str(args.images))
    if seed is not None:
        return _drive(seed, args.streaming or 1.0, limit or _DEFAULT_LIMIT, class_names)
    if args.data is not None:
        data = open_labelled(args.data, args.split or "val", class_names, args.model)
    elif args.images is None:
        raise ConfigError("tune: expected --images, with or without --labels, or --data")
    elif args.labels is None:
        paths = list(find_images(args.images).values())
        return [read_image(paths[i]) for i in _evenly(len(paths), limit)], None
    else:
        data = LabelledImages(args.images, args.labels, len(class_names))
    chosen = range(min(len(data), limit or len(data))) if args.streaming else _evenly(len(data), limit)
    samples = [data[i] for i in chosen]
    return [sample.image for sample in samples], [sample.labels for sample in samples]


def _drive(
    seed: int, rate_hz: float, count: int, class_names: tuple[str, ...]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    from clustvit_ros.sim import SIM_CLASSES, SimulatedCamera  # says what is missing where the renderer is

    if class_names != SIM_CLASSES.names:
        raise ConfigError(
            f"--images sim: the model has {', '.join(class_names)}, expected one of the simulated world's classes "
            f"({', '.join(SIM_CLASSES.names)})"
        )
    camera = SimulatedCamera(seed, rate_hz=rate_hz)
    frames = [camera.frame(index) for index in range(count)]
    camera.close()
    labels = [frame.labels for frame in frames if frame.labels is not None]
    return [np.ascontiguousarray(frame.image[..., ::-1]) for frame in frames], labels


def _evenly(count: int, limit: int | None) -> list[int]:
    chosen = min(count, limit or count)
    return [i * count // chosen for i in range(chosen)]


def _write(model: str, points: tuple[MeasuredPoint, ...]) -> str:
    """Put points into a model's configuration, if it can be read with them; says what was written."""
    folder = find_model(model)
    config = load_config(folder)  # as it is now: measuring took minutes, in which it may have been edited
    check_points(points, config.input.size, config.network, str(folder / MODEL_FILE))
    save_config(folder, dataclasses.replace(config, operating_points=points))
    return f"{len(points)} operating points written to {folder / MODEL_FILE}"
