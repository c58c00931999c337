"""How many frames came too late."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

TOLERATED_MISSES = 0.02
"""Share of recent frames that may miss their deadline before anybody is told."""

# A share of few frames says little: one miss among the first ten is no trend.
_MIN_FRAMES = 50


@dataclass(frozen=True)
class Misses:
    """Deadline misses.

    Args:
        recent: among the latest `frames`.
        frames: how many recent frames that is out of.
        total: ever.
    """

    recent: int = 0
    frames: int = 0
    total: int = 0

    @property
    def too_many(self) -> bool:
        """More than is tolerated."""
        return self.recent > TOLERATED_MISSES * max(self.frames, _MIN_FRAMES)


class MissCounter:
    """Counts deadline misses, ever and among the latest frames.

    Args:
        size: how many frames are recent.
    """

    def __init__(self, size: int = 300) -> None:
        self._recent: deque[bool] = deque(maxlen=size)
        self._total = 0

    def add(self, missed: bool) -> None:
        """A frame with a deadline is done."""
        self._recent.append(missed)
        self._total += missed

    def start_over(self) -> None:
        """Forget recent frames: they had another deadline. The total stays."""
        self._recent.clear()

    @property
    def misses(self) -> Misses:
        """What was counted."""
        return Misses(sum(self._recent), len(self._recent), self._total)
