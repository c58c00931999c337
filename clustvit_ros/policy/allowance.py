"""What a latency budget allows one frame, and what is known about the budget at any moment."""

from __future__ import annotations

from dataclasses import dataclass, field

from clustvit_ros.policy.budget import Decision, check_budget
from clustvit_ros.policy.deadlines import Misses
from clustvit_ros.policy.latency import LatencyTable

REFERENCES = ("inference", "stamp")
"""What a budget covers: the engine alone, or from the frame's stamp to the publication of its mask."""

POLICIES = ("publish_late", "drop")
"""What becomes of a mask that missed its deadline."""


@dataclass(frozen=True)
class Allowance:
    """The latency settings of one frame.

    Args:
        budget_ms: milliseconds it may take; 0 is no budget.
        reference: one of `REFERENCES`.
        policy: one of `POLICIES`.
        min_tokens: what the budget must leave.
        token_ceiling: most tokens that may be kept, from the budget or the user, whichever is less; 0 is no bound.
        state: `off`; `calibrating` or `uncalibrated` (calibration failed), both with the smallest capacity; `held`;
            `infeasible` when even the smallest capacity is expected to miss the budget.
        decision: of the budget controller; None before calibration.
    """

    budget_ms: float
    reference: str
    policy: str
    min_tokens: int
    token_ceiling: int
    state: str
    decision: Decision | None

    def is_missed(self, engine_ms: float, age_ms: float) -> bool:
        """Whether a frame was too late.

        Args:
            engine_ms: milliseconds in the engine.
            age_ms: milliseconds since the frame's stamp.
        """
        return 0.0 < self.budget_ms < (age_ms if self.reference == "stamp" else engine_ms)

    def as_pairs(self) -> dict[str, str]:
        """Keys as they appear in stats and diagnostics."""
        pairs = {
            "latency_budget_ms": f"{self.budget_ms:g}",
            "budget_reference": self.reference,
            "deadline_policy": self.policy,
            "min_tokens": str(self.min_tokens),
            "token_ceiling": str(self.token_ceiling),
            "budget_state": self.state,
        }
        if self.decision is not None:
            pairs["budget_feasible"] = str(self.decision.feasible).lower()
            pairs["slowdown"] = f"{self.decision.slowdown:.3f}"
            pairs["predicted_ms"] = f"{self.decision.predicted_ms:.3f}"
            pairs["overhead_ms"] = f"{self.decision.overhead_ms:.3f}"
        return pairs


@dataclass(frozen=True)
class BudgetStatus:
    """A snapshot after some frame; made by the thread that segments, read by any other.

    Args:
        allowance: of the newest frame; None before the first.
        misses: deadline misses so far.
        table: calibrated latencies for the newest frame's size; None when there are none yet.
        slowdown: measured over calibrated latency, typical of recent frames.
        overhead_ms: milliseconds outside the engine, typical of recent frames.
        failure: why there is no calibration; empty when there is one, or none was tried.
        recalibrated: what `recalibrate` asked for is done.
    """

    allowance: Allowance | None = None
    misses: Misses = field(default_factory=Misses)
    table: LatencyTable | None = None
    slowdown: float = 1.0
    overhead_ms: float = 0.0
    failure: str = ""
    recalibrated: bool = False

    def check(self, budget_ms: float, reference: str, min_tokens: int) -> None:
        """Refuse a budget that cannot be held; every budget is accepted before calibration.

        Raises:
            ConfigError: naming the feasible minimum.
        """
        if budget_ms > 0.0 and self.table is not None:
            overhead_ms = max(self.overhead_ms, 0.0) if reference == "stamp" else 0.0
            check_budget(self.table, budget_ms, min_tokens, self.slowdown, overhead_ms)

    def problem(self) -> str:
        """What keeps the budget from being held, in a sentence; empty when nothing does."""
        allowance = self.allowance
        if allowance is None or allowance.budget_ms <= 0.0:
            return ""
        budget = f"latency_budget_ms {allowance.budget_ms:g}"
        if allowance.state == "uncalibrated":
            return f"{budget} is held with the fewest tokens only: calibration failed ({self.failure})"
        decision = allowance.decision
        if decision is not None and allowance.state == "infeasible":
            outside = f" and {decision.overhead_ms:.1f} ms pass outside the engine" if decision.overhead_ms else ""
            return (
                f"{budget} cannot be held now: {decision.capacity} tokens, the fewest allowed, take up to "
                f"{decision.predicted_ms:.1f} ms, {decision.slowdown:.2f} times the calibrated latency{outside}"
            )
        if self.misses.too_many:
            return f"{self.misses.recent} of the last {self.misses.frames} frames missed {budget}"
        return ""

    def as_pairs(self) -> dict[str, str]:
        """Keys as they appear in diagnostics."""
        pairs = self.allowance.as_pairs() if self.allowance is not None else {}
        pairs["deadline_misses"] = str(self.misses.total)
        pairs["deadline_misses_recent"] = f"{self.misses.recent} of {self.misses.frames}"
        if self.table is not None:
            pairs.update({f"calibrated.{tokens}_tokens_ms": f"{value:.2f}" for tokens, value in self.table.items()})
        return pairs
