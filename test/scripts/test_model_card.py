# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A card for every kind of network."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from clustvit_ros.classes import ClassSet
from clustvit_ros.networks import ModelConfig, network_config
from clustvit_ros.networks.model_folder import InputConfig, MeasuredPoint

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "model_card.py"
CLASSES = ClassSet.numbered(2)
SCORES = {
    "miou": 61.5, "split": "val", "images": 3, "merge_threshold": 0.5, "tokens_merged_mean": 0.42, "tokens_total": 660,
    "per_class_iou": {CLASSES.names[0]: 61.5, CLASSES.names[1]: None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("clustvit_t", "width 192, 12 blocks, 3 heads, patch stem, 3 clusters after block 3, 2 head block(s)"),
        ("vit_t", "width 192, 12 blocks, 3 heads, patch stem, 2 head block(s)"),
        ("clustr_t", "four stages of width 32, 64, 128, 256 and 1, 2, 4, 1 blocks"),
        ("cast_t", "width 192, 12 blocks, 3 heads, patch stem, 16 clusters of 64 in every block"),
    ],
)
def test_a_card_says_what_the_network_is_and_only_of_one_that_merges_what_it_merges(architecture, says):
    points = tuple(MeasuredPoint(size, 660, 60.0, 0.98) for size in ((352, 480), (192, 256)))
    config = ModelConfig(
        "mine", architecture, network_config(architecture, {}), CLASSES, InputConfig((352, 480)), scores=SCORES,
        operating_points=points,
    )  # fmt: skip
    card = runpy.run_path(str(SCRIPT))["card"](config)
    assert f"| Architecture | {architecture}: {says}" in card
    assert "| mIoU | 61.50 on val (3 images, single scale, whole image)" in card and "not in these images" in card
    assert ("42.0 % of 660 tokens" in card) == ("merged tokens" in card) == (architecture == "clustvit_t")
    assert f"| 192 x 256 | 60.00{' (660)' if architecture == 'clustvit_t' else ''} | 98.0 % |" in card
