"""How messages arrive on a topic: their age, the time between them, and how many were not used."""

from __future__ import annotations

from clustvit_ros.policy.latency import LatencyWindow


class TopicStatistics:
    """Age and period of the latest messages.

    Args:
        size: how many are remembered.
    """

    def __init__(self, size: int = 300) -> None:
        self._ages, self._periods = LatencyWindow(size), LatencyWindow(size)
        self._last_s: float | None = None

    def add(self, arrival_s: float, age_ms: float | None) -> None:
        """A message has arrived.

        Args:
            arrival_s: when, in seconds of a monotonic clock.
            age_ms: milliseconds since its stamp; None when it has none.
        """
        if self._last_s is not None:
            self._periods.add((arrival_s - self._last_s) * 1000.0)
        if age_ms is not None:
            self._ages.add(age_ms)
        self._last_s = arrival_s

    def as_pairs(self, name: str) -> dict[str, str]:
        """`<name>_age_*_ms` and `<name>_period_*_ms` as p50, p95 and max; nothing without messages."""
        pairs = {}
        for what, window in (("age", self._ages), ("period", self._periods)):
            found = window.distribution()
            if found.count:
                values = (("p50", found.p50_ms), ("p95", found.p95_ms), ("max", found.max_ms))
                pairs.update({f"{name}_{what}_{key}_ms": f"{value:.2f}" for key, value in values})
        return pairs
