# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The capacity ladder: the few token counts that a network runs with."""

from __future__ import annotations

from collections.abc import Sequence

_RUNGS = 8


def default_ladder(tokens_total: int) -> tuple[int, ...]:
    """Capacities for `tokens_total` patch tokens: every eighth up to all of them, ascending."""
    return tuple(sorted({max(tokens_total * rung // _RUNGS, 1) for rung in range(1, _RUNGS + 1)}))


def choose_capacity(ladder: Sequence[int], tokens_below_threshold: int, ceiling: int = 0, exempt: int = 0) -> int:
    """The smallest capacity that keeps every token below the threshold, but none above the ceiling.

    Args:
        ladder: capacities, ascending.
        tokens_below_threshold: tokens the threshold wants kept (of the fullest image of a batch).
        ceiling: upper bound on kept tokens; 0 is none. It need not be on the ladder.
        exempt: tokens that must not be merged (of the fullest image of a batch); they come before the ceiling.

    Returns:
        Token capacity. Slots left over keep the least certain of the tokens that could have been merged.
    """
    smallest = next((capacity for capacity in ladder if capacity >= tokens_below_threshold), ladder[-1])
    bounded = min(smallest, ceiling) if ceiling > 0 else smallest
    if bounded >= exempt:
        return bounded
    return next((capacity for capacity in ladder if capacity >= exempt), ladder[-1])
