"""`clustvit-ros evaluate`: scores of a model on labelled images, as JSON, with pictures on request."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from clustvit_ros.cli.arguments import add_variants, find_variants
from clustvit_ros.cli.evaluation import evaluate
from clustvit_ros.cli.pictures import comparison, write_image
from clustvit_ros.modeling.model_folder import load_config
from clustvit_ros.runtime import Prediction, Settings, create_engine
from clustvit_ros.training.dataset import LabelledImages, Sample


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="score a model on labelled images")
    parser.add_argument("--model", required=True, help="a shipped model's name or a model folder")
    add_variants(parser)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--labels", type=Path, required=True, help="folder of <stem>.png with class ids, 255 = void")
    parser.add_argument("--merge-threshold", type=float, default=0.5, help="0..1, 1 merges nothing (default: 0.5)")
    parser.add_argument(
        "--token-capacity", type=int, default=0, help="upper bound on kept tokens, 0 = none (default: 0)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = automatic (default: 0)")
    parser.add_argument("--json", type=Path, help="write the scores to this file")
    parser.add_argument("--pictures", type=Path, help="write image, prediction, truth and clusters side by side here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    classes = load_config(args.model).classes
    data = LabelledImages(args.images, args.labels, len(classes))
    settings = Settings(
        merge_threshold=args.merge_threshold,
        token_capacity=args.token_capacity,
        confidence=False,
        clusters=args.pictures is not None,
    )
    with tempfile.TemporaryDirectory(prefix="clustvit_evaluate_") as folder:
        models = find_variants(args, args.model, Path(folder))
        reports = [_evaluate(args, str(model), data, settings) for model in models]
    for report in reports if len(reports) > 1 else []:
        print(_summary(report, f"{report['model']:<32}"))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = reports[0] if len(reports) == 1 else reports
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _evaluate(args: argparse.Namespace, model: str, data: LabelledImages, settings: Settings) -> dict[str, Any]:
    """Score a model, and print its classes."""
    engine = create_engine(model, device=args.device, threads=args.threads)
    info = engine.info
    several = len(args.merge) * len(args.decode) > 1

    def draw(sample: Sample, prediction: Prediction) -> None:
        folder = args.pictures / info.model if several else args.pictures
        write_image(folder / f"{sample.stem}.png", comparison(sample, prediction, info.classes.palette()))

    scores = evaluate(engine, data, settings, draw if args.pictures else None)
    report = {
        "model": info.model,
        "engine": info.engine,
        "device": info.device,
        "merge_threshold": settings.merge_threshold,
        "token_capacity": settings.token_capacity,
        **scores,
    }
    if not several:
        for name, iou in scores["per_class_iou"].items():
            print(f"  {name:<16}{'-' if iou is None else f'{iou:6.2f}'}")
        print(_summary(report, ""))
    return report


def _summary(report: dict[str, Any], title: str) -> str:
    return (
        f"{title}mIoU {report['miou']:.2f} on {report['images']} images; "
        f"{report['tokens_kept_mean']:.0f} of {report['tokens_total']} tokens kept; "
        f"{report['latency_ms_p50']:.1f} ms per image (p50) on {report['device']}"
    )
