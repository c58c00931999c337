#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Every way to cluster on one page: ViT, ClustViT, ToMe, ClusTR and CAST, in cost, growth and accuracy.

Each is measured at several sizes and, with `--data`, trained alike for a number of steps. What was done is kept in the
output folder and not done again. docs/comparison.md says what came of it.

`scripts/compare.py --out comparison --data DIR`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clustvit_ros.classes import ClassEntry, load_class_set
from clustvit_ros.cli.arguments import parse_counts, parse_names, parse_size
from clustvit_ros.engine.engine import Settings
from clustvit_ros.engine.machine import machine_name
from clustvit_ros.engine.network_engine import describe_device, select_device
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.measure.bench import BenchCase, markdown_table, run_cases
from clustvit_ros.measure.evaluation import evaluate
from clustvit_ros.measure.flops import attention_share
from clustvit_ros.measure.pictures import new_figure, save_figure
from clustvit_ros.networks import ModelConfig, Segmenter, build_network, network_config, save_model
from clustvit_ros.networks.model_folder import InputConfig
from clustvit_ros.networks.vit import grid_size_of
from clustvit_ros.training.augmentation import Augmentation
from clustvit_ros.training.dataset import LabelledImages
from clustvit_ros.training.recipe import Recipe, Schedule
from clustvit_ros.training.trainer import Trainer

_QUANTITIES = {"latency_ms": "latency (ms)", "peak_memory_mb": "peak memory (MB)", "gflops": "GFLOPs"}


def format_report(
    costs: Sequence[dict[str, Any]],
    scores: Mapping[str, dict[str, Any]],
    exponents: Mapping[str, Mapping[str, float]],
    attention_shares: Mapping[int, float],
    device: str,
) -> str:
    """The page as Markdown.

    Args:
        costs: rows of systems and sizes.
        scores: by system; those that were not trained are missing.
        exponents: by system and quantity.
        attention_shares: tokens to the share of a ViT-B block's operations that attention takes.
        device: for people.
    """
    names = list(dict.fromkeys(row["system"] for row in costs))
    sizes = list(dict.fromkeys(row["size_px"] for row in costs))
    first = {name: next(row for row in costs if row["system"] == name) for name in names}
    header = ["system", "architecture", "M params", "tokens kept"]
    summary = [[*header, "mIoU", "pixel accuracy", "training min"]]
    for name in names:
        row, score = first[name], scores.get(name)
        found = (
            [f"{score['miou']:.1f}", f"{score['pixel_accuracy']:.1f}", f"{score['minutes']:.1f}"]
            if score
            else ["-"] * 3
        )
        summary.append([name, row["architecture"], f"{row['parameters'] / 1e6:.1f}", f"{row['kept']:.0%}", *found])
    parts = [f"{device}, {machine_name()}, PyTorch {torch.__version__}, float32, one image per call.", ""]
    parts += markdown_table(summary)
    if scores:
        score = next(iter(scores.values()))
        height, width = score["crop"]
        unmerged = f"{score['merge_after']:.0%}"
        input_height, input_width = score["input"]
        parts += [
            "",
            f"Scores: validation images after {score['steps']} steps of {score['batch']} crops of {height}x{width} "
            f"from random weights, images at {input_height}x{input_width}, one seed; what merges tokens does so after "
            f"{unmerged} of the training, and is scored with the share kept that stands above. Such a budget says "
            "which system learns fast, not which is best in the end.",
        ]
    for quantity, title in _QUANTITIES.items():
        lines = [[title, *(f"{size} px" for size in sizes), "exponent"]]
        for name in names:
            values = {row["size_px"]: row[quantity] for row in costs if row["system"] == name}
            cells = [f"{values[size]:.1f}" if size in values else "-" for size in sizes]
            exponent = exponents.get(name, {}).get(quantity)
            lines.append([name, *cells, "-" if exponent is None else f"{exponent:.2f}"])
        parts += ["", *markdown_table(lines)]
    parts += ["", "An exponent p is of cost ~ tokens^p, fitted over all sizes; 1 is linear, 2 quadratic.", ""]
    parts += markdown_table(
        [["tokens", "attention's share of a ViT-B block", "no attention-only method is faster than"]]
        + [[str(n), f"{share:.0%}", f"{1 / (1 - share):.2f}x"] for n, share in attention_shares.items()]
    )
    return "\n".join(parts) + "\n"


