# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros train`: recipe and data in, model folder out."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

from clustvit_ros.cli.arguments import EXIT_TIME_UP, add_training_options, parse_size, prepare
from clustvit_ros.config import to_mapping
from clustvit_ros.engine import Settings
from clustvit_ros.engine.network_engine import select_device
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.measure.evaluation import evaluate, fit_temperature
from clustvit_ros.networks.model_folder import (
    WEIGHTS_FILE,
    ModelConfig,
    load_config,
    load_segmenter,
    save_config,
    save_model,
)
from clustvit_ros.networks.segmenter import Segmenter
from clustvit_ros.paths import find_recipe
from clustvit_ros.training.dataset import BadFile, LabelledImages, group_images, joined, usable
from clustvit_ros.training.distributed import Processes, processes
from clustvit_ros.training.layouts import open_data_set
from clustvit_ros.training.loop import LOG, RunOptions, TimeUp, tensorboard_writer
from clustvit_ros.training.optimisation import Optimisation
from clustvit_ros.training.recipe import Recipe, read_recipe
from clustvit_ros.training.run_folder import (
    CHECKPOINT,
    check_data_listing,
    draw_log,
    list_data,
    owned,
    read_done,
    warn_of_leaks,
    write_done,
    write_run_files,
    write_text,
    writing,
)
from clustvit_ros.training.trainer import Trainer

S = TypeVar("S", bound=Optimisation)


def overridden(schedule: S, args: argparse.Namespace) -> S:
    """A recipe's schedule with what the options say instead.

    Raises:
        ConfigError: a value out of range.
    """
    names = ("epochs", "batch_size", "learning_rate", "precision", "seed")
    return dataclasses.replace(
        schedule, **{name: getattr(args, name) for name in names if getattr(args, name) is not None}
    )


def run_options(args: argparse.Namespace, run_dir: Path, is_main: bool, spent_s: float = 0.0) -> RunOptions:
    """How a run is carried out; `spent_s` of the time limit have gone already."""
    on_record: Callable[[dict[str, Any]], None] = lambda record: None  # noqa: E731
    if args.tensorboard and is_main:
        on_record = tensorboard_writer(run_dir)
    limit_s = max(args.time_limit * 60.0 - spent_s, 0.001) if args.time_limit else 0.0
    return RunOptions(time_limit_s=limit_s, compile=args.compile, on_record=on_record)


# mIoU points; half-precision weights that cost more than this are not shipped.
_MAX_HALF_PRECISION_LOSS = 0.1
_FOLDS_FILE = "folds.json"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="train a model on labelled images; continues where it was interrupted")
    parser.add_argument("recipe", help="a shipped recipe's name, e.g. finetune, or a recipe file")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="[NAME=]DIR",
        help="folder with {train,val}/{images,labels}, a dataset.yaml, or a published data set as it comes; for a "
        "joint training one for each name in the recipe's data",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="run folder for checkpoint, log and model (default: runs/<name>)")
    parser.add_argument("--init", help="weights to start from, instead of the recipe's init")
    parser.add_argument(
        "--input-size", type=parse_size, metavar="HxW", help="what the network shall see, instead of the recipe's input"
    )
    parser.add_argument(
        "--without-merging",
        action="store_true",
        help="train the recipe's plain ViT twin instead, <name>_vit: everything alike, nothing merged",
    )
    parser.add_argument("--val-split", default="val", help="the split that chooses the best weights (default: val)")
    parser.add_argument(
        "--folds", default="", metavar="N|group",
        help="hold out each N-th part of the training split in turn, then train on all of it; or each group of both "
        "splits, or of train where there is no other (dataset.yaml says what one is, e.g. a drive), then train",
    )  # fmt: skip
    parser.add_argument("--folds-only", action="store_true", help="end when the folds are scored")
    add_training_options(parser)
    parser.set_defaults(run=run)


