# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""How far ClusTR's bounded clustering is from the exact one, and what it saves, on real images.

    python scripts/clustr_bounded.py --images DIR [--model DIR | --arch clustr_b1] [--size 512x512]

Without a model the weights are random; what differs is then the clustering's effect on an untrained network.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from clustvit_ros.cli.arguments import parse_size
from clustvit_ros.engine.pixels import to_input
from clustvit_ros.images import read_image
from clustvit_ros.networks import build_network, load_segmenter, network_config
from clustvit_ros.networks.clustr import ClusTR
from clustvit_ros.networks.inference import for_inference
from clustvit_ros.networks.model_folder import InputConfig
from clustvit_ros.training.dataset import find_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    network_choice = parser.add_mutually_exclusive_group()
    network_choice.add_argument("--model", type=Path, help="folder of a trained ClusTR")
    network_choice.add_argument("--arch", default="clustr_b1", help="random weights instead (default: clustr_b1)")
    parser.add_argument("--size", type=parse_size, default=(512, 512), metavar="HxW", help="(default: 512x512)")
    parser.add_argument("--count", type=int, default=3, help="images (default: 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = load_segmenter(args.model) if args.model else build_network(network_config(args.arch, {}), 11).eval()
    network = for_inference(network)
    backbone = network.backbone
    if not isinstance(backbone, ClusTR):
        parser.error(f"{args.model} is no ClusTR")
    paths = list(find_images(args.images).values())
    picked = paths[:: max(len(paths) // args.count, 1)][: args.count]
    config = InputConfig(args.size)
    inputs = [to_input(read_image(path)[None], args.size, config, torch.device("cpu")) for path in picked]
    forms = {"exact": (0, False), "exact, once per stage": (0, True)}
    forms |= {f"windows of {n}, once per stage": (n, True) for n in (4096, 1024, 256)}
    forms["windows of 1024, every block"] = (1024, False)
    reference: list[torch.Tensor] = []
    print(f"{len(inputs)} images at {args.size[0]}x{args.size[1]}")
    for name, (window_tokens, once) in forms.items():
        backbone.window_tokens, backbone.cluster_once = window_tokens, once
        start = time.process_time()
        with torch.inference_mode():
            logits = [network(images).logits for images in inputs]
        seconds = (time.process_time() - start) / len(inputs)
        reference = reference or logits
        error = sum((a - b).abs().mean() / b.std() for a, b in zip(logits, reference, strict=True)) / len(inputs)
        same = sum((a.argmax(1) == b.argmax(1)).float().mean() for a, b in zip(logits, reference, strict=True)) / len(
            inputs
        )
        print(
            f"{name:32} {seconds:6.2f} s  |difference| / std {float(error):.4f}  same label {float(same):.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
