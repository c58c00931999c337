"""Latencies: what was measured lately, and what each token capacity costs."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from clustvit_ros.errors import ConfigError


@dataclass(frozen=True)
class Distribution:
    """Percentiles of a set of latencies, in milliseconds.

    Args:
        count: how many there are; all other fields are 0 when there is none.
        p50_ms, p95_ms, p99_ms, max_ms: nearest-rank percentiles, so that each is a latency that occurred.
    """

    count: int = 0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0


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

    def clear(self) -> None:
        """Forget all."""
        self._samples.clear()

    def distribution(self) -> Distribution:
        """Percentiles over what is remembered."""
        ordered = sorted(self._samples)
        if not ordered:
            return Distribution()
        return Distribution(
            len(ordered),
            *(ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1] for share in (0.5, 0.95, 0.99, 1.0)),
        )


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

    @property
    def fastest_ms(self) -> float:
        """Latency of the smallest capacity: no budget below it can be held."""
        return self._latency_ms[0]

    @property
    def slowest_ms(self) -> float:
        """Latency of the largest capacity."""
        return self._latency_ms[-1]

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
