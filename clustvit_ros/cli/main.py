# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Entry point of `clustvit-ros`: one sub-command after the other, each in a module."""

from __future__ import annotations

import argparse
import importlib
import io
import sys

from clustvit_ros import __version__
from clustvit_ros.dds import bound_spinning
from clustvit_ros.errors import ClustvitError, ConfigError, missing_package

COMMANDS = {
    "bench": "bench:add_parser", "demo": "demo:add_parser", "doctor": "doctor:add_parser",
    "evaluate": "evaluate:add_parser", "export": "export:add_parser",
    "import_checkpoint": "import_checkpoint:add_parser", "label_bag": "label_bag:add_parser",
    "label_bags": "label_bag:add_fleet_parser", "pretrain": "pretrain:add_parser",
    "sim_dataset": "demo:add_dataset_parser", "train": "train:add_parser", "tune": "tune:add_parser",
}  # fmt: skip
"""Command, with `_` for `-` -> module of this folder and the function that adds its parser."""


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; errors on purpose become one line and exit code 2, interruption exit code 130."""
    bound_spinning()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files and topics may be anything
    parser = argparse.ArgumentParser(
        prog="clustvit-ros", description="ClustViT segmentation: models, scores and demos."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if argv is None else argv
    # Only what is asked for is imported: the doctor must run where others cannot even be loaded.
    asked = [name for name in COMMANDS if arguments[:1] == [name.replace("_", "-")]]
    for name in asked or COMMANDS:
        try:
            module, _, function = COMMANDS[name].partition(":")
            getattr(importlib.import_module(f"clustvit_ros.cli.{module}"), function)(commands)
        except ModuleNotFoundError as error:
            _add_unavailable(commands, name, error)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (ClustvitError, OSError) as error:  # the latter: files and folders that cannot be read or written
        print(f"clustvit-ros: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_unavailable(commands: argparse._SubParsersAction, name: str, error: ModuleNotFoundError) -> None:
    """A robot need not have what training needs: the other commands work all the same."""
    command = name.replace("_", "-")

    def refuse(_: argparse.Namespace) -> int:
        raise ConfigError(
            f"{missing_package(error, repr(command))}, or install this package there with its 'train' extra"
        )

    parser = commands.add_parser(command, help=f"not available: {error.name} is not installed", prefix_chars=" ")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(run=refuse)


if __name__ == "__main__":
    raise SystemExit(main())
