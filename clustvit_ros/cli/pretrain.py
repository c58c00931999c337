# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros pretrain`: an encoder from images without labels."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from clustvit_ros.classes import ClassEntry
from clustvit_ros.cli.arguments import EXIT_TIME_UP, add_training_options, prepare
from clustvit_ros.cli.train import overridden, run_options
from clustvit_ros.engine.network_engine import select_device
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.images import read_image
from clustvit_ros.paths import find_recipe
from clustvit_ros.training.dataset import BadFile, find_images, list_findings
from clustvit_ros.training.distributed import processes
from clustvit_ros.training.loop import TimeUp
from clustvit_ros.training.masked_autoencoder import Pretrainer
from clustvit_ros.training.recipe import read_recipe
from clustvit_ros.training.run_folder import owned, write_run_files


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "pretrain", help="pre-train a recipe's encoder on unlabelled images (masked auto-encoding), for train --init"
    )
    parser.add_argument("recipe", help="a shipped recipe's name, or a recipe file, with a pretraining section")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders of images; labels are not read")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<name>_pretraining)")
    add_training_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    prepare(args)
    args.recipe = find_recipe(args.recipe)
    recipe = read_recipe(args.recipe)
    if recipe.pretraining is not None:
        recipe = dataclasses.replace(recipe, pretraining=overridden(recipe.pretraining, args))
    if not recipe.classes:
        # The encoder does not depend on the classes, and the images need not have any.
        recipe = dataclasses.replace(recipe, classes=(ClassEntry("none", (0, 0, 0)),))
    run_dir = args.out or Path("runs") / f"{recipe.name}_pretraining"
    if len({folder.resolve() for folder in args.images}) < len(args.images):
        raise ConfigError(f"--images: got {' '.join(map(str, args.images))}, expected each folder once")
    images = _usable([path for folder in args.images for path in find_images(folder).values()], args.bad_data)
    with processes(args.device) as (here, device_name), owned(run_dir) if here.is_main else nullcontext():
        device, reason = select_device(device_name)
        options = run_options(args, run_dir, here.is_main, time.monotonic() - started)
        trainer = Pretrainer(recipe, images, run_dir, device, here, options, round(args.cache_gb * 1e9))
        if here.is_main:
            facts = {"seed": trainer.pretraining.seed, "images": [str(path) for path in images]}
            write_run_files(run_dir, recipe, device, facts)
            print(
                f"{recipe.name}: pre-training on {len(images)} images, device {device}"
                f"{f' ({reason})' if reason else ''}, epoch {trainer.epoch} of {trainer.pretraining.epochs}"
            )
        try:
            encoder = trainer.pretrain()
        except TimeUp:
            if here.is_main:
                print(f"time limit of {args.time_limit:g} min reached; the same command continues in {run_dir}")
            return EXIT_TIME_UP
        except KeyboardInterrupt:
            if here.is_main:
                print(f"\nstopped; the same command continues in {run_dir} after its last epoch", file=sys.stderr)
            raise
        if here.is_main:
            print(f"encoder in {encoder}; train with --init {encoder}")
    return 0


def _usable(paths: list[Path], bad_data: str) -> list[Path]:
    findings, usable = [], []
    for path in tqdm(paths, desc="check images", leave=False, mininterval=1.0):
        try:
            read_image(path)
            usable.append(path)
        except DataError as error:
            findings.append(BadFile(path, str(error)))
    if findings:
        text = list_findings(findings, "images")
        if bad_data == "strict" or not usable:
            raise DataError(f"{text}\nrepair or remove them, or pass --bad-data skip to go on without them")
        print(text, file=sys.stderr)
    return usable
