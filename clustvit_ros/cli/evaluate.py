# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros evaluate`: scores of models on labelled images, as JSON, as a report with plots, with pictures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any, cast

from clustvit_ros.classes import Sample
from clustvit_ros.cli.arguments import (
    add_input_scale,
    add_merge_options,
    add_threads,
    add_variants,
    find_variants,
    refuse_other_data,
    refuse_shipped,
    tell_merges_nothing,
)
from clustvit_ros.engine import PRECISIONS, Engine, Prediction, Settings, create_engine
from clustvit_ros.engine.network_engine import NetworkEngine
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.images import write_image
from clustvit_ros.measure.bench import markdown_table
from clustvit_ros.measure.evaluation import evaluate, fit_temperature, gflops_counter
from clustvit_ros.measure.pictures import comparison
from clustvit_ros.measure.report import compare_twins, write_report
from clustvit_ros.measure.sweep import ladder_settings, sweep
from clustvit_ros.networks.model_folder import TEMPERATURES, ModelConfig, load_config, save_config
from clustvit_ros.paths import find_model, model_name
from clustvit_ros.training.dataset import LabelledImages, group_images, joined, usable
from clustvit_ros.training.layouts import open_data_set

_TITLES = ("model", "tokens kept", "mIoU", "GFLOPs", "ms (p50)")
_DETAILS = ("confusion", "per_image")
_REPORT_PICTURES = 6


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="score models on labelled images")
    parser.add_argument(
        "--model", required=True, nargs="+", action="extend", help="shipped models' names or model folders"
    )
    add_variants(parser)
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--labels", type=Path, help="folder of <stem>.png with class ids, 255 = void")
    parser.add_argument("--data", type=Path, help="a data set as `train` takes it, instead of --images and --labels")
    parser.add_argument(
        "--split", nargs="+", help="split of --data, or several together (default: val)"
    )
    parser.add_argument(
        "--group", nargs="+", default=[], metavar="NAME", help="only images of these groups of --data, e.g. drives"
    )
    parser.add_argument(
        "--calibrate", action="store_true",
        help="fit the temperature on these images, best of drives that nothing was learnt from, and write it into the "
        "model's model.yaml, so that a confidence is the share of such pixels that are right",
    )  # fmt: skip
    add_merge_options(parser)
    add_input_scale(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_threads(parser)
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="what the network computes in (default: float32)"
    )
    parser.add_argument(
        "--bad-data", choices=("strict", "skip"), default="strict",
        help="strict stops at a file that cannot be used, skip lists all of them and goes on (default: strict)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the scores to this file")
    parser.add_argument("--pictures", type=Path, help="write image, prediction, truth and clusters side by side here")
    parser.add_argument(
        "--report", type=Path, metavar="DIR",
        help="write report.json and report.html with plots and a sweep over merge settings here",
    )  # fmt: skip
    parser.add_argument("--no-sweep", action="store_true", help="leave the sweep out of the report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = Settings(
        merge_threshold=args.merge_threshold, token_capacity=args.token_capacity,
        clusters=args.pictures is not None or args.report is not None, input_scale=args.input_scale,
    )  # fmt: skip
    if args.calibrate and any((*args.merge, *args.decode)):
        raise ConfigError("--calibrate: got --merge or --decode as well, which are written nowhere; leave them out")
    if args.calibrate:
        refuse_shipped(args.model, "--calibrate")
    refuse_other_data(args)
    args.split = args.split or ["val"]
    for option, names in (("split", args.split), ("group", args.group)):
        if len(set(names)) < len(names):
            raise ConfigError(f"--{option}: got {' '.join(names)}, expected each once: images would count twice")
    with tempfile.TemporaryDirectory(prefix="clustvit_evaluate_") as folder:
        variants = [find_variants(args, model, Path(folder, str(index))) for index, model in enumerate(args.model)]
        models = [variant for of_one in variants for variant in of_one]
        sources = [find_model(model) for model, of_one in zip(args.model, variants, strict=True) for _ in of_one]
        configs = _with_distinct_names([load_config(model) for model in models], sources)
        opened = [_grouped(args, _open(args, config)) for config in configs]  # all, before the first is scored
        results, shown = [], list[Path]()
        for model, config, (data, groups) in zip(models, configs, opened, strict=True):
            tell_merges_nothing(args, config.name, config.network.merges)
            engine = create_engine(str(model), "torch", args.device, args.threads, args.precision)
            if args.calibrate:
                found = fit_temperature(cast(NetworkEngine, engine), data, settings)
                temperature = round(config.temperature * found, 3)
                if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
                    raise DataError(
                        f"--calibrate: got a temperature of {temperature:g} for {config.name}, expected "
                        f"{TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}; nothing is written: on these images it is right, "
                        "or wrong, nearly everywhere; check the labels, and calibrate on images that it did not learn"
                    )
                save_config(model, dataclasses.replace(load_config(model), temperature=temperature))
                print(f"{config.name}: temperature {temperature:g} instead of {config.temperature:g}, in {model}")
                engine = create_engine(str(model), "torch", args.device, args.threads, args.precision)
            results.append(_evaluate(args, config, engine, data, groups, settings, len(configs) > 1, shown))
    if len(results) > 1:
        print("\n".join(markdown_table([_TITLES, *map(_row, results)])))
    if args.json:
        rows = [{key: value for key, value in r.items() if key not in (*_DETAILS, "sweep")} for r in results]
        content = rows[0] if len(rows) == 1 else {"models": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.report:
        comparisons = compare_twins(results, configs)
        for line in comparisons:
            print(line["text"])
        where = f"{args.data}: {', '.join(args.split + args.group)}" if args.data else str(args.images)
        print(f"report in {write_report(args.report, where, results, configs, comparisons, sorted(shown))}")
    return 0


def _row(result: dict[str, Any]) -> list[str]:
    """The cells below `_TITLES`."""
    kept = f"{result['tokens_kept_mean']:.0f} of {result['tokens_total']}"
    return [
        result["model"], kept, f"{result['miou']:.2f}", f"{result['gflops_mean']:.1f}",
        f"{result['latency_ms_p50']:.1f}",
    ]  # fmt: skip


def _with_distinct_names(configs: list[ModelConfig], sources: list[Path]) -> list[ModelConfig]:
    """Where names repeat, as those of two runs' folds do, the folder around tells them apart.

    Args:
        configs: of models, or of variants of them.
        sources: the folder of each one's model.
    """
    names = [config.name for config in configs]
    around = [
        next(path.parent.name for path in (folder, *folder.parents) if path.name == model_name(folder))
        for folder in (source.resolve() for source in sources)
    ]
    return [
        dataclasses.replace(config, name=f"{folder}-{config.name}") if names.count(config.name) > 1 else config
        for config, folder in zip(configs, around, strict=True)
    ]


def _open(args: argparse.Namespace, config: ModelConfig) -> LabelledImages:
    num_classes = len(config.classes)
    strict = args.bad_data == "strict"
    if args.data is not None:
        splits = [open_labelled(args.data, split, config.classes.names, config.name, strict) for split in args.split]
        data = joined(splits, same_classes=True) if len(splits) > 1 else splits[0]
    elif args.images is not None and args.labels is not None:
        data = LabelledImages(args.images, args.labels, num_classes, strict)
    else:
        raise ConfigError("evaluate: expected --images and --labels, or --data")
    if not strict:
        data, _ = usable(data, args.bad_data, config.network.patch_size)
    return data


def _grouped(args: argparse.Namespace, data: LabelledImages) -> tuple[LabelledImages, dict[str, list[int]]]:
    """The images that are asked for, and which of them belong together.

    Raises:
        ConfigError: a group is asked for that there is not.
    """
    rule = open_data_set(args.data).group if args.data else ""
    groups = group_images(data, rule, to_hold_out=False) if rule else {}
    unknown = [name for name in args.group if name not in groups]
    if unknown:
        known = ", ".join(groups) or "none: expected --data with a dataset.yaml that has a group"
        raise ConfigError(f"--group: got {unknown[0]}; the groups of these images are {known}")
    if args.group:
        data = data.subset(sorted(index for name in args.group for index in groups[name]))
        groups = group_images(data, rule, to_hold_out=False)
    return data, groups


def open_labelled(
    data: Path, split: str, class_names: tuple[str, ...], model: str, strict: bool = True
) -> LabelledImages:
    """A split of a data set, for a model that has its classes.

    Raises:
        DataError: the data set states other classes, or cannot be read.
    """
    data_set = open_data_set(data)
    if data_set.classes is not None and data_set.classes.names != class_names:
        raise DataError(
            f"{data}: its class list differs from the model's: got {', '.join(data_set.classes.names)}; "
            f"{model} has {', '.join(class_names)}"
        )
    return data_set.open(split, len(class_names), strict)


def _evaluate(
    args: argparse.Namespace, config: ModelConfig, engine: Engine, data: LabelledImages, groups: dict[str, list[int]],
    settings: Settings, several: bool, shown: list[Path],
) -> dict[str, Any]:  # fmt: skip
    """Scores of one model; printed, and with its pictures written, those of the report added to `shown`."""
    palette = config.classes.palette()
    chosen = {data.pairs[(2 * i + 1) * len(data) // (2 * _REPORT_PICTURES)].stem for i in range(_REPORT_PICTURES)}

    def draw(sample: Sample, prediction: Prediction) -> None:
        name = f"{config.name}_{sample.stem}" if several else sample.stem
        if args.pictures:
            write_image(args.pictures / f"{name}.png", comparison(sample, prediction, palette))
        if args.report and sample.stem in chosen:
            shown.append(args.report / "pictures" / f"{config.name}_{sample.stem}.jpg")
            write_image(shown[-1], comparison(sample, prediction, palette))

    count_gflops = gflops_counter(config)
    draws = args.pictures is not None or args.report is not None
    scores = evaluate(engine, data, settings, draw if draws else None, count_gflops, details=True, groups=groups)
    info = engine.info
    for name, iou in scores["per_class_iou"].items():
        print(f"  {name:<16}{'-' if iou is None else f'{iou:6.2f}'}")
    print(
        f"{f'{config.name}: ' if several else ''}mIoU {scores['miou']:.2f} on {scores['images']} images; "
        f"{scores['tokens_kept_mean']:.0f} of {scores['tokens_total']} tokens kept; "
        f"boundary IoU {scores['boundary_iou']:.2f}; calibration error {scores['ece']:.3f}; "
        f"{scores['gflops_mean']:.1f} GFLOPs; "
        f"{scores['latency_ms_p50']:.1f} ms per image (p50) on {info.device}"
    )
    for name, group in scores.get("groups", {}).items():
        miou = f"{'-':>6}" if group["miou"] is None else f"{group['miou']:6.2f}"
        print(f"  {name:<16}{miou} on {group['images']} images")
    result = {
        "model": config.name, "engine": info.engine, "device": info.device, "merge_threshold": settings.merge_threshold,
        "token_capacity": settings.token_capacity, "input_scale": settings.input_scale,
        "merging": getattr(config.network, "merge_method", "none"), **scores,
    }  # fmt: skip
    if args.report and not args.no_sweep:
        samples = [data[index] for index in range(len(data))]
        merges = config.network.merges
        merging = ladder_settings(scores["tokens_total"]) if merges else [Settings(1.0, confidence=False)]
        rows = sweep(
            engine, [sample.image for sample in samples], [sample.labels for sample in samples],
            [dataclasses.replace(each, input_scale=settings.input_scale) for each in merging], count_gflops,
        )  # fmt: skip
        result["sweep"] = [dataclasses.asdict(row) for row in rows]
    return result