class _Part(NamedTuple):
    """One training of a run: all of it, or one fold."""

    run_dir: Path
    train: LabelledImages
    val: LabelledImages | None
    val_name: str
    is_fold: bool = False


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    prepare(args)
    by_group = args.folds == "group"
    folds = -1 if by_group else int(args.folds) if args.folds.isdecimal() else 0
    if args.folds and not by_group and folds < 2:
        raise ConfigError(f"--folds: got {args.folds}, expected a number of at least 2, or group")
    if args.folds_only and not args.folds:
        raise ConfigError("--folds-only: got no --folds, expected --folds N or --folds group beside it")
    args.recipe = find_recipe(args.recipe)
    if args.init == "":
        raise ConfigError("--init: got nothing, expected weights to start from; leave it out for the recipe's own")
    recipe = read_recipe(args.recipe, args.init)
    if args.without_merging:
        recipe = recipe.without_merging()
    recipe = dataclasses.replace(recipe, schedule=overridden(recipe.schedule, args))
    if args.input_size is not None:
        recipe = dataclasses.replace(recipe, input=dataclasses.replace(recipe.input, size=args.input_size))
    data_set, *further_sets = (open_data_set(folder) for folder in recipe.folders(args.data))
    recipe = recipe.with_classes(data_set.classes, *(further.classes for further in further_sets))
    config = recipe.model_config()
    run_dir = args.out or Path("runs") / recipe.name
    alone = folds > 0 or (by_group and list(data_set.splits) == ["train"])
    names = ["train"] if alone else ["train", args.val_split]
    # What lacks a label is listed with all else that cannot be used.
    opened = {name: data_set.open(name, len(config.classes), strict=False) for name in names}
    for source, other in zip(recipe.sources[1:], further_sets, strict=True):
        opened[source.name] = other.open("train", len(source.classes), strict=False)
    left_out: list[BadFile] = []
    splits: dict[str, LabelledImages] = {}
    for name, data in opened.items():
        splits[name], findings = usable(data, args.bad_data, config.network.patch_size)
        left_out += findings
    parts = _group_parts(run_dir, splits, names, data_set.group) if by_group else _parts(run_dir, splits, names, folds)
    if args.folds_only:
        parts.pop()
    further = [splits[source.name] for source in recipe.sources[1:]]
    with processes(args.device) as (here, device_name), owned(run_dir) if here.is_main else nullcontext():
        device, reason = select_device(device_name)
        told, listing = False, list_data(splits, left_out) if here.is_main else {}

        def accepted() -> None:
            """Called once nothing speaks against this training any more: only now are the last run's files replaced."""
            nonlocal told
            if not told and here.is_main:
                facts = {"seed": recipe.schedule.seed, "processes": here.world_size}
                write_run_files(run_dir, recipe, device, facts, listing)
                print(f"{recipe.name}: device {device}{f' ({reason})' if reason else ''}, run folder {run_dir}")
            told = True

        if here.is_main:
            check_data_listing(run_dir, listing)
            warn_of_leaks(listing, args.val_split)
            if by_group:
                held_out = {part.val_name: len(part.val) for part in parts if part.is_fold and part.val}
                outside = sum(len(splits[name]) for name in names) - sum(held_out.values())
                counts = "; ".join(f"{name} ({count} images)" for name, count in held_out.items())
                print(f"held out in turn: {counts}; {outside} images in no fold")
        here.wait()
        for part in parts:  # all, before the first is trained
            read_done(part.run_dir, recipe, part.train, part.val, part.val_name)
        try:
            results = [_train_part(part, further, recipe, args, device, here, started, accepted) for part in parts]
        except TimeUp:
            if here.is_main:
                print(f"time limit of {args.time_limit:g} min reached; the same command continues in {run_dir}")
            return EXIT_TIME_UP
        except KeyboardInterrupt:
            if here.is_main:
                where = "after its last epoch" if any(run_dir.rglob(CHECKPOINT)) else "from the start"
                print(f"\nstopped; the same command continues in {run_dir} {where}", file=sys.stderr)
            raise
        if folds and here.is_main:
            _summarise_folds(run_dir, config, [part for part in parts if part.is_fold], results, str(device))
    return 0


def _group_parts(
    run_dir: Path, splits: dict[str, LabelledImages], names: list[str], group: str | tuple[str, ...]
) -> list[_Part]:
    """A fold for each group of `names`, train and maybe val, and the training that there would be without folds."""
    data = joined([splits[name] for name in names], same_classes=True)
    groups = group_images(data, group)
    parts = []
    for name, held_out in groups.items():
        train = data.subset(index for other, indices in groups.items() if other != name for index in indices)
        parts.append(_Part(run_dir / f"fold_{name}", train, data.subset(held_out), name, is_fold=True))
    whole = _parts(run_dir, splits, names, 0) if names[1:] else [_Part(run_dir, splits["train"], None, "")]
    return [*parts, *whole]


