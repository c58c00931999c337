"""Counting deadline misses."""

from __future__ import annotations

import pytest

from clustvit_ros.policy import MissCounter, Misses


def test_recent_frames_are_a_window_and_the_total_is_not():
    counter = MissCounter(size=3)
    for missed in (True, True, False, False):
        counter.add(missed)
    assert counter.misses == Misses(recent=1, frames=3, total=2)
    counter.start_over()
    assert counter.misses == Misses(recent=0, frames=0, total=2)


@pytest.mark.parametrize(
    ("recent", "frames", "too_many"),
    [(0, 0, False), (1, 1, False), (1, 50, False), (2, 50, True), (6, 300, False), (7, 300, True)],
)
def test_two_percent_are_tolerated(recent, frames, too_many):
    assert Misses(recent, frames, 99).too_many is too_many
