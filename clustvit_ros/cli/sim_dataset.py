"""`clustvit-ros sim-dataset`: labelled pictures of the simulated world, ready for the trainer."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from clustvit_ros.cli.arguments import parse_size


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("sim-dataset", help="labelled pictures of the simulated world, ready for the trainer")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets {train,val}/{images,labels}")
    parser.add_argument("--count", type=int, default=800, help="pictures in all (default: 800)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same files (default: 0)")
    parser.add_argument("--val-share", type=float, default=0.1, help="share for validation (default: 0.1)")
    parser.add_argument("--size", type=parse_size, default=(480, 640), help="HEIGHTxWIDTH (default: 480x640)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # Here and not above: the renderer is an extra, and its absence must not take the command's help away.
    from clustvit_ros.sim.dataset import write_dataset

    with tqdm(total=args.count, desc="render", mininterval=1.0) as progress:
        counts = write_dataset(args.out, args.count, args.seed, args.val_share, args.size, progress.update)
    print(f"{counts['train']} training and {counts['val']} validation pictures in {args.out}")
    return 0
