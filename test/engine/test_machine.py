# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What is read of the machine, from made-up system files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from clustvit_ros.engine.machine import busy_seconds, machine_name, power_mode, throttling, usable_cores

ZONE = "sys/class/thermal/thermal_zone0"
POLICY = "sys/devices/system/cpu/cpufreq/policy0"


@pytest.fixture
def root(tmp_path):
    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_a_machine_that_tells_nothing(tmp_path):
    assert machine_name(tmp_path)  # at least its architecture
    assert power_mode(tmp_path) == throttling(tmp_path) == ""


def test_this_machine_is_read_without_failing():
    assert machine_name() and isinstance(power_mode(), str) and isinstance(throttling(), str)


def test_names_and_power_modes(root):
    pc = root({"proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC 7B13\n"})
    assert machine_name(pc) == "AMD EPYC 7B13"
    jetson = root(
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
            "var/lib/nvpmodel/status": "pmode:0002\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
        }
    )
    assert machine_name(jetson) == "NVIDIA Jetson Orin Nano"
    assert power_mode(jetson) == "pmode:0002, schedutil"


@pytest.mark.parametrize(
    ("temperature", "kind", "limit", "expected"),
    [
        ("96000", "passive", "95000", "thermal throttling (cpu-thermal at 96 °C, limit 95 °C)"),
        ("94999", "passive", "95000", ""),
        ("96000", "active", "40000", ""),
        ("96000", "passive", "0", ""),
        ("96000", "passive", "-274000", ""),
        ("hot", "passive", "95000", ""),
    ],
)
def test_heat_is_named(root, temperature, kind, limit, expected):
    files = {"type": "cpu-thermal", "temp": temperature, "trip_point_0_type": kind, "trip_point_0_temp": limit}
    assert throttling(root({f"{ZONE}/{name}": text for name, text in files.items()})) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [("1200000", "CPU clock limited to 1.2 of 2.4 GHz"), ("2400000", ""), ("", "")]
)
def test_a_limited_clock_is_named(root, limit, expected):
    path = root({f"{POLICY}/scaling_max_freq": limit, f"{POLICY}/cpuinfo_max_freq": "2400000"})
    assert throttling(path) == expected


GPU = "sys/class/devfreq/17000000.gpu"


def test_a_jetsons_gpu_clocks_belong_to_its_power_mode(root):
    files = {"var/lib/nvpmodel/status": "pmode:0002", f"{GPU}/min_freq": "306000000", f"{GPU}/max_freq": "624750000"}
    assert power_mode(root(files)) == "pmode:0002, gpu 306-624 MHz"
    assert power_mode(root({f"{GPU}/min_freq": "624750000"})) == "pmode:0002, gpu 624-624 MHz", "jetson_clocks"
    assert power_mode(root({"sys/class/devfreq/13e40000.host1x/min_freq": "1", GPU + "/max_freq": "?"})) == "pmode:0002"


def test_a_power_mode_is_no_throttling_and_a_gpu_below_its_clock_is(root):
    chosen = {"var/lib/nvpmodel/status": "pmode:0002", f"{POLICY}/scaling_max_freq": "1497600"}
    path = root({**chosen, f"{POLICY}/cpuinfo_max_freq": "2201600", f"{GPU}/max_freq": "624750000"})
    assert throttling(path) == ""
    root({f"{GPU}/min_freq": "624750000", f"{GPU}/cur_freq": "306000000"})
    assert throttling(path) == "GPU clock at 306 MHz, set to at least 624 MHz"
    root({f"{GPU}/cur_freq": "624750000", "sys/class/thermal/cooling_device3/type": "gpu-throttle-alert"})
    assert throttling(path) == ""
    root({"sys/class/thermal/cooling_device3/cur_state": "1"})
    assert throttling(path) == "gpu-throttle-alert is active"


def test_busy_seconds_count_what_any_process_computed_on_usable_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    (tmp_path / "proc").mkdir()
    stat = tmp_path / "proc/stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\n"
        "cpu0 100 20 30 5000 40 5 6 700 0 0\n"  # user nice system idle iowait irq softirq steal
        "cpu1 1000 0 0 0 0 0 0 0 0 0\n"
        "cpu2 39 0 0 9 0 0 0 0 0 0\n"
        "intr 1 2 3\n"
    )
    assert usable_cores() == 2
    assert busy_seconds(tmp_path) == pytest.approx(200 / os.sysconf("SC_CLK_TCK"))
    stat.write_text("cpu0 what is this\n")
    assert busy_seconds(tmp_path) is None
    assert busy_seconds(tmp_path / "nowhere") is None


def test_this_machine_tells_how_busy_it_is():
    before = busy_seconds()
    if before is None:
        pytest.skip("no /proc/stat here")
    end_s = time.process_time() + 0.3
    while time.process_time() < end_s:
        pass
    after = busy_seconds()
    assert after is not None and after - before >= 0.2
