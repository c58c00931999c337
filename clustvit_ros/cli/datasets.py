# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros convert-labels`: labels of COCO and labelme as `train` takes them.

And `clustvit-ros sim-dataset`: labelled pictures of the simulated world.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from clustvit_ros.cli.arguments import parse_size
from clustvit_ros.errors import ConfigError, printable
from clustvit_ros.training.conversion import VOID, convert_labels

_PROBLEMS_TOLD = 10


def add_convert_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert-labels",
        help="labels of COCO and labelme to PNGs of class ids, ready for the trainer",
        description="Writes OUT/dataset.yaml and OUT/{train,val}/{images,labels}, which `train --data OUT` takes. A "
        "name with train, val or test in it (instances_val2017.json, a folder valid/) says the split; without, every "
        "tenth image is for validation. Exit code 1: some images could not be converted; they are listed.",
    )
    parser.add_argument(
        "source", nargs="+", type=Path, metavar="SOURCE",
        help="COCO's JSON file (instances, stuff, panoptic; polygons and run lengths), or a folder of labelme's files",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--images", type=Path, help="folder of a COCO file's images (default: looked for beside it)")
    parser.add_argument(
        "--classes", default="", metavar="NAME,...",
        help="these classes, in this order; others count as not labelled (default: all that occur)",
    )  # fmt: skip
    parser.add_argument(
        "--background", default="background", metavar="NAME",
        help=f"class of pixels that are not labelled, or {VOID}: they are no class (default: background)",
    )  # fmt: skip
    parser.add_argument(
        "--val-every", type=int, default=10, metavar="N",
        help="where no name says the split, every Nth image, or the last, is for validation, 0 = none (default: 10)",
    )  # fmt: skip
    parser.add_argument("--copy", action="store_true", help="copy images; else OUT links to them where they are")
    parser.set_defaults(run=convert)


def convert(args: argparse.Namespace) -> int:
    if args.val_every < 0 or args.val_every == 1:
        raise ConfigError(f"--val-every: got {args.val_every}, expected 0 (none), or 2 or more: some must be learnt")
    classes = [name.strip() for name in args.classes.split(",") if name.strip()]
    done = convert_labels(
        args.source, args.out, args.images, classes, args.background, args.val_every, args.copy,
        lambda images: tqdm(images, desc="convert", unit="image", mininterval=0.5),
    )  # fmt: skip
    for problem in done.problems[:_PROBLEMS_TOLD]:
        print(f"  left out: {printable(problem)}", file=sys.stderr)
    if len(done.problems) > _PROBLEMS_TOLD:
        print(f"  left out: {len(done.problems) - _PROBLEMS_TOLD} images more", file=sys.stderr)
    for kind, count in done.left_out.items():
        print(f"  left out: {count} {printable(kind)}")
    if done.missing:
        print(
            f"warning: no pixel of {', '.join(done.missing)} in training images, which train refuses: give more images "
            "to training (--val-every), or choose classes (--classes)", file=sys.stderr,
        )  # fmt: skip
    counts = ", ".join(f"{count} for {split}" for split, count in done.counts.items())
    print(f"{len(done.classes)} classes: {', '.join(done.classes[:20])}{', ...' if len(done.classes) > 20 else ''}")
    # Without validation images, folds score what is learnt.
    learnt = done.counts.get("train", 0)
    folds = f" --folds {min(learnt, 4)}" if learnt > 1 and not done.counts.get("val") else ""
    print(f"{counts} in {args.out}; next: clustvit-ros train finetune --data {args.out}{folds}")
    return int(bool(done.problems))


def add_sim_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("sim-dataset", help="labelled pictures of the simulated world, ready for the trainer")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets {train,val}/{images,labels}")
    parser.add_argument("--count", type=int, default=800, help="pictures in all (default: 800)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same files (default: 0)")
    parser.add_argument("--val-share", type=float, default=0.1, help="share for validation (default: 0.1)")
    parser.add_argument("--size", type=parse_size, default=(480, 640), help="HEIGHTxWIDTH (default: 480x640)")
    parser.set_defaults(run=simulate)


def simulate(args: argparse.Namespace) -> int:
    # Here and not above: the renderer is an extra, and its absence must not take the command's help away.
    from clustvit_ros.sim.camera import write_dataset

    with tqdm(total=args.count, desc="render", mininterval=1.0) as progress:
        counts = write_dataset(args.out, args.count, args.seed, args.val_share, args.size, progress.update)
    print(f"{counts['train']} training and {counts['val']} validation pictures in {args.out}")
    return 0
