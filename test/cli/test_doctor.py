# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The doctor: machines that lack something, and what it says about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clustvit_ros.cli import compute_checks, machine_checks
from clustvit_ros.cli.machine_checks import Finding, Level, as_json, as_text, judge_camera
from clustvit_ros.cli.main import main
from clustvit_ros.dds import PROFILE_VARIABLES, claim_domain, node_environment
from clustvit_ros.paths import share_dir

PROFILE = str(share_dir() / "config" / "fastdds_shm.xml")


def worst(findings: list[Finding]) -> Finding:
    return max(findings, key=lambda finding: list(Level).index(finding.level))


def test_every_finding_but_ok_has_a_remedy() -> None:
    with pytest.raises(ValueError, match="needs a remedy"):
        Finding("gpu", Level.WARN, "is hot")


def test_both_reports_say_the_same() -> None:
    findings = [Finding("a", Level.OK, "works"), Finding("b", Level.FAIL, "does not", "buy a new one")]
    assert "FAIL b: does not\n       -> buy a new one\n1 OK, 0 WARN, 1 FAIL" in as_text(findings)
    content = json.loads(as_json(findings))
    assert content["ok"] is False
    assert content["findings"][1] == {"check": "b", "level": "FAIL", "finding": "does not", "remedy": "buy a new one"}


