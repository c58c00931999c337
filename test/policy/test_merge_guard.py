# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The accuracy guard under scripted agreements, and exemptions and checks with an engine that is told what to see."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.engine import Engine, EngineInfo, Prediction, ScriptedEngine, Settings
from clustvit_ros.engine.exemption import exempt_class_ids
from clustvit_ros.engine.ladder import OperatingPoint, WorthOrder
from clustvit_ros.errors import ConfigError
from clustvit_ros.policy.merge_guard import AccuracyGuard, Agreement, MergeGuard, compare
from clustvit_ros.policy.parameter_spec import build
from clustvit_ros.policy.parameters import SegmentationParameters

POINTS = [OperatingPoint(1.0, capacity, 80) for capacity in range(10, 81, 10)]
WORTH = WorthOrder()


class Scene:
    """Agreement by kept tokens, and a guard that is asked every period."""

    def __init__(self, agreement_of, min_agreement=0.9, wanted=10):
        self.guard = AccuracyGuard(0.0, WORTH)
        self.agreement_of, self.min_agreement, self.wanted = agreement_of, min_agreement, wanted
        self.now_s = 0.0

    def run(self, checks):
        floors = []
        for _ in range(checks):
            self.now_s += 5.0
            assert self.guard.due(self.now_s, 5.0)
            used = max(self.wanted, self.floor)
            agreement = Agreement(self.agreement_of(used))
            point = OperatingPoint(1.0, used, 80)
            self.guard.observe(agreement, self.now_s, self.min_agreement, point, POINTS)
            floors.append(self.floor)
        return floors

    @property
    def floor(self):
        return self.guard.floor.capacity if self.guard.floor else 0


def test_checks_come_once_per_period_and_never_without_one():
    guard = AccuracyGuard(100.0, WORTH)
    assert not guard.due(104.9, 5.0) and guard.due(105.0, 5.0) and not guard.overdue(109.0, 5.0)
    assert guard.overdue(110.0, 5.0)
    guard.skip(110.0)
    assert not guard.due(114.0, 5.0)
    assert not guard.due(1e9, 0.0) and not guard.overdue(1e9, 0.0)


def test_good_agreement_leaves_merging_alone():
    assert Scene(lambda used: 0.99).run(50) == [0] * 50


def test_merging_backs_off_until_agreement_suffices():
    scene = Scene(lambda used: 0.5 + used / 160)  # 0.9 needs 64 tokens
    floors = scene.run(8)
    assert floors[:6] == [20, 30, 40, 50, 60, 70] and floors[-1] == 70


def test_it_starts_from_what_was_used_not_from_the_floor():
    assert Scene(lambda used: 0.5, wanted=40).run(1) == [50]


def test_the_floor_ends_at_all_tokens():
    assert Scene(lambda used: 0.1).run(20)[-1] == 80


def test_it_recovers_when_the_scene_does():
    scene = Scene(lambda used: 0.5)
    assert scene.run(4)[-1] == 50
    scene.agreement_of = lambda used: 1.0
    floors = scene.run(40)
    assert floors[-1] == 0 and floors == sorted(floors, reverse=True)


def test_agreement_just_above_the_bound_keeps_the_floor():
    scene = Scene(lambda used: 0.5)
    scene.run(3)
    scene.agreement_of = lambda used: 0.91
    assert set(scene.run(30)) == {40}


def test_a_scene_at_the_border_does_not_swing():
    # Good with 40 tokens or more, bad below: each lowering is found wanting.
    scene = Scene(lambda used: 0.99 if used >= 40 else 0.7)
    floors = scene.run(300)
    changes = sum(a != b for a, b in pairwise(floors[100:]))
    assert changes <= 10 and floors.count(40) / len(floors) > 0.9


def test_no_bound_is_no_floor():
    scene = Scene(lambda used: 0.5)
    scene.run(3)
    scene.min_agreement = 0.0
    assert scene.run(2) == [0, 0]


def test_it_backs_off_along_both_axes_and_comes_back():
    ladder = [OperatingPoint(0.5, 5, 20), OperatingPoint(0.5, 20, 20), *POINTS[3::4]]
    guard = AccuracyGuard(0.0, WORTH)
    for expected in (ladder[1], ladder[2], ladder[3], ladder[3]):
        guard.observe(Agreement(0.5), 5.0, 0.9, guard.floor or ladder[0], ladder)
        assert guard.floor == expected
    for _ in range(40):
        guard.observe(Agreement(1.0), 5.0, 0.9, guard.floor or ladder[0], ladder)
    assert guard.floor is None


def test_a_floor_holds_for_images_of_another_size():
    worth = [OperatingPoint(1.0, capacity, 8) for capacity in range(1, 9)]
    scene = Scene(lambda used: 0.5)
    scene.run(2)
    assert [point.capacity for point in worth if WORTH(point) >= WORTH(scene.guard.floor)] == [3, 4, 5, 6, 7, 8]


