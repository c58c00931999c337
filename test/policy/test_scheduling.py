"""Turns among cameras: shares as weighted, nobody starves, no claim on turns that were missed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustvit_ros.errors import ConfigError
from clustvit_ros.policy import FairScheduler


def turns(scheduler: FairScheduler, waiting: list[str], count: int) -> list[str]:
    return [scheduler.choose(waiting) for _ in range(count)]


def longest_wait(sequence: list[str], camera: str) -> int:
    positions = [index for index, name in enumerate(sequence) if name == camera]
    return max(b - a for a, b in zip([-1, *positions], [*positions, len(sequence)], strict=True))


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.1, 10.0), min_size=1))
def test_turns_are_shared_as_weighted_and_nobody_starves(weights: dict[str, float]) -> None:
    sequence = turns(FairScheduler(weights), list(weights), 2000)
    total = sum(weights.values())
    for camera, weight in weights.items():
        fair_share = weight / total
        assert abs(sequence.count(camera) - 2000 * fair_share) <= len(weights) + 1
        assert longest_wait(sequence, camera) <= (len(weights) + 1) / fair_share


def test_two_to_one() -> None:
    assert Counter(turns(FairScheduler({"front": 2.0, "rear": 1.0}), ["front", "rear"], 300)) == {
        "front": 200, "rear": 100,
    }  # fmt: skip


def test_a_camera_that_was_silent_has_no_claim_on_the_turns_it_missed() -> None:
    scheduler = FairScheduler({"front": 1.0, "rear": 1.0})
    turns(scheduler, ["front"], 100)
    sequence = turns(scheduler, ["front", "rear"], 10)
    assert sequence.count("rear") in (5, 6)
    assert longest_wait(sequence, "front") <= 2


def test_cameras_triggered_together_take_turns_at_being_first() -> None:
    scheduler = FairScheduler({"front": 1.0, "rear": 1.0})
    ages: dict[str, list[int]] = {"front": [], "rear": []}
    for _ in range(50):
        waiting = ["front", "rear"]
        for age_ms in (40, 80):
            camera = scheduler.choose(waiting)
            waiting.remove(camera)
            ages[camera].append(age_ms)
            scheduler.served(camera, age_ms)
    means = {camera: sum(values) / len(values) for camera, values in ages.items()}
    assert 1 / 1.2 < means["front"] / means["rear"] < 1.2


def test_whoever_joins_a_batch_pays_for_it() -> None:
    scheduler = FairScheduler({"front": 1.0, "rear": 1.0})
    assert scheduler.choose(["front", "rear"]) == "front"
    scheduler.join("rear")
    assert scheduler.choose(["front"]) == "front"
    assert scheduler.choose(["front", "rear"]) == "rear"


def test_weights_change_live_and_must_be_positive() -> None:
    scheduler = FairScheduler({"front": 1.0, "rear": 1.0})
    scheduler.set_weight("front", 3.0)
    counts = Counter(turns(scheduler, ["front", "rear"], 400))
    assert abs(counts["front"] - 300) <= 2
    with pytest.raises(ConfigError, match=r"rear.weight: got 0.0, expected more than 0"):
        scheduler.set_weight("rear", 0.0)
    with pytest.raises(ConfigError, match="at least one"):
        FairScheduler({})
