"""A small simulated world with a robot's camera in it, and the truth about every pixel."""

from __future__ import annotations

from clustvit_ros.sim.camera import SIM_CLASSES, SimFrame, SimulatedCamera

__all__ = ["SIM_CLASSES", "SimFrame", "SimulatedCamera"]
