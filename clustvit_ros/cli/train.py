"""`clustvit-ros train`: recipe and data in, model folder out."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from clustvit_ros.cli.evaluation import evaluate
from clustvit_ros.config import to_mapping
from clustvit_ros.modeling.model_folder import load_segmenter, save_model
from clustvit_ros.modeling.segmenter import Segmenter
from clustvit_ros.runtime import Settings
from clustvit_ros.runtime.device import select_device
from clustvit_ros.runtime.torch_engine import TorchEngine
from clustvit_ros.training.dataset import LabelledImages
from clustvit_ros.training.recipe import read_recipe
from clustvit_ros.training.trainer import Trainer

# mIoU points; half-precision weights that cost more than this are not shipped.
_MAX_HALF_PRECISION_LOSS = 0.02


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="train a model on labelled images; continues where it was interrupted")
    parser.add_argument("recipe", type=Path, help="recipe file, e.g. config/train/camvid_tiny.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder with {train,val}/{images,labels}")
    parser.add_argument("--out", type=Path, help="run folder for checkpoint, log and model (default: runs/<name>)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = automatic")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.recipe)
    config = recipe.model_config()
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    device, reason = select_device(args.device)
    run_dir = args.out or Path("runs") / recipe.name
    num_classes = len(config.classes)
    train_data, val_data = (
        LabelledImages(args.data / split / "images", args.data / split / "labels", num_classes)
        for split in ("train", "val")
    )
    trainer = Trainer(recipe, train_data, run_dir, device)
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    print(
        f"{recipe.name}: {parameters / 1e6:.2f} M parameters, "
        f"{len(train_data)} training and {len(val_data)} validation "
        f"images, device {device}{f' ({reason})' if reason else ''}, "
        f"epoch {trainer.epoch} of {recipe.schedule.epochs}"
    )

    def validate(network: Segmenter) -> dict[str, Any]:
        return evaluate(TorchEngine(network, config, str(device)), val_data)

    def save_best(network: Segmenter) -> None:
        save_model(run_dir / "model", config, network)

    trainer.train(validate, save_best)
    # The best weights of all validations, halved on disk unless that costs accuracy.
    best = load_segmenter(run_dir / "model")
    full = validate(best)
    save_model(run_dir / "model", config, best, torch.float16)
    scores = validate(load_segmenter(run_dir / "model"))
    dtype = torch.float16 if scores["miou"] >= full["miou"] - _MAX_HALF_PRECISION_LOSS else torch.float32
    if dtype is torch.float32:
        scores = full
    provenance = {
        "data": recipe.data,
        "recipe": args.recipe.name,
        "augmentation": to_mapping(recipe.augmentation),
        "schedule": to_mapping(recipe.schedule),
    }
    scores = {"split": "val", "merge_threshold": Settings().merge_threshold, **scores}
    save_model(run_dir / "model", dataclasses.replace(config, training=provenance, scores=scores), best, dtype)
    print(
        f"mIoU {scores['miou']:.2f} with {100 * scores['tokens_merged_mean']:.1f} % of the tokens merged; "
        f"model in {run_dir / 'model'}"
    )
    return 0
