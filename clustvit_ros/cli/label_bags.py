"""`clustvit-ros label-bags`: many bags at once, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from clustvit_ros.bags import find_bags
from clustvit_ros.bags.fleet import DAMAGED, FAILED, LABELLED, BagOutcome, FleetOptions, label_bags
from clustvit_ros.cli.label_bag import add_label_arguments, options_of
from clustvit_ros.errors import BagError, ConfigError

_SUFFIX = "_segmentation"


def add_parser(commands: argparse._SubParsersAction) -> None:
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
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
    return _summarise(outcomes, time.monotonic() - start_s)


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


def _summarise(outcomes: list[BagOutcome], seconds: float) -> int:
    by_status = {status: [o for o in outcomes if o.status == status] for status in (LABELLED, DAMAGED, FAILED)}
    for status in (DAMAGED, FAILED):
        for outcome in by_status[status]:
            print(f"  {status}: {outcome.source}: {outcome.reason}", file=sys.stderr)
    frames = sum(outcome.frames for outcome in outcomes if not outcome.finished_before)
    counts = ", ".join(f"{len(bags)} {status}" for status, bags in by_status.items() if bags or status == LABELLED)
    workers = len({outcome.worker for outcome in outcomes})
    print(f"{counts}; {frames} images in {seconds:.1f} s by {workers} workers")
    return 0 if len(by_status[LABELLED]) == len(outcomes) else 1
