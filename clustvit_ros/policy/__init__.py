# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What to do with a frame: budget, calibration, guards. No ROS, no torch, every clock injected."""

from clustvit_ros.policy.budget import BudgetController
from clustvit_ros.policy.calibration import LatencyTable
from clustvit_ros.policy.ledger import LatencyWindow, Ledger, percentile
from clustvit_ros.policy.plan import BudgetStatus, Plan, check_budget
from clustvit_ros.policy.policy import Policy

__all__ = [
    "BudgetController", "BudgetStatus", "LatencyTable", "LatencyWindow", "Ledger", "Plan", "Policy", "check_budget",
    "percentile",
]  # fmt: skip
