# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros bench`: latency, operations and memory of architectures and models, measured side by side."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from clustvit_ros.classes import ClassSet
from clustvit_ros.cli.arguments import (
    add_threads,
    add_variants,
    find_variants,
    parse_counts,
    parse_fractions,
    parse_names,
    parse_size,
    tell_merges_nothing,
    write_variant,
)
from clustvit_ros.engine.ladder import scaled_size
from clustvit_ros.engine.network_engine import select_device
from clustvit_ros.engine.onnx_session import PROVIDERS
from clustvit_ros.errors import ConfigError
from clustvit_ros.measure.bench import BenchCase, draw_plot, format_table, result_stem, run_cases
from clustvit_ros.measure.flops import Cost, measure_rates, roofline_ms
from clustvit_ros.networks.architectures import build_network, network_config
from clustvit_ros.networks.model_folder import InputConfig, ModelConfig, load_config, save_model
from clustvit_ros.networks.vit import grid_size_of

_DEFAULT_SIZE = (512, 512)
_DEFAULT_CLASSES = 150
_KEPT = (0.3,)  # shares of tokens
_WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("bench", help="measure latency, operations and memory")
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--arch", type=parse_names, default=("vit_t", "clustvit_t"),
        help="architectures with random weights, separated by commas (default: vit_t,clustvit_t)",
    )  # fmt: skip
    network.add_argument("--model", help="a shipped model's name or a model folder instead")
    add_variants(parser)
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="input size (default: 512x512, or the model's)")
    parser.add_argument(
        "--input-scale", type=parse_fractions, default=(1.0,), metavar="SHARE",
        help="share of that size's sides, above 0 to 1, or several separated by commas (default: 1)",
    )  # fmt: skip
    parser.add_argument("--classes", type=int, help=f"classes of random networks (default: {_DEFAULT_CLASSES})")
    parser.add_argument("--batch", type=int, default=1, help="images per call (default: 1)")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--kept-fraction", type=parse_fractions,
        help="share of tokens kept, above 0 and up to 1, or several separated by commas (default: 0.3)",
    )  # fmt: skip
    kept.add_argument("--capacity", type=parse_counts, help="the same as counts of tokens")
    parser.add_argument(
        "--engine", type=parse_names, default=("torch",), help="engines, separated by commas (default: torch)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--provider", choices=PROVIDERS, default="", help="ONNX Runtime's provider (default: device's)")
    add_threads(parser)
    parser.add_argument(
        "--precision", type=parse_names, default=("float32",),
        help="float32, float16, bfloat16 or int8, or several separated by commas (default: float32)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (needs a compiler)")
    parser.add_argument("--warmup", type=int, default=5, help="calls before the timed ones (default: 5)")
    parser.add_argument("--runs", type=int, default=30, help="timed calls (default: 30)")
    parser.add_argument("--roofline", action="store_true", help="show what the device's measured rates would allow")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=Path, help="draw latency against kept tokens to this file")
    parser.add_argument(
        "--save-dir", type=Path, help="write the rows to a file here named after device, torch and date"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name, least in (("batch", 1), ("runs", 1), ("warmup", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"{name}: got {getattr(args, name)}, expected at least {least}")
    with tempfile.TemporaryDirectory(prefix="clustvit_bench_") as folder:
        cases = list(_cases(args, Path(folder)))
        rows = run_cases(cases, args.runs, args.warmup)
    device = select_device(args.device)[0]
    bounds_ms = _bounds_ms(rows, cases, device) if args.roofline else None
    print(format_table(rows, bounds_ms))
    paths = [args.json] if args.json else []
    if args.save_dir:
        paths.append(args.save_dir / f"{result_stem(device)}.json")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        draw_plot(rows, args.plot)
    return 0


def _cases(args: argparse.Namespace, folder: Path) -> Iterator[BenchCase]:
    """Every network with every engine and capacity; networks with random weights are made in `folder`."""
    if args.model:
        if args.classes is not None:
            raise ConfigError("classes: a model has its own; leave out either --classes or --model")
        models = [variant for variant in find_variants(args, args.model, folder)]
        cache_dir = folder if any(args.merge) or any(args.decode) else None
    else:
        size = args.size or _DEFAULT_SIZE
        classes = _DEFAULT_CLASSES if args.classes is None else args.classes
        random = [_random_model(folder / "random" / arch, size, classes) for arch in args.arch]
        models = [variant for model in random for variant in find_variants(args, model, folder)]
        cache_dir = folder
    configs = [load_config(model) for model in models]
    names = ", ".join(config.name for config in configs)
    tell_merges_nothing(args, names, any(config.network.merges for config in configs))
    for model, config in zip(models, configs, strict=True):
        full_size, patch_size = args.size or config.input.size, config.network.patch_size
        if full_size != config.input.size:
            model = write_variant(model, folder / "sized" / config.name, {}, full_size)
        for engine, scale in itertools.product(args.engine, args.input_scale):
            rows, columns = grid_size_of(scaled_size(full_size, scale, patch_size), patch_size)
            capacities = _capacities(args, rows * columns) if config.network.merges else [0]
            provider = args.provider if engine == "onnxruntime" else ""
            for precision, capacity in itertools.product(args.precision, capacities):
                yield BenchCase(
                    config.name, model, engine, args.device, args.threads, full_size, args.batch, capacity, provider,
                    cache_dir, precision, args.compile, scale,
                )  # fmt: skip


def _capacities(args: argparse.Namespace, tokens_total: int) -> list[int]:
    """Token capacities that were asked for.

    Raises:
        ConfigError: more tokens than there are.
    """
    if not args.capacity:
        return [max(round(fraction * tokens_total), 1) for fraction in args.kept_fraction or _KEPT]
    if max(args.capacity) > tokens_total:
        raise ConfigError(f"capacity: got {max(args.capacity)}, the input has {tokens_total} tokens")
    return list(args.capacity)


def _random_model(folder: Path, size: tuple[int, int], num_classes: int) -> Path:
    """A model folder with random weights, named after its architecture.

    Raises:
        ConfigError: unknown architecture, or no classes.
    """
    if num_classes < 1:
        raise ConfigError(f"classes: got {num_classes}, expected at least 1")
    overrides = {"image_size": list(size)}
    config = ModelConfig(
        name=folder.name, architecture=folder.name, network=network_config(folder.name, overrides, "arch"),
        classes=ClassSet.numbered(num_classes), input=InputConfig(size=size), overrides=overrides,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(folder, config, build_network(config.network, num_classes))
    return folder


def _bounds_ms(rows: list[dict[str, Any]], cases: list[BenchCase], device: torch.device) -> list[float]:
    rates = {name: measure_rates(device, name) for name in dict.fromkeys(row["precision"] for row in rows)}
    for name, measured in rates.items():
        print(
            f"{device}, {name}: {measured.matmul_gflops:.0f} GFLOP/s in matrix products, "
            f"{measured.bandwidth_gb_s:.1f} GB/s"
        )
    print()
    bounds = []
    for row, case in zip(rows, cases, strict=True):
        pixels = case.batch * case.size[0] * case.size[1]
        cost = Cost(int(row["gflops"] * 1e9), row["parameters"])
        weight_bytes = _WEIGHT_BYTES[row["precision"]]
        bounds.append(roofline_ms(cost, rates[row["precision"]], 3 * pixels, pixels, weight_bytes))
    return bounds
