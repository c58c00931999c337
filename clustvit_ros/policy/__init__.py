"""Latency statistics, the controller that holds a budget, turns among cameras. Pure: no clock, no sleep, no device."""

from clustvit_ros.policy.accuracy import AccuracyGuard, Agreement
from clustvit_ros.policy.allowance import POLICIES, REFERENCES, Allowance, BudgetStatus
from clustvit_ros.policy.budget import BudgetController, Decision, check_budget
from clustvit_ros.policy.deadlines import MissCounter, Misses
from clustvit_ros.policy.latency import Distribution, LatencyTable, LatencyWindow
from clustvit_ros.policy.scheduling import FairScheduler
from clustvit_ros.policy.topic_statistics import TopicStatistics

__all__ = [
    "POLICIES", "REFERENCES", "AccuracyGuard", "Agreement",
    "Allowance", "BudgetController", "BudgetStatus", "Decision", "Distribution",
    "FairScheduler", "LatencyTable", "LatencyWindow", "MissCounter", "Misses", "TopicStatistics", "check_budget",
]  # fmt: skip
