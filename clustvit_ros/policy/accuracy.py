"""Holding the masks' quality: now and then a frame is segmented unmerged as well, and merging backs off where it shows.

Agreement with the unmerged mask says what merging costs, without labels. When it falls below what is asked for, the
fewest tokens that may be kept rise by one rung of the capacity ladder; they fall again, one rung at a time, once
several checks in a row leave room. A floor that had to be raised again soon is tried for longer each time, so that
a scene at the border does not make it swing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Agreement must be above the bound by this share of what is left to 1 before the floor falls.
_HEADROOM = 0.25
_GOOD_CHECKS = 3
_MOST_GOOD_CHECKS = 48


@dataclass(frozen=True)
class Agreement:
    """One comparison of a mask with the unmerged one.

    Args:
        overall: share of equal pixels, 0..1; unlabelled pixels of either mask aside.
        per_class: share of each exempt class's pixels in the unmerged mask that the mask has as well; classes that
            are not in it are left out.
    """

    overall: float
    per_class: Mapping[str, float] = field(default_factory=dict)


class AccuracyGuard:
    """Decides when a check is due and how far merging must back off.

    Args:
        now_s: monotonic seconds; the first check is due one period later.
    """

    def __init__(self, now_s: float) -> None:
        self._checked_s = now_s
        self._rung = 0
        self._good = 0
        self._needed = _GOOD_CHECKS
        self._lowered = False
        self.latest: Agreement | None = None
        self.checks = 0

    def due(self, now_s: float, period_s: float) -> bool:
        """Whether the next check should be made; never with a period of 0."""
        return period_s > 0.0 and now_s - self._checked_s >= period_s

    def overdue(self, now_s: float, period_s: float) -> bool:
        """Whether it can wait no longer for a moment in which nothing else is to be done."""
        return period_s > 0.0 and now_s - self._checked_s >= 2.0 * period_s

    def floor(self, capacities: Sequence[int]) -> int:
        """The fewest tokens that may be kept; 0 is no bound.

        Args:
            capacities: the engine's ladder, ascending.
        """
        return capacities[min(self._rung, len(capacities) - 1)] if self._rung else 0

    def observe(
        self, agreement: Agreement, now_s: float, min_agreement: float, used: int, capacities: Sequence[int]
    ) -> None:
        """Learn from a check.

        Args:
            agreement: what it found.
            now_s: when.
            min_agreement: what is asked for, 0..1; 0 asks for nothing.
            used: token capacity that the compared mask was made with.
            capacities: the engine's ladder, ascending.
        """
        self.latest, self._checked_s, self.checks = agreement, now_s, self.checks + 1
        if min_agreement <= 0.0:
            self._rung, self._good, self._needed, self._lowered = 0, 0, _GOOD_CHECKS, False
        elif agreement.overall < min_agreement:
            self._raise(used, capacities)
        elif agreement.overall >= min_agreement + _HEADROOM * (1.0 - min_agreement):
            self._good += 1
            if self._rung and self._good >= self._needed:
                self._rung, self._good, self._lowered = self._rung - 1, 0, True
        else:
            self._good = 0

    def skip(self, now_s: float) -> None:
        """A check failed or made no sense: wait for the next period."""
        self._checked_s = now_s

    def _raise(self, used: int, capacities: Sequence[int]) -> None:
        if self._lowered:
            # It was lowered and had to come back: longer patience the next time.
            self._needed = min(self._needed * 2, _MOST_GOOD_CHECKS)
            self._lowered = False
        self._good = 0
        # One rung above what was found wanting, whether the floor or the threshold had chosen that.
        above = next((i for i, capacity in enumerate(capacities) if capacity > used), len(capacities) - 1)
        self._rung = max(above, min(self._rung, len(capacities) - 1))
