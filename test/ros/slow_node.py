"""A segmentation node whose engine takes its time to load and to segment: for signals in the middle of it."""

import sys
import time

from clustvit_ros.ros.node import SegmentationNode, spin
from clustvit_ros.ros.parameters import SegmentationParameters
from clustvit_ros.ros.process import run_node
from clustvit_ros.runtime import Engine, ScriptedEngine
from clustvit_ros.runtime.bound_engine import BoundEngine

LOAD_S = 2.0


def load(parameters: SegmentationParameters) -> Engine:
    """Load for two seconds, in the engine's thread as real engines do."""

    def make() -> Engine:
        time.sleep(LOAD_S)
        return ScriptedEngine(latency_ms=parameters.scripted_latency_ms)

    return BoundEngine(make)


if __name__ == "__main__":
    sys.exit(run_node("segmentation", lambda: SegmentationNode(load), spin, None))
