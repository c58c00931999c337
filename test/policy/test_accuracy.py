# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The accuracy guard under scripted agreements; time is a number here."""

from __future__ import annotations

from itertools import pairwise

from clustvit_ros.policy.merge_guard import AccuracyGuard, Agreement

LADDER = (10, 20, 30, 40, 50, 60, 70, 80)


class Scene:
    """Agreement by kept tokens, and a guard that is asked every period."""

    def __init__(self, agreement_of, min_agreement=0.9, wanted=10):
        self.guard = AccuracyGuard(0.0)
        self.agreement_of, self.min_agreement, self.wanted = agreement_of, min_agreement, wanted
        self.now_s = 0.0

    def run(self, checks):
        floors = []
        for _ in range(checks):
            self.now_s += 5.0
            assert self.guard.due(self.now_s, 5.0)
            used = max(self.wanted, self.guard.floor(LADDER))
            agreement = Agreement(self.agreement_of(used))
            self.guard.observe(agreement, self.now_s, self.min_agreement, used, LADDER)
            floors.append(self.guard.floor(LADDER))
        return floors


def test_checks_come_once_per_period_and_never_without_one():
    guard = AccuracyGuard(100.0)
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


def test_another_ladder_takes_the_same_rung():
    scene = Scene(lambda used: 0.5)
    scene.run(2)
    assert scene.guard.floor(LADDER) == 30 and scene.guard.floor((5, 6, 7)) == 7 and scene.guard.floor((4,)) == 4
