"""`clustvit-ros label-bag`: masks, confidence and statistics for every image of a recorded bag."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from clustvit_ros.bags import LabelOptions, LabelReport, label_bag
from clustvit_ros.bags.labelling import COMPRESSIONS, FORMATS, OUTPUT_STORAGES
from clustvit_ros.cli.arguments import parse_size
from clustvit_ros.engine import ENGINES, create_engine
from clustvit_ros.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "label-bag",
        help="label the images of a rosbag2 bag",
        description="Writes masks, confidence and statistics of every image, with the image's own stamps. Needs no "
        "ROS. Run it again to continue where it was stopped. Exit code 0: every image is labelled; 1: what could be "
        "read is labelled, and what is missing is named; 2: nothing was written.",
    )
    parser.add_argument("bag", type=Path, metavar="IN", help="rosbag2 folder, .mcap or .db3 file; it is only read")
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
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = automatic (default: 0)")
    parser.add_argument("--merge-threshold", type=float, default=0.5, help="0..1, 1 merges nothing (default: 0.5)")
    parser.add_argument("--token-capacity", type=int, default=0, help="bound on kept tokens, 0 = none (default: 0)")
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
    parser.add_argument("--restart", action="store_true", help="remove earlier output instead of continuing")


def parse_output_size(text: str) -> tuple[int, int] | str:
    """ "input", "model", or HEIGHTxWIDTH -> (height, width)."""
    return text if text in ("input", "model") else parse_size(text)


def options_of(args: argparse.Namespace) -> LabelOptions:
    """The label options among the arguments.

    Raises:
        ConfigError: a value outside its range.
    """
    return LabelOptions(
        topics=tuple(args.topic),
        merge_threshold=args.merge_threshold,
        token_capacity=args.token_capacity,
        confidence_threshold=args.confidence_threshold,
        output_size=args.output_size,
        format=args.format,
        storage=args.storage,
        compression=args.compression,
    )


def run(args: argparse.Namespace) -> int:
    options = options_of(args)
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ConfigError("label-bag needs the Python package 'tqdm'; install this package's 'bags' extra") from error
    if not args.bag.exists():
        raise ConfigError(f"{args.bag}: there is no such bag; expected a rosbag2 folder, an .mcap or a .db3 file")
    engine = create_engine(args.model, args.engine, args.device, args.threads)
    info = engine.info
    reason = f" ({info.device_reason})" if info.device_reason else ""
    print(f"{args.bag} -> {args.output}: model {info.model}, engine {info.engine} on {info.device}{reason}", flush=True)
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
        print("\nstopped; the same command continues", file=sys.stderr)
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
        print(f"  left out: {topic} {reason}")
    for topic, prefix in report.prefixes.items():
        print(f"  {topic} -> {prefix}/{{mask,confidence,stats}}")
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