def test_the_whole_command(
    make_toy_model: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clustvit_ros.classes import ClassSet

    model = make_toy_model(ClassSet.numbered(3))
    monkeypatch.setenv("ROS_DOMAIN_ID", str(claim_domain()))
    code = main(["doctor", "--json", "--device", "cpu", "--model", str(model), "--seconds", "0.2"])
    content = json.loads(capsys.readouterr().out)
    levels = {finding["check"]: finding["level"] for finding in content["findings"]}
    assert levels["torch"] == levels["model"] == levels["onnxruntime CPUExecutionProvider"] == "OK"
    assert {"gpu", "shared memory", "DDS profile", "socket buffers", "cv_bridge", "leftover segments"} <= set(levels)
    assert all(finding["remedy"] for finding in content["findings"] if finding["level"] != "OK")
    assert code == int("FAIL" in levels.values())


@pytest.fixture
def broken(tmp_path: Path) -> Any:
    """Makes an environment whose processes find a module that raises before the real one."""

    def make(module: str, statement: str) -> dict[str, str]:
        (tmp_path / f"{module}.py").write_text(statement)
        return {**os.environ, "PYTHONPATH": f"{tmp_path}:{share_dir()}"}

    return make


@pytest.mark.parametrize(
    ("module", "statement", "check", "remedy"),
    [
        ("cv2", "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')", "OpenCV",
         "opencv-python-headless"),
        ("cv2", "raise ImportError('numpy.core.multiarray failed to import')", "OpenCV", "pip install 'numpy<2'"),
        ("numpy", "raise ImportError('libopenblas.so.0: cannot open shared object file')", "NumPy", "libopenblas.so.0"),
        ("yaml", "raise ValueError('damaged')", "PyYAML", "pip install --force-reinstall pyyaml"),
        ("torch", "raise OSError('libcudart.so.12: cannot open shared object file')", "torch", "libcudart.so.12"),
    ],
)  # fmt: skip
def test_a_package_that_breaks_is_a_finding(module: str, statement: str, check: str, remedy: str, broken: Any) -> None:
    """And not the end of the doctor, nor of the help."""
    environ = broken(module, statement)
    command = [sys.executable, "-m", "clustvit_ros"]
    done = subprocess.run(
        [*command, "doctor", "--json", "--seconds", "0.1"], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings[check]["level"] == "FAIL" and remedy in findings[check]["remedy"], findings[check]
    # What is whole must not be installed again.
    assert module in ("torch", "numpy") or findings["torch"]["level"] != "FAIL", findings["torch"]
    if module != "yaml":
        helped = subprocess.run([*command, "--help"], env=environ, capture_output=True, text=True, timeout=120)
        assert helped.returncode == 0 and "doctor" in helped.stdout and "Traceback" not in helped.stderr


def test_what_is_missing_is_told_with_the_extra_that_brings_it(broken: Any) -> None:
    for module, extra in (("torch", "torch"), ("cv2", "opencv"), ("tqdm", "train")):
        environ = broken(module, f"raise ModuleNotFoundError('No module named {module}', name='{module}')")
        done = subprocess.run(
            [sys.executable, "-m", "clustvit_ros", "predict", "a.jpg"], env=environ, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"'predict' needs the Python package '{module}'" in done.stderr and f"{extra!r} extra" in done.stderr
        (Path(environ["PYTHONPATH"].split(":")[0]) / f"{module}.py").unlink()


def test_a_damaged_model_fails(make_toy_model: Any) -> None:
    from clustvit_ros.classes import ClassSet

    model = make_toy_model(ClassSet.numbered(3))
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (finding,) = compute_checks.try_model(str(model), "cpu")
    assert finding.level is Level.FAIL
    assert "cannot be read" in finding.finding
    (finding,) = compute_checks.try_model("no_such_model", "cpu")
    assert "not shipped" in finding.finding


def test_a_check_that_crashes_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_args: Any, **_options: Any) -> Any:
        return subprocess.CompletedProcess([], -11, "", "loading driver\nboom")

    monkeypatch.setattr(compute_checks.subprocess, "run", crash)
    (finding,) = compute_checks.run_isolated("torch")
    assert (finding.level, "SIGSEGV" in finding.finding, "boom" in finding.finding) == (Level.FAIL, True, True)

    def hang(*_args: Any, **_options: Any) -> Any:
        raise subprocess.TimeoutExpired([], 1.0)

    monkeypatch.setattr(compute_checks.subprocess, "run", hang)
    (finding,) = compute_checks.run_isolated("torch")
    assert "did not answer" in finding.finding


@pytest.mark.parametrize(
    ("machine", "hint"), [("aarch64", "NVIDIA's build of PyTorch for your JetPack"), ("x86_64", "CUDA build")]
)
def test_a_gpu_that_torch_was_not_built_for_fails(monkeypatch: pytest.MonkeyPatch, machine: str, hint: str) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        pytest.skip("needs a CPU build of PyTorch")
    monkeypatch.setattr(compute_checks, "gpu_hardware", lambda: "NVIDIA Jetson Orin Nano")
    monkeypatch.setattr(compute_checks.platform, "machine", lambda: machine)
    finding = worst(compute_checks.check_torch())
    assert (finding.check, finding.level) == ("gpu", Level.FAIL)
    assert "NVIDIA Jetson Orin Nano is there, but PyTorch does not use it" in finding.finding
    assert hint in finding.remedy
    assert worst(compute_checks.check_torch("cpu")).level is Level.WARN, "who asks for the CPU may have it"
    assert worst(compute_checks.check_torch("cuda")).level is Level.FAIL


@pytest.mark.parametrize(
    ("installed", "gpu", "level", "said", "remedy"),
    [
        (("onnxruntime", "onnxruntime-gpu"), "", Level.FAIL, "are both installed", "pip uninstall -y onnxruntime"),
        (("onnxruntime",), "Orin", Level.WARN, "Orin is there, but this build has no CUDA provider", "onnxruntime-gpu"),
        (("onnxruntime",), "", Level.OK, "", ""),
    ],
)
def test_onnxruntimes_builds_exclude_each_other(
    installed: tuple[str, ...], gpu: str, level: Level, said: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute_checks, "gpu_hardware", lambda: gpu)
    monkeypatch.setattr(compute_checks, "_is_installed", lambda name: name in installed)
    findings = compute_checks._check_onnxruntime_builds(["CPUExecutionProvider"])
    assert [finding.level for finding in findings] == ([] if level is Level.OK else [level])
    assert all(said in finding.finding and remedy in finding.remedy for finding in findings)


def test_a_provider_that_does_not_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    names = ["CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("needs a CPU build of onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(compute_checks, "_is_installed", lambda name: name == "onnxruntime")
    levels = {finding.check: finding.level for finding in compute_checks.check_onnxruntime()}
    assert levels == {
        "onnxruntime CUDAExecutionProvider": Level.FAIL, "onnxruntime CPUExecutionProvider": Level.OK,
    }  # fmt: skip


def test_gpus_are_recognised(tmp_path: Path) -> None:
    assert machine_checks.gpu_hardware(tmp_path) == ""
    information = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA GeForce RTX 3060\nIRQ: 5\n")
    assert machine_checks.gpu_hardware(tmp_path) == "NVIDIA GeForce RTX 3060"
    model = tmp_path / "proc/device-tree/model"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    assert "Jetson" in machine_checks.gpu_hardware(tmp_path)


def test_cv_bridge_under_numpy_2_is_a_warning() -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", "AttributeError: _ARRAY_API not found")

    (finding,) = machine_checks.check_cv_bridge(broken, present=True)
    assert finding.level is Level.WARN
    assert "_ARRAY_API" in finding.finding and "numpy<2" in finding.remedy
    (finding,) = machine_checks.check_cv_bridge(present=False)
    assert finding.level is Level.OK


@pytest.mark.parametrize(
    ("blocks", "free", "level"),
    [(16_384, 16_000, Level.WARN), (16_384, 4000, Level.FAIL), (131_072, 131_072, Level.OK)],
)
def test_shared_memory_of_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, blocks: int, free: int, level: Level
) -> None:
    status = os.statvfs_result((4096, 4096, blocks, free, free, 0, 0, 0, 0, 255))
    monkeypatch.setattr(machine_checks.os, "statvfs", lambda _path: status)
    findings = machine_checks.check_shared_memory(tmp_path)
    assert findings[0].level is level
    if level is not Level.OK:
        assert "--shm-size" in findings[0].remedy


def test_leftovers_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("fastrtps_0123456789abcdef", "fastrtps_0123456789abcdef_el"):
        (tmp_path / name).write_bytes(bytes(8192))
        os.utime(tmp_path / name, (1, 1))
    import time

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60.0)
    finding = machine_checks.check_shared_memory(tmp_path)[-1]
    assert "1 segments" in finding.finding and "--clean" in finding.remedy


@pytest.mark.parametrize(
    ("environ", "level", "text"),
    [
        ({}, Level.WARN, "none is in force"),
        ({PROFILE_VARIABLES[0]: PROFILE}, Level.OK, "segments of 34 MB"),
        ({PROFILE_VARIABLES[0]: "/nowhere.xml"}, Level.FAIL, "cannot be read"),
        ({"RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp"}, Level.OK, "rmw_cyclonedds_cpp"),
    ],
)
def test_profile_in_force(environ: dict[str, str], level: Level, text: str) -> None:
    finding = machine_checks.check_dds(environ, rclpy_present=True)[-1]
    assert finding.level is level
    assert text in finding.finding


def test_a_profile_without_room_is_a_warning(tmp_path: Path) -> None:
    profile = tmp_path / "p.xml"
    profile.write_text("<profiles><segment_size>1000000</segment_size></profiles>")
    finding = machine_checks.check_dds({PROFILE_VARIABLES[0]: str(profile)}, rclpy_present=True)[-1]
    assert finding.level is Level.WARN
    assert worst(machine_checks.check_dds({}, rclpy_present=False)).level is Level.WARN


def test_socket_buffers(tmp_path: Path) -> None:
    path = tmp_path / "proc/sys/net/core/rmem_max"
    path.parent.mkdir(parents=True)
    path.write_text("212992\n")
    assert machine_checks.check_sockets(tmp_path)[0].level is Level.WARN
    path.write_text("33554432\n")
    assert machine_checks.check_sockets(tmp_path)[0].level is Level.OK


CAMERA = {
    "topic": "/image", "messages": 30, "rate_hz": 29.9, "encoding": "bgr8", "size": [480, 640], "bytes": 921600,
    "stamped": True, "age_s": 0.02, "errors": [], "image_topics": [],
    "publishers": [
        {"node": "/camera", "type": "sensor_msgs/msg/Image", "reliability": "BEST_EFFORT", "durability": "VOLATILE"}
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({}, Level.OK, "640x480 bgr8 at 29.9 Hz on /image"),
        ({"publishers": [], "image_topics": ["/front/image_raw"]}, Level.FAIL, "nobody publishes"),
        ({"messages": 0}, Level.FAIL, "nothing arrives"),
        ({"errors": ["encoding: got '32FC1', expected one of rgb8"]}, Level.FAIL, "32FC1"),
        ({"publishers": [{**CAMERA["publishers"][0], "type": "std_msgs/msg/String"}]}, Level.FAIL, "String"),
        ({"stamped": False}, Level.WARN, "without a time stamp"),
        ({"age_s": 12.0}, Level.WARN, "12.0 s old"),
        ({"publishers": CAMERA["publishers"] * 2}, Level.WARN, "2 publishers"),  # type: ignore[operator]
    ],
)
def test_cameras(change: dict[str, Any], level: Level, text: str) -> None:
    findings = judge_camera({**CAMERA, **change}, required=True)
    assert worst(findings).level is level
    assert any(text in finding.finding for finding in findings)


def test_a_camera_elsewhere_is_named() -> None:
    found = {**CAMERA, "publishers": [], "image_topics": ["/front/image_raw"]}
    (finding,) = judge_camera(found, required=False)
    assert finding.level is Level.WARN
    assert "/front/image_raw" in finding.remedy


def test_the_doctor_needs_no_other_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("torch", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)  # importing them fails
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--help"])
    assert end.value.code == 0


@pytest.mark.ros
def test_param_does_what_ros2_param_does(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    monkeypatch.setenv("ROS_DOMAIN_ID", str(claim_domain()))
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")

    def ask(*words: str) -> tuple[int, str]:
        code = main(["param", *words, "--timeout", "30"])
        streams = capfd.readouterr()
        return code, streams.out + streams.err

    command = [sys.executable, "-m", "clustvit_ros.node.node", "--ros-args", "-p", "engine:=scripted"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    node = subprocess.Popen(command, env=node_environment(os.environ), **quiet)
    try:
        assert ask("set", "merge_threshold", "0.3") == (0, "merge_threshold is 0.3 now\n")
        assert ask("get", "merge_threshold") == (0, "0.3\n")
        code, told = ask("set", "merge_threshold", "7")
        assert code == 1 and "merge_threshold: got 7, expected a double from 0.0 to 1.0" in told
        code, told = ask("describe", "latency_budget_ms")
        assert code == 0 and told.startswith("latency_budget_ms: double\n") and "0.0 to 60000.0" in told
        code, told = ask("list")
        assert code == 0 and {"merge_threshold", "latency_budget_ms", "model"} <= set(told.split())
        listing = f"set -o pipefail; {sys.executable} -m clustvit_ros.cli.main param list | head -1"
        cut = subprocess.run(["bash", "-c", listing], capture_output=True, text=True, timeout=60, check=False)
        assert len(cut.stdout.splitlines()) == 1 and cut.stderr == ""
        for words in (("get", "nope"), ("set", "nope", "1")):
            code, told = ask(*words)
            assert code == 1 and "no parameter 'nope'" in told
        groups = "low: dark, dim; high: bright, glare"
        assert ask("set", "class_groups", groups) == (0, f"class_groups is {groups} now\n")
        assert ask("set", "class_groups", "") == (0, "class_groups is  now\n")
        both = "min_input_scale", "0.3", "input_scale", "0.3"
        assert ask("set", *both) == (0, "min_input_scale is 0.3 now\ninput_scale is 0.3 now\n")
        assert ask("set", "min_input_scale", "0.5", "input_scale", "0.4")[0] == 1
        assert ask("get", "min_input_scale") == (0, "0.3\n")
    finally:
        node.terminate()
        node.wait(30)
    assert main(["param", "set", "merge_threshold"]) == 2
    assert "clustvit-ros param set NAME VALUE" in capfd.readouterr().err
