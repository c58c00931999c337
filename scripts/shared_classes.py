#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Scores models on labelled images of other classes, as far as both mean the same: what they are worth elsewhere.

CamVid's models on streets of other towns (the folder needs a dataset.yaml that names its classes; what a model has
learnt from, other pictures of the same places included, says nothing):

    python scripts/shared_classes.py camvid_tiny camvid_small --data LABELMEFACADE --split train \
      --model-groups "building: building; car: car; pavement: sidewalk; road: road; sky: sky; vegetation: tree" \
      --data-groups "building: building, door, window; car: car; pavement: pavement; road: road; sky: sky; vegetation: vegetation"

Groups are written as for the node's parameter `class_groups`. A pixel of which the truth is in no group does not count;
one that is predicted as a class in no group is wrong.
"""  # noqa: E501

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
from tqdm import tqdm

from clustvit_ros.engine import Engine, create_engine
from clustvit_ros.engine.masks import ClassGrouping, Groups, group_classes, parse_groups
from clustvit_ros.errors import ClustvitError, ConfigError
from clustvit_ros.measure.metrics import ConfusionMatrix
from clustvit_ros.networks import load_config
from clustvit_ros.training.dataset import LabelledImages, usable
from clustvit_ros.training.layouts import open_data_set


def score(engine: Engine, of_model: ClassGrouping, data: LabelledImages, of_data: ClassGrouping) -> ConfusionMatrix:
    """Pixels by true and predicted group, at the default merge threshold."""
    matrix = ConfusionMatrix(len(of_data.classes))
    for index in tqdm(range(len(data)), desc="score", leave=False, mininterval=1.0):
        sample = data[index]
        prediction = of_model.apply(engine.segment(sample.image))
        matrix.add(cv2.LUT(sample.labels, of_data.table), prediction.mask[0])
    return matrix


def check_groups(model: Groups, data: Groups) -> None:
    """Refuse groups that cannot be compared.

    Raises:
        ConfigError: there are none, or their names or order differ.
    """
    names = [name for name, _ in model], [name for name, _ in data]
    if names[0] != names[1] or not names[0]:
        raise ConfigError(f"--data-groups: got {', '.join(names[1])}, expected the model's: {', '.join(names[0])}")


def main() -> int:
    """Score, and print one line for each model.

    Returns:
        1 when it cannot be done.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="shipped models' names, or model folders")
    parser.add_argument("--data", type=Path, required=True, help="a data set as `clustvit-ros train` takes it")
    parser.add_argument("--split", default="val", help="split of it (default: val)")
    parser.add_argument("--model-groups", required=True, help="GROUP: CLASS, CLASS; GROUP: CLASS")
    parser.add_argument("--data-groups", required=True, help="the same groups of the data's classes")
    args = parser.parse_args()
    try:
        model_groups, data_groups = parse_groups(args.model_groups), parse_groups(args.data_groups)
        check_groups(model_groups, data_groups)
        data_set = open_data_set(args.data)
        if data_set.classes is None:
            raise ConfigError(f"{args.data}: does not name its classes; write them into its dataset.yaml")
        of_data = group_classes(data_set.classes, data_groups)
        data, _ = usable(data_set.open(args.split, len(data_set.classes), False), "skip", 1)
        for model in args.model:
            of_model = group_classes(load_config(model).classes, model_groups)
            matrix = score(create_engine(model), of_model, data, of_data)
            ious = zip(of_data.classes.names, 100 * matrix.iou(), strict=True)
            each = ", ".join(f"{name} {iou:.1f}" for name, iou in ious)
            print(f"{model}: mIoU {100 * matrix.miou():.2f} on {len(data)} images ({each})")
    except ClustvitError as error:
        print(f"shared_classes: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