def draw_growth(costs: Sequence[dict[str, Any]], exponents: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw latency and memory against tokens, both logarithmic.

    Raises:
        ConfigError: matplotlib is missing.
    """
    quantities = ("latency_ms", "peak_memory_mb")
    figure, (row_of_axes,) = new_figure((10, 4.2), columns=len(quantities))
    sizes = sorted({row["tokens"] for row in costs})
    for axes, quantity in zip(row_of_axes, quantities, strict=True):
        for name in dict.fromkeys(row["system"] for row in costs):
            points = sorted((row["tokens"], row[quantity]) for row in costs if row["system"] == name)
            exponent = exponents.get(name, {}).get(quantity)
            label = name if exponent is None else f"{name}: tokens^{exponent:.2f}"
            axes.loglog(*zip(*points, strict=True), marker="o", label=label)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("tokens (16 px patches)")
        axes.set_ylabel(_QUANTITIES[quantity])
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    save_figure(figure, path)


MERGE_AFTER = 0.5
"""Share of a training after which tokens are merged."""

# Tokens for size comparisons count 16 px patches, whatever grid an architecture works on.
_PATCH_SIZE = 16


class Contender(NamedTuple):
    """A system to compare.

    Attributes:
        architecture, network: as in `model.yaml`.
        training: what `network` states beyond that while it is trained.
    """

    architecture: str
    network: dict[str, Any]
    training: dict[str, Any]


# From 367 images a convolutional stem learns where a 16x16 projection does not; ClusTR has overlapping ones by design.
_CONV_STEM = {"stem": "conv"}
CONTENDERS = {
    "ViT": Contender("vit_t", {}, _CONV_STEM),
    "ClustViT": Contender("clustvit_t", {}, _CONV_STEM),
    "ToMe": Contender("vit_t", {"merging": "tome"}, _CONV_STEM),
    "ClusTR": Contender("clustr_b1", {}, {}),
    "ClusTR-t": Contender("clustr_t", {}, {}),
    "CAST": Contender("cast_t", {}, _CONV_STEM),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--systems", type=parse_names, default=tuple(CONTENDERS),
        help=f"which, separated by commas (default: {','.join(CONTENDERS)})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder of results (default: comparison)")
    parser.add_argument(
        "--sizes", type=parse_counts, default=(256, 512, 768, 1024),
        help="sides in pixels of square inputs (default: 256,512,768,1024)",
    )  # fmt: skip
    parser.add_argument("--kept", type=float, default=0.5, help="share of tokens kept by what merges (default: 0.5)")
    parser.add_argument("--runs", type=int, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--data", type=Path, help="folder with {train,val}/{images,labels}; without it none is trained")
    parser.add_argument("--classes", default="camvid", help="packaged class list of the data (default: camvid)")
    parser.add_argument(
        "--steps", type=int, default=300, help="training steps of each, rounded to whole epochs (default: 300)"
    )
    parser.add_argument("--batch", type=int, default=4, help="crops per step (default: 4)")
    parser.add_argument("--crop", type=parse_size, default=(128, 160), metavar="HxW", help="(default: 128x160)")
    parser.add_argument(
        "--input", type=parse_size, default=(192, 256), metavar="HxW",
        help="input size while training and scoring (default: 192x256)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = automatic (default: 0)")
    try:
        return run(parser.parse_args(argv))
    except ClustvitError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    unknown = [name for name in args.systems if name not in CONTENDERS]
    if unknown:
        raise ConfigError(f"systems: got {', '.join(unknown)}, expected some of {', '.join(CONTENDERS)}")
    for name, least in (("steps", 1), ("batch", 1), ("runs", 1), ("threads", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"{name}: got {getattr(args, name)}, expected at least {least}")
    if not 0.0 < args.kept <= 1.0:
        raise ConfigError(f"kept: got {args.kept}, expected above 0 and up to 1")
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "comparison.json"
    content = read_results(results)
    device = select_device(args.device)[0]
    for size in args.sizes:
        missing = [name for name in args.systems if _cost_key(name, size, args) not in content["costs"]]
        if missing:
            content["costs"].update(_measure(missing, size, args))
            _write(results, content)
            print(f"measured at {size} px: {', '.join(missing)}", flush=True)
    if args.data:
        for name in args.systems:
            key = _score_key(name, args)
            if key not in content["scores"]:
                content["scores"][key] = _train(name, args, device)
                _write(results, content)
                print(
                    f"{name}: mIoU {content['scores'][key]['miou']:.1f} after {content['scores'][key]['steps']} steps",
                    flush=True,
                )
    costs = [content["costs"][_cost_key(name, size, args)] for size in args.sizes for name in args.systems]
    scores = {
        name: content["scores"][_score_key(name, args)]
        for name in args.systems
        if _score_key(name, args) in content["scores"]
    }
    shares = {
        tokens: attention_share(768, 12, tokens)
        for tokens in sorted({(side // _PATCH_SIZE) ** 2 for side in args.sizes})
    }
    exponents = growth_exponents(costs)
    text = format_report(costs, scores, exponents, shares, describe_device(device))
    (args.out / "comparison.md").write_text(text, encoding="utf-8")
    draw_growth(costs, exponents, args.out / "comparison.png")
    print(text)
    return 0


def read_results(path: Path) -> dict[str, Any]:
    """What earlier calls measured; nothing where the file does not exist.

    Raises:
        ConfigError: the file is not one of this command's.
    """
    if not path.exists():
        return {"costs": {}, "scores": {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); delete it, or pass another --out") from error
    if not isinstance(content, dict) or content.keys() != {"costs", "scores"}:
        raise ConfigError(f"{path}: holds something else than costs and scores; pass another --out")
    return content


def growth_exponents(costs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Exponents p of cost ~ tokens^p, by least squares on logarithms, per system and quantity.

    A system that was measured at one size only has none.
    """
    exponents: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["system"] for row in costs):
        rows = [row for row in costs if row["system"] == name]
        if len({row["tokens"] for row in rows}) < 2:
            continue
        tokens = np.log([row["tokens"] for row in rows])
        exponents[name] = {
            quantity: float(np.polyfit(tokens, np.log([row[quantity] for row in rows]), 1)[0])
            for quantity in ("gflops", "latency_ms", "peak_memory_mb")
        }
    return exponents


