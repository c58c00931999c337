# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros export`: a model as one ONNX file or several of static shapes, or as an official checkpoint.

What is exported is compared with PyTorch before it is handed over.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from clustvit_ros.cli.arguments import parse_batch, parse_size
from clustvit_ros.engine.onnx_engine import ONNX_FILE
from clustvit_ros.engine.onnx_export import INPUT_NAMES, OUTPUT_NAMES, export_onnx, export_static
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.model_folder import load_segmenter
from clustvit_ros.networks.official import to_official
from clustvit_ros.paths import find_model

STATIC_FOLDER = "static"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="write a model as an ONNX file")
    parser.add_argument("--model", required=True, help="a shipped model's name or a model folder")
    parser.add_argument(
        "--out", type=Path, help=f"file to write (default: {ONNX_FILE} in the model folder, where the engine looks)"
    )
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="input size (default: the model's own)")
    parser.add_argument("--batch", type=parse_batch, default=None, help="a fixed count, or dynamic (default: dynamic)")
    parser.add_argument(
        "--static", action="store_true",
        help="write files of static shapes into the folder --out, for TensorRT: up to the kept count, and per capacity",
    )  # fmt: skip
    parser.add_argument(
        "--official", action="store_true", help="write an OpenMMLab checkpoint (.pth) with official names instead",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.official:
        return _export_official(args)
    if args.static:
        return _export_static(args)
    path = args.out or find_model(args.model) / ONNX_FILE
    export = export_onnx(args.model, path, args.size, args.batch)
    print(
        f"{export.path}: {export.path.stat().st_size / 1e6:.1f} MB, input {export.metadata['input_size']}, "
        f"batch {export.metadata['batch']}\n"
        f"inputs {', '.join(INPUT_NAMES)}; outputs {', '.join(OUTPUT_NAMES)}\n"
        f"logits differ from PyTorch's by at most {export.max_difference:.2g}"
    )
    return 0


def _export_static(args: argparse.Namespace) -> int:
    """Files for a compiler that wants all shapes."""
    folder = args.out or find_model(args.model) / STATIC_FOLDER
    export = export_static(args.model, folder, args.size, args.batch or 1)
    rest = "" if not export.by_capacity else f", and one for each of {', '.join(map(str, export.by_capacity))} tokens"
    print(f"{export.first}{rest}\noutputs differ from PyTorch's by at most {export.max_difference:.2g}")
    return 0


def _export_official(args: argparse.Namespace) -> int:
    """The way back: weights under the names of the official repository."""
    if args.out is None or args.size is not None or args.batch is not None:
        raise ConfigError("export --official: needs --out FILE.pth, and takes neither --size nor --batch")
    weights = to_official(load_segmenter(args.model).state_dict())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"meta": {}, "state_dict": weights}, args.out)
    print(f"{args.out}: {len(weights)} tensors with official names")
    return 0
