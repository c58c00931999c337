"""What the operating system tells about the machine: its name, its power mode, and whether it is being throttled.

Everything is read from files that may not exist, and nothing here ever fails: what cannot be read is an empty
text or None.
"""

from __future__ import annotations

import os
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


def available_bytes(root: Path = _ROOT) -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if name == "MemAvailable" and number and number[0].isdigit():
            return int(number[0]) * 1024
    return None


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(_affinity()) or os.cpu_count() or 1


def busy_seconds(root: Path = _ROOT) -> float | None:
    """Seconds since boot that the processors which this process may run on have computed, summed, for all processes.

    A resolution of 10 ms; None where the system does not tell.
    """
    allowed = {f"cpu{number}" for number in _affinity()}
    ticks = found = 0
    for line in _read(root / "proc/stat").splitlines():
        name, *fields = line.split()
        if name in allowed and len(fields) >= 7 and all(field.isdigit() for field in fields):
            user, nice, system, _idle, _iowait, irq, soft_irq = map(int, fields[:7])
            ticks += user + nice + system + irq + soft_irq
            found += 1
    return ticks / os.sysconf("SC_CLK_TCK") if found else None


def _affinity() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):  # systems other than Linux
        return set()


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
