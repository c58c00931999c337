#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Writes a model's card: README.md from its model.yaml, and example.jpg from labelled images.

scripts/model_card.py models/camvid_tiny --data ../shared/data/camvid/val
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.measure.pictures import comparison
from clustvit_ros.networks import ModelConfig, build_network, load_config
from clustvit_ros.networks.cast import CASTConfig
from clustvit_ros.networks.clustr import ClusTRConfig
from clustvit_ros.networks.segmenter import NetworkConfig
from clustvit_ros.training.dataset import LabelledImages

EXAMPLE = "example.jpg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--rows", type=int, default=3, help="images in the picture (default: 3)")
    args = parser.parse_args()
    config = load_config(args.model)
    data = LabelledImages(args.data / "images", args.data / "labels", len(config.classes))
    engine = create_engine(str(args.model))
    rows = []
    for index in range(args.rows):
        sample = data[(2 * index + 1) * len(data) // (2 * args.rows)]
        prediction = engine.segment(sample.image, Settings(clusters=config.network.merges))
        rows.append(comparison(sample, prediction, config.classes.palette()))
    picture = cv2.resize(np.vstack(rows), None, fx=0.67, fy=0.67, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(args.model / EXAMPLE), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
    (args.model / "README.md").write_text(card(config), encoding="utf-8")


def card(config: ModelConfig) -> str:
    """The model card as Markdown."""
    network, scores = config.network, config.scores
    init = config.training.get("init")
    start = (
        f"from `{init}`: beyond what that was trained on, it has seen" if init else "from random weights: it has seen"
    )
    parameters = sum(p.numel() for p in build_network(network, len(config.classes)).parameters())
    spread = f" +- {scores['miou_std']:.2f}" if "miou_std" in scores else ""
    elsewhere = scores.get("unseen")
    unseen = elsewhere and f"| mIoU, {elsewhere['split']} | {elsewhere['miou']} ({elsewhere['images']} images) |\n"
    classes = "\n".join(
        f"| {index} | {name} | {', '.join(map(str, colour))} | {_stated(scores['per_class_iou'][name])} |"
        for index, (name, colour) in enumerate(zip(config.classes.names, config.classes.colours, strict=True))
    )
    # A model scored on folds has been trained on all images in the end.
    trained_on = "; the model was trained on these images" if "miou_folds" in scores else ""
    panels, shown, threshold, merged = "image, prediction, ground truth", "", "", ""
    if network.merges:
        panels, shown = f"{panels}, merged tokens", ", merged tokens in colour over the image"
        threshold = f" at merge threshold {scores['merge_threshold']}"
        share = f"{100 * scores['tokens_merged_mean']:.1f} % of {scores['tokens_total']} tokens"
        merged = f"| Merged | {share} at that threshold |\n"
    return f"""# {config.name}

![{panels}]({EXAMPLE})

*Left to right: image, prediction, ground truth (void black){shown}{trained_on}.*

| | |
|---|---|
| Architecture | {config.architecture}: {_layers(network)} |
| Parameters | {parameters / 1e6:.2f} million |
| Input | {config.input.size[0]} x {config.input.size[1]} px (other aspects: about as many pixels), RGB |
| Data | {config.training.get("data", "")} |
{unseen or ""}| mIoU | {scores["miou"]:.2f}{spread} on {scores["split"]} ({scores["images"]} images, single scale, \
whole image){threshold} |
{merged}| Licence | {config.licence} |

| id | class | colour (R, G, B) | IoU |
|---|---|---|---|
{classes}

Made by `clustvit-ros train` with the recipe `{config.training.get("recipe", "")}`, {start}
nothing but the training images named above. Meant for trying the package and for scenes like those; do not let a
robot's safety depend on it. Thin and rare classes (low IoU in the table) are where it fails first.
{point_table(config)}"""


def _layers(network: NetworkConfig) -> str:
    if isinstance(network, ClusTRConfig):
        widths, blocks = (", ".join(map(str, values)) for values in (network.embed_dims, network.depths))
        return f"four stages of width {widths} and {blocks} blocks, feature-pyramid head"
    mlps = "" if network.mlp_ratio == 4.0 else f"MLPs of {int(network.embed_dim * network.mlp_ratio)}, "
    text = f"width {network.embed_dim}, {network.depth} blocks, {network.num_heads} heads, {mlps}{network.stem} stem, "
    if isinstance(network, CASTConfig):
        return f"{text}{network.num_clusters} clusters of {network.cluster_size} in every block, segmenter head"
    if network.merges:
        text += f"{network.num_clusters} clusters after block {network.injection_point}, "
    return text + (f"{network.head_depth} head block(s)" if network.head == "segmenter" else f"{network.head} head")


def _stated(iou: float | None) -> str:
    return "not in these images" if iou is None else f"{iou:.1f}"


def point_table(config: ModelConfig) -> str:
    """What smaller inputs and fewer tokens cost, as Markdown; empty where nobody measured."""
    if not config.operating_points:
        return ""
    lines = []
    for size in dict.fromkeys(point.size for point in config.operating_points):
        points = sorted((p.capacity, p.miou, p.agreement) for p in config.operating_points if p.size == size)
        cells = [f"{miou:.2f} ({capacity})" if config.network.merges else f"{miou:.2f}" for capacity, miou, _ in points]
        lines.append(f"| {size[0]} x {size[1]} | {' | '.join(cells)} | {100 * points[-1][2]:.1f} % |")
    count = max(line.count("|") for line in lines) - 3
    head = {1: ["mIoU"], 4: ["an eighth", "a quarter", "half", "all"]}.get(count, [""] * count)
    by, of_size = "input size", ""
    if config.network.merges:
        by, of_size = "input size and share of tokens kept (tokens)", " with all\ntokens of that size"
    return f"""
mIoU by {by}, and the share of pixels that equal the full network's{of_size} (`clustvit-ros tune --write`):

| Input | {' | '.join(head)} | equal |
|{'---|' * (count + 2)}
{chr(10).join(lines)}
"""


if __name__ == "__main__":
    main()
