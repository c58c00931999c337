"""Options that every training command has, and what they turn into."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.training.dataset import Finding, LabelledImages, check_images, list_findings, without
from clustvit_ros.training.loop import RunOptions
from clustvit_ros.training.run_folder import tensorboard_writer

EXIT_TIME_UP = 75
"""Exit code when the time limit ended a run that the same command continues (EX_TEMPFAIL)."""


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Options of `train` and `pretrain`."""
    parser.add_argument("--epochs", type=int, help="instead of the recipe's number of epochs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = automatic")
    parser.add_argument(
        "--bad-data",
        choices=("strict", "skip"),
        default="strict",
        help="strict stops on files that cannot be used and lists them, skip goes on without them (default: strict)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help=f"save and stop after so long with exit code {EXIT_TIME_UP}; the same command continues",
    )
    parser.add_argument("--compile", action="store_true", help="fuse network and losses with torch.compile")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard logs into the run folder")
    parser.add_argument(
        "--cache-gb", type=float, default=4.0, help="keep images on the device if they fit into this (default: 4)"
    )


def prepare(args: argparse.Namespace) -> None:
    """Process-wide settings that the options ask for.

    Raises:
        ConfigError: an option is out of range.
    """
    if args.time_limit < 0 or args.cache_gb < 0:
        raise ConfigError("--time-limit and --cache-gb must be 0 or above")
    if args.threads > 0:
        torch.set_num_threads(args.threads)


def run_options(args: argparse.Namespace, run_dir: Path, is_main: bool, spent_s: float = 0.0) -> RunOptions:
    """How a run is carried out; `spent_s` of the time limit have gone already."""
    on_record: Callable[[dict[str, Any]], None] = lambda record: None  # noqa: E731
    if args.tensorboard and is_main:
        on_record = tensorboard_writer(run_dir)
    limit_s = max(args.time_limit * 60.0 - spent_s, 0.001) if args.time_limit else 0.0
    return RunOptions(time_limit_s=limit_s, compile=args.compile, on_record=on_record)


def usable(data: LabelledImages, bad_data: str, patch_size: int) -> tuple[LabelledImages, list[Finding]]:
    """Check every file of a split.

    Args:
        bad_data: "strict" or "skip".
        patch_size: images must have at least one patch.

    Returns:
        What can be used, and what is left out.

    Raises:
        DataError: strict, and something cannot be used (each file is listed); or nothing is left.
    """
    found = check_images(
        data,
        patch_size,
        lambda items: tqdm(items, desc=f"check {data.where}", total=len(data), leave=False, mininterval=1.0),
    )
    findings = [*data.findings, *found]
    if not findings:
        return data, []
    text = list_findings(findings, data.where)
    if bad_data == "strict":
        raise DataError(f"{text}\nrepair or remove them, or pass --bad-data skip to go on without them")
    print(text, file=sys.stderr)
    return (without(data, found) if found else data), findings
