"""Latency statistics and the controller that holds a budget. Pure: no clock, no sleeping, no device."""

from clustvit_ros.control.allowance import POLICIES, REFERENCES, Allowance, BudgetStatus
from clustvit_ros.control.budget import BudgetController, Decision, check_budget
from clustvit_ros.control.deadlines import MissCounter, Misses
from clustvit_ros.control.latency import Distribution, LatencyTable, LatencyWindow

__all__ = [
    "POLICIES", "REFERENCES", "Allowance", "BudgetController", "BudgetStatus", "Decision", "Distribution",
    "LatencyTable", "LatencyWindow", "MissCounter", "Misses", "check_budget",
]  # fmt: skip
