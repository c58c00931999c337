"""What to do with a frame: budget, calibration, guards. No ROS, no torch, every clock injected."""

from clustvit_ros.policy.budget import BudgetController, LatencyTable, check_budget
from clustvit_ros.policy.ledger import LatencyWindow, Ledger, percentile
from clustvit_ros.policy.plan import BudgetStatus, Plan
from clustvit_ros.policy.policy import Policy

__all__ = [
    "BudgetController", "BudgetStatus", "LatencyTable", "LatencyWindow", "Ledger", "Plan", "Policy", "check_budget",
    "percentile",
]  # fmt: skip
