# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A segmentation node whose second frame meets an error that no call of its process gets over."""

import sys

from clustvit_ros.engine import Engine, ScriptedEngine
from clustvit_ros.node.node import SegmentationNode, spin
from clustvit_ros.node.process import run_node
from clustvit_ros.policy.parameters import SegmentationParameters

ERROR = "CUDA error: an illegal memory access was encountered"


def load(parameters: SegmentationParameters, device: str) -> Engine:
    """As on a GPU."""
    return ScriptedEngine(device="cuda:0 (scripted)", failure=lambda call: RuntimeError(ERROR) if call > 2 else None)


if __name__ == "__main__":
    sys.exit(run_node("segmentation", lambda: SegmentationNode(load), spin, None))
