"""Latencies: what was measured lately, and what each token capacity costs."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Mapping

from clustvit_ros.errors import ConfigError

PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
"""Label -> share, as statistics and diagnostics name them."""


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest-rank percentile: always one of the values, never a latency that did not occur.

    Args:
        values: at least one number.
        share: 0.95 for the 95th percentile; above 0, at most 1.

    Raises:
        ConfigError: there is no value.
    """
    ordered = sorted(values)
    if not ordered:
        raise ConfigError("percentile: got no value, expected at least one")
    return ordered[max(math.ceil(round(share * len(ordered), 9)), 1) - 1]


class LatencyWindow:
    """The latest latencies, oldest forgotten first.

    Args:
        size: how many are remembered.
    """

    def __init__(self, size: int = 300) -> None:
        self._samples: deque[float] = deque(maxlen=size)

    def add(self, latency_ms: float) -> None:
        """Remember a latency; one that is no number is left out."""
        if math.isfinite(latency_ms):
            self._samples.append(latency_ms)

    def as_pairs(self, name: str, shares: Mapping[str, float] = PERCENTILES) -> dict[str, str]:
        """Percentiles as keys and values, e.g. `age_p95_ms`; nothing without samples.

        Args:
            name: what the keys begin with.
            shares: label -> share of the samples.
        """
        samples = list(self._samples)  # another thread may add one
        return {f"{name}_{label}_ms": f"{percentile(samples, share):.2f}" for label, share in shares.items() if samples}


class LatencyTable:
    """Calibrated latency per token capacity.

    Measured noise must not make a larger capacity look cheaper than a smaller one: the table is made to rise by
    pooling neighbours that do not (isotonic regression).

    Args:
        latency_ms: capacity (tokens) -> milliseconds, at least one entry.

    Raises:
        ConfigError: no entry, or one that is not positive.
    """

    def __init__(self, latency_ms: Mapping[int, float]) -> None:
        if not latency_ms:
            raise ConfigError("latency table: got no capacity, expected at least one")
        if any(capacity < 1 or not 0.0 < value < math.inf for capacity, value in latency_ms.items()):
            raise ConfigError(f"latency table: got {dict(latency_ms)}, expected positive capacities and milliseconds")
        self.capacities = tuple(sorted(latency_ms))
        self._latency_ms = _rising([latency_ms[capacity] for capacity in self.capacities])

    def __getitem__(self, capacity: int) -> float:
        """Milliseconds at a capacity; between two rungs interpolated, beyond them the nearest."""
        index = bisect.bisect_left(self.capacities, capacity)
        if index == 0:
            return self._latency_ms[0]
        if index == len(self.capacities):
            return self._latency_ms[-1]
        low, high = self.capacities[index - 1 : index + 1]
        share = (capacity - low) / (high - low)
        return self._latency_ms[index - 1] * (1.0 - share) + self._latency_ms[index] * share

    def items(self) -> Iterable[tuple[int, float]]:
        """(capacity, milliseconds), ascending."""
        return zip(self.capacities, self._latency_ms, strict=True)


def _rising(values: list[float]) -> list[float]:
    """The closest non-decreasing sequence (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before_total, before_count = pools.pop()
            total, count = total + before_total, count + before_count
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]
