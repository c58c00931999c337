"""A segmentation node whose engine takes its time to load and to segment: for signals in the middle of it."""

import sys
import time

from clustvit_ros.engine import Engine, ScriptedEngine
from clustvit_ros.engine.bound_engine import BoundEngine
from clustvit_ros.node.node import SegmentationNode, spin
from clustvit_ros.node.parameters import SegmentationParameters
from clustvit_ros.node.process import run_node

LOAD_S = 2.0


def load(parameters: SegmentationParameters) -> Engine:
    """Load for two seconds, in the engine's thread as real engines do."""

    def make() -> Engine:
        time.sleep(LOAD_S)
        return ScriptedEngine(latency_ms=parameters.scripted_latency_ms)

    return BoundEngine(make)


if __name__ == "__main__":
    sys.exit(run_node("segmentation", lambda: SegmentationNode(load), spin, None))
