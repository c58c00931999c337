"""What the operating system tells about the machine: its name, its power mode, and whether it is being throttled.

Everything is read from files that may not exist, and nothing here ever fails: what cannot be read is an empty text.
"""

from __future__ import annotations

import platform
from pathlib import Path

_ROOT = Path("/")


def machine_name(root: Path = _ROOT) -> str:
    """The board or processor, e.g. "NVIDIA Jetson Orin Nano" or "AMD EPYC"."""
    board = _read(root / "proc/device-tree/model")
    if board:
        return board
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def power_mode(root: Path = _ROOT) -> str:
    """What decides the clocks: Jetson's power mode and the CPU's frequency governor, e.g. "pmode:0002, schedutil"."""
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return ", ".join(filter(None, (_read(root / "var/lib/nvpmodel/status"), governor)))


def throttling(root: Path = _ROOT) -> str:
    """Why the platform makes this machine slower than it could be, in a sentence; empty when it does not say so."""
    return "; ".join(filter(None, (_hot_zones(root), _limited_clock(root))))


def _hot_zones(root: Path) -> str:
    hot = []
    for zone in _glob(root / "sys/class/thermal", "thermal_zone*"):
        temperature = _read_int(zone / "temp")
        for kind in _glob(zone, "trip_point_*_type"):
            # `active` trips start fans; these two slow the machine down.
            if _read(kind) not in ("passive", "hot"):
                continue
            limit = _read_int(kind.with_name(kind.name.replace("_type", "_temp")))
            if temperature is not None and limit and 0 < limit <= temperature:
                name = _read(zone / "type") or zone.name
                hot.append(f"{name} at {temperature / 1000:.0f} °C, limit {limit / 1000:.0f} °C")
                break
    return f"thermal throttling ({', '.join(hot)})" if hot else ""


def _limited_clock(root: Path) -> str:
    for policy in _glob(root / "sys/devices/system/cpu/cpufreq", "policy*"):
        limit, maximum = _read_int(policy / "scaling_max_freq"), _read_int(policy / "cpuinfo_max_freq")
        if limit and maximum and limit < maximum:
            return f"CPU clock limited to {limit / 1e6:.1f} of {maximum / 1e6:.1f} GHz"
    return ""


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _read_int(path: Path) -> int | None:
    try:
        return int(_read(path))
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \t\r\n\0")
    except OSError:
        return ""