def _measure(names: list[str], size: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Cost rows of systems at one size, timed in turns."""
    cases = []
    for name in names:
        contender = CONTENDERS[name]
        overrides = {"image_size": [size, size], **contender.network}
        config = _model_config(name, contender.architecture, overrides, (size, size), args.classes)
        folder = args.out / "random" / f"{name}-{size}"
        torch.manual_seed(0)
        save_model(folder, config, build_network(config.network, len(config.classes)))
        capacity = _token_capacity(config, (size, size), args.kept)
        cases.append(BenchCase(name, folder, "torch", args.device, args.threads, (size, size), token_capacity=capacity))
    measured = run_cases(cases, args.runs, warmup=1)
    return {
        _cost_key(name, size, args): {
            "system": name,
            "architecture": CONTENDERS[name].architecture,
            "size_px": size,
            "tokens": (size // _PATCH_SIZE) ** 2,
            "kept": row["tokens_kept"] / row["tokens_total"],
            "parameters": row["parameters"],
            "gflops": row["gflops"],
            "latency_ms": row["p50_ms"],
            "peak_memory_mb": row["peak_memory_mb"],
            "threads": row["threads"],
        }
        for name, row in zip(names, measured, strict=True)
    }


def _train(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Scores of a system after the budget, and the time it took."""
    contender = CONTENDERS[name]
    overrides = {**contender.network, **contender.training}
    classes = load_class_set(args.classes)
    train_data, val_data = (
        LabelledImages(args.data / split / "images", args.data / split / "labels", len(classes))
        for split in ("train", "val")
    )
    steps_per_epoch = max(len(train_data) // args.batch, 1)
    epochs = max(round(args.steps / steps_per_epoch), 1)
    recipe = Recipe(
        name=name,
        architecture=contender.architecture,
        network=overrides,
        classes=tuple(ClassEntry(n, c) for n, c in zip(classes.names, classes.colours, strict=True)),
        input=InputConfig(size=args.input),
        augmentation=Augmentation(crop_size=args.crop, scale=(0.7, 1.4)),
        # The average follows as closely as so few steps allow. Tokens merged by clusters that know nothing yet teach
        # nothing: in a budget this short, the usual twentieth of the steps is not enough to learn them.
        schedule=Schedule(
            epochs=epochs, batch_size=args.batch, ema_decay=0.98, validate_every=epochs, merge_after=MERGE_AFTER
        ),
    )
    config = dataclasses.replace(recipe.model_config(), training={"recipe": "compare"})
    settings = Settings(token_capacity=_token_capacity(config, args.input, args.kept))
    run_dir = args.out / "runs" / _score_key(name, args)
    trainer = Trainer(recipe, train_data, run_dir, device)
    found: dict[str, Any] = {}

    def validate(network: Segmenter) -> dict[str, Any]:
        found.update(evaluate(TorchEngine(network, config, str(device)), val_data, settings))
        return found

    started = time.monotonic()
    trainer.train(validate, lambda network: save_model(run_dir / "model", config, network))
    if not found:  # training was complete, and only its score is missing
        validate(trainer.averaged)
    return {
        "system": name,
        "steps": epochs * steps_per_epoch,
        "batch": args.batch,
        "merge_after": MERGE_AFTER,
        "crop": list(args.crop),
        "input": list(args.input),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "miou": found["miou"],
        "pixel_accuracy": found["pixel_accuracy"],
        "tokens_merged_mean": found["tokens_merged_mean"],
        "model": str(run_dir / "model"),
    }


def _token_capacity(config: ModelConfig, size: tuple[int, int], kept: float) -> int:
    """Tokens that a share `kept` of an input of `size` pixels is; 0, no limit, for a network that never merges."""
    rows, columns = grid_size_of(size, config.network.patch_size)
    return max(round(kept * rows * columns), 1) if config.network.merges else 0


def _model_config(
    name: str, architecture: str, overrides: dict[str, Any], size: tuple[int, int], classes: str
) -> ModelConfig:
    return ModelConfig(
        name=name,
        architecture=architecture,
        network=network_config(architecture, overrides),
        classes=load_class_set(classes),
        input=InputConfig(size=size),
        overrides=overrides,
    )


def _cost_key(name: str, size: int, args: argparse.Namespace) -> str:
    return f"{name}-{size}-kept{args.kept:g}-{args.device}-{args.threads}"


def _score_key(name: str, args: argparse.Namespace) -> str:
    sizes = "-".join(f"{height}x{width}" for height, width in (args.crop, args.input))
    return f"{name}-{args.steps}x{args.batch}-{sizes}-kept{args.kept:g}"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