SIZE = (64, 96)
LADDER = ScriptedEngine().capacities(SIZE)  # 24 tokens: every third


class LossyEngine(Engine):
    """Masks lose pixels with every token that is merged; remembers what it was asked."""

    def __init__(self, lost_per_token: float) -> None:
        self.lost_per_token = lost_per_token
        self.calls: list[Settings] = []
        self.failure: Exception | None = None

    @property
    def info(self) -> EngineInfo:
        return ScriptedEngine().info

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        pass

    def input_size(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, int]:
        return image_size

    def capacities(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, ...]:
        return LADDER

    def segment(self, images: Any, settings: Settings = Settings()) -> Prediction:
        self.calls.append(settings)
        if self.failure is not None:
            raise self.failure
        prediction = ScriptedEngine().segment(images, settings)
        merged = LADDER[-1] - prediction.stats.token_capacity
        lost = int(self.lost_per_token * merged * prediction.mask[0].size)
        mask = prediction.mask.copy()
        mask.reshape(len(mask), -1)[:, :lost] ^= 1
        return replace(prediction, mask=mask)


class Drive:
    """Frames at 10 Hz of scripted time through a guard."""

    def __init__(self, lost_per_token: float = 0.0, **values: Any) -> None:
        self.now_s = 1000.0
        self.engine = LossyEngine(lost_per_token)
        self.guard = MergeGuard(self.engine, WORTH, lambda: self.now_s)
        self.parameters = build(SegmentationParameters, {"merge_threshold": 0.0, **values})
        self.image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
        self.idle = True

    def frame(self, camera: str = "") -> Prediction:
        self.now_s += 0.1
        settings = self.settings(camera)
        result = self.engine.segment(self.image, settings)
        self.guard.saw([camera], [self.image], settings, result)
        self.guard.use_idle_time(lambda: self.idle)
        return result

    def settings(self, camera: str = "") -> Settings:
        settings = self.parameters.settings(SIZE, confidence=False, clusters=False)
        floor = self.guard.floor.capacity if self.guard.floor else 0
        ladder = [OperatingPoint(1.0, capacity, LADDER[-1]) for capacity in LADDER]
        return self.guard.protect(settings, self.parameters, [camera], floor, ladder)

    def frames(self, count: int) -> list[int]:
        return [self.frame().stats.token_capacity for _ in range(count)]

    def checks(self) -> int:
        return sum(call.merge_threshold == 1.0 for call in self.engine.calls)


def test_without_guards_the_engine_is_called_as_ever() -> None:
    drive = Drive()
    drive.frames(100)
    assert all(call == Settings(merge_threshold=0.0, confidence=False) for call in drive.engine.calls)
    assert drive.guard.pairs == {}


def test_the_previous_mask_of_the_same_camera_exempts_its_classes() -> None:
    drive = Drive(merge_exempt_classes="bright, glare", merge_exempt_region="0.67 0 1 1")
    first = drive.frame("left")
    assert drive.engine.calls[-1].previous_mask is None
    drive.frame("right")
    assert drive.engine.calls[-1].previous_mask is None
    drive.frame("left")
    settings = drive.engine.calls[-1]
    assert settings.merge_exempt_classes == (2, 3) and settings.merge_exempt_region == ((0.67, 0.0, 1.0, 1.0),)
    np.testing.assert_array_equal(settings.previous_mask, first.mask)


def test_a_class_is_exempt_however_unsure_the_mask_is_of_it() -> None:
    drive = Drive(merge_exempt_classes="bright, glare", confidence_threshold=1.0)
    mask = drive.frame("left").mask
    drive.frame("left")
    exempt = drive.engine.calls[-1].previous_mask
    assert (mask == IGNORE_INDEX).mean() > 0.9 and not np.isin(mask, (2, 3)).any()
    assert np.isin(exempt, (2, 3)).any() and not (exempt == IGNORE_INDEX).any()


def test_masks_are_forgotten_when_no_class_is_exempt() -> None:
    drive = Drive(merge_exempt_classes="glare")
    drive.frame()
    drive.parameters = replace(drive.parameters, merge_exempt_classes=())
    drive.frame()
    drive.parameters = replace(drive.parameters, merge_exempt_classes=("glare",))
    drive.frame()
    assert drive.engine.calls[-1].previous_mask is None


def test_checks_come_every_period_and_are_told() -> None:
    drive = Drive(0.01, accuracy_check_period_s=2.0, merge_exempt_classes="glare")
    drive.frames(105)
    assert 4 <= drive.checks() <= 5
    pairs = drive.guard.pairs
    assert float(pairs["agreement"]) == pytest.approx(1.0 - 0.01 * (LADDER[-1] - LADDER[0]), abs=0.01)
    assert "agreement.glare" in pairs and pairs["accuracy_min_tokens"] == "0"  # nothing is asked for


