#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Averages the weights of a model and of one that was trained on from it.

What was learnt on top, here smaller inputs, is kept for the most part, and little of what the first could do is lost
(Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903).
Usage: `python scripts/average_models.py FIRST TRAINED_ON --share 0.3 --out FOLDER`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.networks.model_folder import check_weights, load_config, load_segmenter, save_model


def average(first: str, second: str, share: float, folder: Path) -> None:
    """Write the model (1 - share) * first + share * second.

    Args:
        first: a model; the result has its configuration, without its operating points.
        second: a model of the same network.
        share: of the second one, 0..1.
        folder: to write.

    Raises:
        ConfigError: the share is out of range.
        ModelError: a model cannot be loaded, or the networks differ.
    """
    config = load_config(first)
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"--share: got {share:g}, expected 0 to 1")
    network = load_segmenter(first)
    other = load_segmenter(second).state_dict()
    check_weights(network, other, second)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(other[name], share)
    training = {**config.training, "averaged_with": {"model": Path(second).name, "share": share}}
    save_model(folder, dataclasses.replace(config, training=training, operating_points=()), network, torch.float16)


def main() -> int:
    """Average, and say where.

    Returns:
        1 when it cannot be done.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("first", help="a model folder, or a shipped model's name")
    parser.add_argument("second", help="what was trained on from it")
    parser.add_argument("--share", type=float, default=0.3, help="of the second one (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    options = parser.parse_args()
    try:
        average(options.first, options.second, options.share, options.out)
    except ClustvitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
