"""Latency statistics and the controller that holds a budget. Pure: no clock, no sleeping, no device."""

from clustvit_ros.control.budget import BudgetController, Decision
from clustvit_ros.control.latency import Distribution, LatencyTable, LatencyWindow

__all__ = ["BudgetController", "Decision", "Distribution", "LatencyTable", "LatencyWindow"]