def test_what_a_check_said_is_not_told_once_checks_are_off() -> None:
    drive = Drive(0.01, accuracy_check_period_s=1.0, min_agreement=0.9)
    drive.frames(50)
    assert int(drive.guard.pairs["accuracy_min_tokens"]) > 0
    drive.parameters = replace(drive.parameters, min_agreement=0.0)
    drive.frame()
    assert drive.guard.pairs["accuracy_min_tokens"] == "0"
    drive.parameters = replace(drive.parameters, accuracy_check_period_s=0.0)
    drive.frame()
    assert drive.guard.pairs == {}
    drive.now_s += 3600.0
    drive.parameters = replace(drive.parameters, accuracy_check_period_s=1.0, min_agreement=0.9)
    assert drive.frame().stats.token_capacity == LADDER[0], "nor does it bind, an hour later"
    assert max(drive.frames(20)) > LADDER[0]


def test_a_check_waits_for_an_idle_moment_but_not_for_ever() -> None:
    drive = Drive(accuracy_check_period_s=2.0)
    drive.idle = False
    drive.frames(35)
    assert drive.checks() == 0
    drive.frames(10)
    assert drive.checks() == 1


def test_merging_backs_off_below_min_agreement_and_comes_back() -> None:
    drive = Drive(0.01, accuracy_check_period_s=1.0, min_agreement=0.9)
    used = drive.frames(200)
    assert used[0] == LADDER[0] and used == sorted(used)
    assert 1.0 - 0.01 * (LADDER[-1] - used[-1]) >= 0.9
    assert drive.guard.pairs["accuracy_min_tokens"] == str(used[-1])
    drive.engine.lost_per_token = 0.0
    assert drive.frames(600)[-1] == LADDER[0]


def test_a_budget_keeps_the_tokens_that_accuracy_needs() -> None:
    drive = Drive(0.01, accuracy_check_period_s=1.0, min_agreement=0.9, latency_budget_ms=5.0)
    drive.frames(200)
    assert drive.guard.floor.capacity >= LADDER[3]


def test_a_replay_does_not_depend_on_the_clock() -> None:
    drive = Drive(0.01, accuracy_check_period_s=1.0, min_agreement=0.9, processing="every_frame")
    assert set(drive.frames(100)) == {LADDER[0]} and drive.checks() == 0


def test_a_check_that_fails_is_no_frame_that_fails() -> None:
    drive = Drive(accuracy_check_period_s=1.0)
    drive.frames(8)
    drive.now_s += 5.0
    settings = drive.settings()
    drive.guard.saw([""], [drive.image], settings, drive.engine.segment(drive.image, settings))
    drive.engine.failure = RuntimeError("device lost")
    calls = len(drive.engine.calls)
    drive.guard.use_idle_time(lambda: True)
    assert len(drive.engine.calls) == calls + 1
    drive.guard.use_idle_time(lambda: True)
    assert len(drive.engine.calls) == calls + 1, "not again before the next period"


def test_agreement_leaves_unlabelled_pixels_out() -> None:
    mask, reference = np.array([[0, 1, 255, 2]]), np.array([[0, 2, 1, 2]])
    agreement = compare(mask, reference, ("a", "b", "c"), (0, 1, 2))
    assert agreement.overall == pytest.approx(2 / 3)
    assert agreement.per_class == {"a": 1.0, "b": 0.0, "c": 0.5}
    assert compare(np.full((1, 2), 255), reference[:, :2], ("a",), ()).overall == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"merge_exempt_classes": "glare, dog"}, "merge_exempt_classes: got dog, expected classes of the model: dark"),
        ({"merge_exempt_region": "0.9 0 0.1 1"}, "merge_exempt_region: got 0.9, 0, 0.1, 1, expected fractions"),
        ({"merge_exempt_region": "1 2 3"}, "merge_exempt_region: got '1 2 3', expected four numbers"),
    ],
)
def test_exemptions_that_cannot_be_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        exempt_class_ids(
            ("dark", "dim", "bright", "glare"), build(SegmentationParameters, values).merge_exempt_classes
        )
    assert message in str(error.value)


def test_a_list_of_classes_is_accepted() -> None:
    parameters = build(SegmentationParameters, {"merge_exempt_classes": ["glare", "dim"]})
    assert exempt_class_ids(("dim", "glare"), parameters.merge_exempt_classes) == (1, 0)
    with pytest.raises(ConfigError, match="merge_exempt_source"):
        build(SegmentationParameters, {"merge_exempt_source": "guess"})
