# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A segmentation node whose engine takes its time to load and to segment: for signals in the middle of it.

With `stuck` as its first argument, a callback takes its time, too.
"""

import sys
import time

from clustvit_ros.engine import Engine, ScriptedEngine
from clustvit_ros.node.node import SegmentationNode, spin
from clustvit_ros.node.process import run_node
from clustvit_ros.policy.parameters import SegmentationParameters

LOAD_S = 2.0


def load(parameters: SegmentationParameters, device: str) -> Engine:
    """Load for two seconds."""
    time.sleep(LOAD_S)
    return ScriptedEngine(latency_ms=parameters.scripted_latency_ms)


def create() -> SegmentationNode:
    """The node."""
    node = SegmentationNode(load)
    if "stuck" in sys.argv[1:2]:
        def stick() -> None:
            node.get_logger().info("stuck")
            time.sleep(60.0)

        node.create_timer(0.1, stick)
    return node


if __name__ == "__main__":
    sys.exit(run_node("segmentation", create, spin, None))
