# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The shipped model on worlds that it has not seen: accuracy that any clone can check, without outside data."""

from __future__ import annotations

import cv2
import pytest

pytest.importorskip("panda3d", reason="needs panda3d (the 'sim' extra)")

from clustvit_ros.engine import Settings, create_engine
from clustvit_ros.measure.metrics import ConfusionMatrix
from clustvit_ros.networks import load_config
from clustvit_ros.sim import SIM_CLASSES
from clustvit_ros.sim.camera import sample_frames

FLOOR_MIOU = 86.5
FRAMES = 30


@pytest.fixture(scope="module")
def frames():
    """Frames of a seed that neither training nor validation used."""
    return [frame for _, frame in sample_frames(FRAMES, 20_000, "val")]


@pytest.fixture(scope="module")
def engine():
    return create_engine("sim_tiny", device="cpu")


def score(engine, frames, settings: Settings) -> tuple[float, float]:
    """mIoU in percent, and the share of tokens merged."""
    matrix, merged = ConfusionMatrix(len(SIM_CLASSES)), 0.0
    for frame in frames:
        prediction = engine.segment(cv2.cvtColor(frame.image, cv2.COLOR_BGR2RGB), settings)
        matrix.add(frame.labels, prediction.mask[0])
        merged += 1.0 - prediction.stats.tokens_kept / prediction.stats.tokens_total
    return 100 * float(matrix.miou()), merged / len(frames)


def test_the_model_has_the_classes_of_the_simulated_world():
    assert load_config("sim_tiny").classes == SIM_CLASSES


def test_unseen_worlds_are_segmented_well_with_a_third_of_the_tokens_merged(engine, frames):
    miou, merged = score(engine, frames, Settings())
    assert miou >= FLOOR_MIOU
    assert 0.3 <= merged <= 0.8


def test_merging_at_the_default_threshold_costs_little(engine, frames):
    unmerged, nothing = score(engine, frames[:12], Settings(merge_threshold=1.0))
    merged, _ = score(engine, frames[:12], Settings())
    assert nothing == 0.0
    assert merged >= unmerged - 2.0
