# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros label-bag` and `label-bags`: masks, confidence and statistics for every image of recorded bags.

Many bags at once go to the workers of this machine or of a Ray cluster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clustvit_ros.bags import LabelOptions, LabelReport, find_bags, label_bag
from clustvit_ros.bags.fleet import DAMAGED, FAILED, LABELLED, BagOutcome, FleetOptions, label_bags
from clustvit_ros.bags.labelling import COMPRESSIONS, FORMATS, OUTPUT_STORAGES, shown
from clustvit_ros.cli.arguments import add_merge_options, add_threads, parse_size, tell_merges_nothing
from clustvit_ros.engine import ENGINES, create_engine
from clustvit_ros.errors import BagError, ConfigError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "label-bag",
        help="label the images of a recorded bag",
        description="Writes masks, confidence and statistics of every image, with the image's own stamps. Needs no "
        "ROS. Run it again to continue where it was stopped. Exit code 0: every image is labelled; 1: what could be "
        "read is labelled, and what is missing is named; 2: nothing was written.",
    )
    parser.add_argument("bag", type=Path, metavar="IN", help="rosbag2 folder, .mcap, .db3 or ROS 1 .bag; only read")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder that gets the labels; must not exist")
    add_label_arguments(parser)
    parser.set_defaults(run=run)


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that labelling one bag and many have in common."""
    parser.add_argument(
        "--topic", action="append", default=[], metavar="NAME",
        help="image topic, raw or compressed; may be repeated (default: all that can be segmented)",
    )  # fmt: skip
    parser.add_argument(
        "--model", default="camvid_tiny", help="a shipped model or a model folder (default: camvid_tiny)"
    )
    parser.add_argument("--engine", choices=ENGINES, default="torch", help="what runs the network (default: torch)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_threads(parser, "; another number may change confidences by 1")
    add_merge_options(parser)
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.0, help="pixels below it become 255, 0..1 (default: 0)"
    )
    parser.add_argument(
        "--output-size", type=parse_output_size, default="input", metavar="input|model|HxW",
        help="size of masks: the image's, the network's, or fixed (default: input)",
    )  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="bag", help="a bag, or PNG files (default: bag)")
    parser.add_argument("--storage", choices=OUTPUT_STORAGES, default="same", help="of that bag (default: same as IN)")
    parser.add_argument("--compression", choices=COMPRESSIONS, default="none", help="of that bag (default: none)")
    parser.add_argument(
        "--restart", action="store_true", help="remove earlier output of label-bag, and nothing else, first"
    )


def parse_output_size(text: str) -> tuple[int, int] | str:
    """Parse "input", "model", or HEIGHTxWIDTH -> (height, width)."""
    return text if text in ("input", "model") else parse_size(text)


def options_of(args: argparse.Namespace) -> LabelOptions:
    """The label options among the arguments.

    Raises:
        ConfigError: a value outside its range.
    """
    return LabelOptions(
        topics=tuple(args.topic), merge_threshold=args.merge_threshold, token_capacity=args.token_capacity,
        confidence_threshold=args.confidence_threshold, output_size=args.output_size, format=args.format,
        storage=args.storage, compression=args.compression,
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    options = options_of(args)
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ConfigError("label-bag needs the Python package 'tqdm'; install this package's 'bags' extra") from error
    if not args.bag.exists():
        raise ConfigError(f"{args.bag}: there is no such bag; expected a rosbag2 folder, an .mcap, .db3 or .bag file")
    engine = create_engine(args.model, args.engine, args.device, args.threads)
    info = engine.info
    reason = f" ({info.device_reason})" if info.device_reason else ""
    told = f"engine {info.engine_told} on {info.device}{reason}"
    print(f"{args.bag} -> {args.output}: model {info.model}, {told}", flush=True)
    tell_merges_nothing(args, info.model, info.merges)
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            if done:
                print(f"continuing: {done} of {total} images are labelled already", flush=True)
            # A terminal shows a bar that moves; a log file gets a line now and then.
            pace_s = 0.2 if sys.stderr.isatty() else 10.0
            bar = tqdm(total=total, initial=done, unit="image", mininterval=pace_s, maxinterval=pace_s, file=sys.stderr)
        bar.update(done - bar.n)

    try:
        report = label_bag(args.bag, args.output, engine, options, args.restart, show)
    except KeyboardInterrupt:
        without = ", without --restart," if args.restart else ""
        print(f"\nstopped; the same command{without} continues", file=sys.stderr)
        raise
    finally:
        if bar is not None:
            bar.close()
        engine.close()
    describe(report)
    return 0 if report.complete else 1


def describe(report: LabelReport) -> None:
    """Say what was written where, and what is missing."""
    for topic, reason in report.skipped.items():
        print(f"  left out: {shown(topic)} {reason}")
    for topic, prefix in report.prefixes.items():
        print(f"  {shown(topic)} -> {prefix}/{{mask,confidence,stats}}")
    if len(report.devices) > 1:
        print(f"  computed on {' and '.join(report.devices)}: confidences of one and the other may differ by 1")
    for problem in report.problems:
        print(f"  not labelled: {problem}", file=sys.stderr)
    if report.unlabelled > len(report.problems):
        print(f"  not labelled: {report.unlabelled - len(report.problems)} more", file=sys.stderr)
    for damage in report.damage:
        print(f"  damaged: {damage}", file=sys.stderr)
    before = " (finished before)" if report.finished_before else ""
    missing = f", {report.unlabelled} not" if report.unlabelled else ""
    damaged = ", the bag is damaged" if report.damage else ""
    print(f"{report.labelled} images labelled{missing}{damaged}: {report.target}{before}")


_SUFFIX = "_segmentation"


def add_fleet_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "label-bags",
        help="label the images of many bags in parallel",
        description="Finds the bags below a pattern and labels each as label-bag does, on the workers of a Ray cluster "
        "or of this machine. Run it again to continue: finished bags are skipped. Exit code 0: every bag is labelled; "
        "1: some are not, or only in part, and are listed; 2: nothing was done.",
    )
    parser.add_argument("pattern", help="a folder, or a quoted pattern such as 'recordings/**'")
    parser.add_argument("--out", type=Path, help=f"folder for the labels, BAG{_SUFFIX} each (default: beside each bag)")
    parser.add_argument(
        "--ray", default="auto", metavar="auto|local|ADDRESS",
        help="a running cluster or else this machine, this machine, or the cluster there (default: auto)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, help="0 = one per GPU, else per CPU share (default: 0)")
    parser.add_argument("--gpus-per-worker", type=float, help="e.g. 0.5 for two workers on a GPU (default: 1 or none)")
    parser.add_argument("--cpus-per-worker", type=int, default=1, help="and threads of each (default: 1)")
    parser.add_argument("--retries", type=int, default=1, help="for bags that failed (default: 1)")
    parser.add_argument("--json", type=Path, help="write the outcome of every bag to this file")
    add_label_arguments(parser)
    parser.set_defaults(run=run_fleet)


def run_fleet(args: argparse.Namespace) -> int:
    options = options_of(args)
    fleet = FleetOptions(args.ray, args.workers, args.gpus_per_worker, args.cpus_per_worker, args.retries)
    bags = [path.absolute() for path in find_bags(args.pattern)]
    if not bags:
        raise BagError(f"{args.pattern}: no bags found; quote the pattern, e.g. 'recordings/**'")
    pairs = list(zip(bags, _targets(bags, args.out), strict=True))
    engine = {"model": _model(args.model), "engine": args.engine, "device": args.device, "threads": args.threads}
    print(f"{len(bags)} bags", flush=True)
    start_s = time.monotonic()
    ended = 0

    def show(outcome: BagOutcome) -> None:
        nonlocal ended
        ended += 1
        left_s = (time.monotonic() - start_s) / ended * (len(bags) - ended)
        what = "finished before" if outcome.finished_before else f"{outcome.frames} images in {outcome.seconds:.1f} s"
        text = f"FAILED: {outcome.reason}" if outcome.status == FAILED else f"{outcome.status}, {what}"
        print(f"[{ended}/{len(bags)}, {left_s:.0f} s left] {outcome.source}: {text}", flush=True)

    outcomes = label_bags(pairs, engine, options, fleet, args.restart, show)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n", encoding="utf-8")
    return _summarise_fleet(outcomes, time.monotonic() - start_s)


def _targets(bags: list[Path], out: Path | None) -> list[Path]:
    """Where each bag's labels go."""
    names = [f"{bag.stem if bag.is_file() else bag.name}{_SUFFIX}" for bag in bags]
    if out is None:
        targets = [bag.with_name(name) for bag, name in zip(bags, names, strict=True)]
    else:
        # Recordings of several robots may have one name: their folders tell them apart.
        base = Path(*_common_parts([bag.parent.parts for bag in bags]))
        targets = [out.absolute() / bag.parent.relative_to(base) / name for bag, name in zip(bags, names, strict=True)]
    repeated = {target for target in targets if targets.count(target) > 1}
    if repeated:
        raise ConfigError(f"several bags would be labelled into {sorted(map(str, repeated))}; rename one of them")
    return targets


def _common_parts(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return tuple(common)


def _model(name_or_path: str) -> str:
    """A path that workers find as well, whatever folder they run in."""
    path = Path(name_or_path).expanduser()
    return str(path.absolute()) if path.is_dir() else name_or_path


def _summarise_fleet(outcomes: list[BagOutcome], seconds: float) -> int:
    by_status = {status: [o for o in outcomes if o.status == status] for status in (LABELLED, DAMAGED, FAILED)}
    for status in (DAMAGED, FAILED):
        for outcome in by_status[status]:
            print(f"  {status}: {outcome.source}: {outcome.reason}", file=sys.stderr)
    frames = sum(outcome.frames for outcome in outcomes if not outcome.finished_before)
    counts = ", ".join(f"{len(bags)} {status}" for status, bags in by_status.items() if bags or status == LABELLED)
    workers = len({outcome.worker for outcome in outcomes})
    print(f"{counts}; {frames} images in {seconds:.1f} s by {workers} workers")
    return 0 if len(by_status[LABELLED]) == len(outcomes) else 1
