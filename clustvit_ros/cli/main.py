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
import os
import signal
import sys
import textwrap
import threading
import time
from typing import Any, NamedTuple

from clustvit_ros import __version__
from clustvit_ros.dds import bound_spinning
from clustvit_ros.errors import ClustvitError, ConfigError, missing_package, printable


class Command(NamedTuple):
    """A sub-command.

    Attributes:
        module: module of this folder.
        function: the one of its functions that adds the parser.
        examples: what its help ends with.
    """

    module: str
    function: str
    examples: tuple[str, ...]


COMMANDS = {
    "predict": Command("predict", "add_parser", (
        "predict street.jpg", "predict drive/ --merge-threshold 0.3", "predict drive.mp4 --budget-ms 40",
        "predict /dev/video0 --show", "predict 'rtsp://USER:PASSWORD@HOST/stream' --model camvid_small",
    )),
    "models": Command("models", "add_list_parser", ("models", "models --json", "models --released")),
    "get": Command("models", "add_get_parser", (
        "get ade20k_vit_b", "get ade20k_vit_b --file Downloads/64205613.pth",
        "get https://HOST/mine.pth --out models/mine",
    )),
    "demo": Command("demo", "add_parser", ("demo", "demo --source drive.mp4", "demo --source /dev/video0 --view")),
    "doctor": Command("doctor", "add_parser", ("doctor", "doctor --topic /camera/image_raw --json")),
    "param": Command("doctor", "add_param_parser", (
        "param list", "param set merge_threshold 0.3", "param describe latency_budget_ms --node /front/segmentation",
    )),
    "tune": Command("tune", "add_parser", (
        "tune --model camvid_tiny --images DIR/images --labels DIR/labels --budget-ms 40",
        "tune --model runs/finetuned/model --data DIR --write",
        "tune --engines --model camvid_tiny --images DIR/images",
    )),
    "train": Command("train", "add_parser", (
        "train finetune --data DIR", "train finetune --data DIR --epochs 20 --batch-size 4 --input-size 256x352",
    )),
    "pretrain": Command("pretrain", "add_parser", ("pretrain camvid_tiny_gpu --images DIR",)),
    "evaluate": Command("evaluate", "add_parser", (
        "evaluate --model camvid_tiny --images DIR/images --labels DIR/labels",
        "evaluate --model camvid_tiny runs/finetuned/model --data DIR --report report/",
    )),
    "bench": Command("bench", "add_parser", (
        "bench --model camvid_tiny", "bench --arch vit_t,clustvit_t --kept-fraction 1,0.5,0.3",
    )),
    "label_bag": Command("label_bag", "add_parser", ("label-bag drive_1 drive_1_labels",)),
    "label_bags": Command("label_bag", "add_fleet_parser", ("label-bags 'recordings/**' --out labels/",)),
    "export": Command("export", "add_parser", ("export --model camvid_tiny",)),
    "import_checkpoint": Command("models", "add_parser", (
        "import-checkpoint --checkpoint official.pth --out models/mine",
    )),
    "convert_labels": Command("datasets", "add_convert_parser", (
        "convert-labels coco/annotations/instances_train2017.json coco/annotations/instances_val2017.json --out data",
        "convert-labels labelme_folder --out data --classes road,kerb,grass --background void",
    )),
    "sim_dataset": Command("datasets", "add_sim_parser", ("sim-dataset --out data/sim --count 800 --seed 1",)),
}  # fmt: skip
"""By the command's name, `_` for `-`."""

_EXTRAS = {
    "torch": "torch", "cv2": "opencv", "tqdm": "train", "matplotlib": "train", "rosbags": "bags", "ray": "fleet",
    "onnx": "onnx", "onnxruntime": "onnx", "panda3d": "sim", "rclpy": "ros", "av": "video", "shtab": "completion",
}  # fmt: skip
"""The extra of this package that brings a module; what is not here comes with the package itself."""


class _Help(argparse.HelpFormatter):
    """Examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return textwrap.indent(text, indent)
        return super()._fill_text(text, width, indent)


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; errors on purpose become one line and exit code 2, interruption 130, a closed pipe 141."""
    try:
        if threading.current_thread() is threading.main_thread():
            _INTERRUPTION.install()
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has had enough, as `head`; the rest of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ClustvitError as error:
        print(f"clustvit-ros: error: {printable(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # files and folders that cannot be read or written
        told = f"{error.filename}: {error.strerror}; " if error.filename and error.strerror else f"{error}; "
        print(f"clustvit-ros: error: {printable(told)}check path, permissions and free space", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Interruption:
    """Ctrl-C, and a container's stop (SIGTERM) like it; who is impatient lets what there is be written all the same."""

    def __init__(self) -> None:
        self._first_s: float | None = None

    def install(self) -> None:
        """Listen; a job in the background goes on to ignore Ctrl-C."""
        self._first_s = None
        signal.signal(signal.SIGTERM, self)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, _: Any) -> None:
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
            raise KeyboardInterrupt
        if number == signal.SIGINT and now_s - self._first_s > _PATIENCE_S:
            raise KeyboardInterrupt


_INTERRUPTION = _Interruption()
_PATIENCE_S = 3.0


def _run(arguments: list[str]) -> int:
    bound_spinning()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files and topics may be anything
    # Only what is asked for is imported: the doctor must run where others cannot even be loaded.
    asked = [name for name in COMMANDS if arguments[:1] == [name.replace("_", "-")]]
    parser = make_parser(asked or list(COMMANDS))
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(arguments)
    return args.run(args)


def make_parser(names: list[str]) -> argparse.ArgumentParser:
    """The parser, with these of the commands."""
    parser = argparse.ArgumentParser(
        prog="clustvit-ros", description="ClustViT segmentation: masks, models, scores and demos.",
        epilog="Start with `clustvit-ros predict PICTURE`, or `clustvit-ros COMMAND --help`, which ends with examples.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    _add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in names:
        module, function, examples = COMMANDS[name]
        try:
            getattr(importlib.import_module(f"clustvit_ros.cli.{module}"), function)(commands)
        except (ImportError, OSError, AttributeError) as error:  # missing, a library it lacks, another NumPy's
            _add_unavailable(commands, name, error)
        command = commands.choices[name.replace("_", "-")]
        command.formatter_class = _Help
        command.epilog = "\n".join(["examples:", *(f"  clustvit-ros {example}" for example in examples)])
    return parser


def _add_completion(parser: argparse.ArgumentParser) -> None:
    """Option `--print-completion`, where the package that writes such scripts is installed."""
    try:
        import shtab
    except ImportError:
        return
    shtab.add_argument_to(parser, "--print-completion", help="print a script that completes commands and options")


def _add_unavailable(commands: argparse._SubParsersAction, name: str, error: Exception) -> None:
    """A robot need not have what training needs: the other commands work all the same."""
    command = name.replace("_", "-")

    def refuse(_: argparse.Namespace) -> int:
        if not isinstance(error, ModuleNotFoundError):
            raise ConfigError(
                f"{command!r} cannot be loaded: {error}; `clustvit-ros doctor` says which package it is, and what helps"
            )
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        with_extra = f", or install this package there with its {extra!r} extra" if extra else ""
        raise ConfigError(f"{missing_package(error, repr(command))}{with_extra}")

    missing = isinstance(error, ModuleNotFoundError)
    reason = f"{getattr(error, 'name', '')} is not installed" if missing else "see `clustvit-ros doctor`"
    parser = commands.add_parser(command, help=f"not available: {reason}", prefix_chars=" ")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(run=refuse)


if __name__ == "__main__":
    raise SystemExit(main())