def _parts(run_dir: Path, splits: dict[str, LabelledImages], names: list[str], folds: int) -> list[_Part]:
    if not folds:
        return [_Part(run_dir, splits[names[0]], splits[names[1]], names[1])]
    data = splits["train"]
    if len(data) < folds:
        raise ConfigError(f"--folds: got {folds} for {len(data)} images, expected at most as many folds as images")
    parts = []
    for fold in range(folds):
        held_out = range(fold, len(data), folds)
        train = data.subset(index for index in range(len(data)) if index % folds != fold)
        name = f"fold {fold + 1} of {folds}"
        parts.append(_Part(run_dir / f"fold{fold + 1}", train, data.subset(held_out), name, is_fold=True))
    return [*parts, _Part(run_dir, data, None, "")]


def _train_part(
    part: _Part, further: list[LabelledImages], recipe: Recipe, args: argparse.Namespace, device: torch.device,
    here: Processes, started: float, accepted: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    """Train one part to its end, or look up what came of it before; its scores."""
    before = read_done(part.run_dir, recipe, part.train, part.val, part.val_name)
    if before is not None:
        if here.is_main:
            print(f"{part.run_dir}: already trained, {_describe(before)}")
        return before
    options = run_options(args, part.run_dir, here.is_main, spent_s=time.monotonic() - started)
    cache_bytes = round(args.cache_gb * 1e9)
    trainer = Trainer(recipe, part.train, part.run_dir, device, here, options, cache_bytes, further)
    accepted()
    config = trainer.config
    if here.is_main:
        parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
        beside = zip(further, recipe.sources[1:], strict=True)
        print(
            f"{parameters / 1e6:.2f} M parameters, {len(part.train)} training"
            f"{''.join(f', {len(data)} of {source.name}' for data, source in beside)} and "
            f"{len(part.val) if part.val else 'no'} validation images, {trainer.precision.name}, "
            f"epoch {trainer.epoch} of {recipe.schedule.epochs}"
        )
        if trainer.init_report:
            print(f"init: {trainer.init_report}")
            write_text(part.run_dir / "init.json", json.dumps(trainer.init_report._asdict(), indent=1) + "\n")
    model_dir = part.run_dir / "model"

    def engine(network: Segmenter) -> TorchEngine:
        return TorchEngine(network, config, str(device))

    def validate(network: Segmenter) -> dict[str, Any]:
        return evaluate(engine(_rounded(network)), part.val) if part.val else {}

    # What a fold holds out scores its last weights, and chooses none.
    chooses = part.val is not None and not part.is_fold
    trainer.train(validate if chooses else None, lambda network: _save(model_dir, config, network))
    scores: dict[str, Any] = {}
    if here.is_main:
        draw_log(part.run_dir / LOG)
        origin = args.recipe.name + (" --without-merging" if args.without_merging else "")
        scores = _finish(model_dir, config, recipe, origin, part, engine)
        write_done(part.run_dir, recipe, part.train, part.val, scores)
    here.wait()
    return scores


def _finish(
    model_dir: Path, config: ModelConfig, recipe: Recipe, recipe_name: str, part: _Part,
    engine: Callable[[Segmenter], TorchEngine],
) -> dict[str, Any]:  # fmt: skip
    """Write the best weights of all validations, halved on disk unless that costs accuracy; their scores.

    Their temperature is fitted on the images that score them, and written where those have chosen them before: a fold's
    comes from the other folds.
    """
    best = load_segmenter(model_dir)
    best.temperature = 1.0  # interrupted after it was written, this runs again
    dtype = torch.float16
    scores: dict[str, Any] = {}
    if part.val:
        halved, full = (evaluate(engine(network), part.val) for network in (_rounded(best), best))
        if halved["miou"] < full["miou"] - _MAX_HALF_PRECISION_LOSS:
            dtype, halved = torch.float32, full
        try:
            fitted = fit_temperature(engine(best), part.val)
        except DataError as error:  # of hardly any labelled pixel, which is no reason to lose a training
            fitted = 1.0
            print(f"the temperature stays 1: {error}", file=sys.stderr)
        split = f"{part.val_name}, held out" if part.is_fold else part.val_name
        scores = {"split": split, "merge_threshold": Settings().merge_threshold, **halved, "temperature": fitted}
        if not part.is_fold:
            config = dataclasses.replace(config, temperature=fitted)
    config = dataclasses.replace(config, training=_provenance(recipe, recipe_name), scores=scores)
    _save(model_dir, config, best, dtype)
    print(f"{_describe(scores)}; model in {model_dir}")
    print(f"use it with --model {model_dir}, and in the node as model:={model_dir.resolve()}")
    return scores


def _save(model_dir: Path, config: ModelConfig, network: Segmenter, dtype: torch.dtype = torch.float32) -> None:
    with writing(model_dir / WEIGHTS_FILE):
        save_model(model_dir, config, network, dtype)


def _rounded(network: Segmenter) -> Segmenter:
    """A copy whose weights are rounded to half precision: what is validated is what will be shipped."""
    rounded = copy.deepcopy(network)
    for tensor in rounded.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    return rounded


def _provenance(recipe: Recipe, recipe_name: str) -> dict[str, Any]:
    return {
        "data": recipe.about_data, "recipe": recipe_name, "init": "/".join(Path(recipe.init).parts[-2:]),
        "augmentation": to_mapping(recipe.augmentation), "schedule": to_mapping(recipe.schedule),
    }  # fmt: skip


def _describe(scores: dict[str, Any]) -> str:
    if "miou" not in scores:
        return "trained without validation"
    return f"mIoU {scores['miou']:.2f} with {100 * scores['tokens_merged_mean']:.1f} % of the tokens merged"


def _mean_temperature(temperatures: list[float]) -> float:
    return round(statistics.geometric_mean(temperatures), 3)


def _summarise_folds(
    run_dir: Path, config: ModelConfig, parts: list[_Part], results: list[dict[str, Any]], device: str
) -> None:
    """Write the folds' scores, and put their mean and spread into the final model, beside what the last split says.

    The final model gets the mean of the folds' temperatures, each fold's the mean of the others'.
    """
    folds = results[: len(parts)]
    temperatures = [scores["temperature"] for scores in folds]
    errors = []
    for index, part in enumerate(parts):
        others = temperatures[:index] + temperatures[index + 1 :]
        fold_dir = part.run_dir / "model"
        save_config(fold_dir, dataclasses.replace(load_config(fold_dir), temperature=_mean_temperature(others)))
        errors.append(evaluate(TorchEngine.from_model(fold_dir, device), cast(LabelledImages, part.val))["ece"])
    mious = [scores["miou"] for scores in folds]
    per_class: dict[str, float | None] = {}
    for name in config.classes.names:
        values = [scores["per_class_iou"][name] for scores in folds if scores["per_class_iou"][name] is not None]
        per_class[name] = round(statistics.fmean(values), 3) if values else None
    summary = {
        "split": f"mean of {len(folds)} held-out folds: {', '.join(part.val_name for part in parts)}",
        "merge_threshold": Settings().merge_threshold, "miou": round(statistics.fmean(mious), 3),
        "miou_std": round(statistics.stdev(mious), 3), "miou_folds": mious,
        "ece": round(statistics.fmean(errors), 4), "ece_folds": errors,
        "ece_uncalibrated": round(statistics.fmean(scores["ece"] for scores in folds), 4),
        "per_class_iou": per_class, "images": sum(scores["images"] for scores in folds),
        "tokens_total": folds[0]["tokens_total"],
        "tokens_kept_mean": round(statistics.fmean(scores["tokens_kept_mean"] for scores in folds), 2),
        "tokens_merged_mean": round(statistics.fmean(scores["tokens_merged_mean"] for scores in folds), 4),
    }  # fmt: skip
    write_text(run_dir / _FOLDS_FILE, json.dumps({"summary": summary, "folds": folds}, indent=1) + "\n")
    text = (
        f"{len(folds)} folds: mIoU {summary['miou']:.2f} +- {summary['miou_std']:.2f} "
        f"({', '.join(f'{part.val_name} {miou:.2f}' for part, miou in zip(parts, mious, strict=True))}), "
        f"{100 * summary['tokens_merged_mean']:.1f} % merged, calibration error {summary['ece']:.3f} with the other "
        f"folds' temperature, {summary['ece_uncalibrated']:.3f} without"
    )
    if len(results) == len(folds):
        print(f"{text}; no model of all images was asked for")
        return
    final = results[-1]
    model_dir = run_dir / "model"
    trained = load_config(model_dir)
    if "miou" in final:
        summary["beside"] = {key: final[key] for key in ("split", "miou", "images", "tokens_merged_mean")}
        text += f"; {final['split']} mIoU {final['miou']:.2f}"
    trained = dataclasses.replace(trained, scores=summary, temperature=_mean_temperature(temperatures))
    _save(model_dir, trained, load_segmenter(model_dir), torch.float16)
    print(f"{text}; the model of {'the training split' if 'miou' in final else 'all images'} is in {model_dir}")
