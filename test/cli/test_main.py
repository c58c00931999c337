# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The command line as a whole."""

from __future__ import annotations

import builtins
import importlib
import shlex
import subprocess
import sys

import pytest

from clustvit_ros import __version__
from clustvit_ros.cli.main import COMMANDS, main, make_parser
from clustvit_ros.paths import share_dir


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(name.replace("_", "-") in printed for name in COMMANDS)


def test_alone_it_lists_its_commands(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().err
    assert all(name.replace("_", "-") in printed for name in COMMANDS)


def test_the_entry_point_loads_no_package_that_can_be_missing():
    """The doctor must be able to say which one is: without this, all commands end in a traceback."""
    program = "import sys, clustvit_ros.cli.main; print(*{'cv2', 'numpy', 'torch', 'yaml', 'rclpy'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_a_missing_package_disables_only_the_commands_that_need_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "clustvit_ros.cli.train", raising=False)
    monkeypatch.delitem(sys.modules, "clustvit_ros.training.trainer", raising=False)
    import_ = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")
        return import_(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert main(["train", "recipe.yaml", "--data", "somewhere"]) == 2
    assert "'train' needs the Python package 'tqdm'" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["auto", "torch", "cuda_graph", "onnxruntime"])
def test_a_missing_torch_is_one_sentence_that_names_the_interpreter(engine):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from clustvit_ros.engine import create_engine\n"
        "from clustvit_ros.errors import EngineError\n"
        f"try: create_engine('camvid_tiny', {engine!r})\n"
        "except EngineError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 1 and f"engine {engine} needs the Python package 'torch', which {sys.executable}" in said
    assert "activate the virtual environment" in said


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("libGL.so.1: cannot open shared object file"), "cannot be loaded: libGL.so.1"),
        (ImportError("numpy.core.multiarray failed to import"), "cannot be loaded: numpy.core.multiarray"),
        (AttributeError("_ARRAY_API not found"), "cannot be loaded: _ARRAY_API"),
    ],
)
def test_a_broken_package_is_one_line_that_sends_to_the_doctor(error, told, monkeypatch, capsys):
    def broken(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    assert main(["predict", "a.jpg"]) == 2
    printed = capsys.readouterr().err
    assert told in printed and "clustvit-ros doctor" in printed
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_that_the_command_takes(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name.replace("_", "-"), "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out.partition("examples:")[2]
    assert COMMANDS[name].examples
    for example in COMMANDS[name].examples:
        assert f"  clustvit-ros {example}\n" in printed
        assert make_parser([name]).parse_args(shlex.split(example)).run


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "clustvit_ros", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_a_reader_that_has_had_enough_is_no_error():
    command = [sys.executable, "-m", "clustvit_ros", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.mark.parametrize("threads", ["-1", "100000", "many"])
@pytest.mark.parametrize("command", ["bench", "evaluate --model m --images i --labels l", "train r --data d"])
def test_threads_beyond_what_native_code_bears_are_refused(command, threads, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--threads", threads])
    assert f"got '{threads}', expected a whole number from 0 to 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("doctor --seconds nan", "--seconds: got nan, expected more than 0"),
        ("doctor --seconds -1", "--seconds: got -1, expected more than 0"),
        ("bench --arch vit_t --size 32x32 --runs 1 --warmup 0 --json /proc/x.json", "/proc/x.json"),
        ("bench --arch vit_t --size 32x32 --runs 1 --warmup 0 --plot {tmp}/x.xyz", "x.xyz: cannot be drawn"),
    ],
)
def test_what_cannot_be_used_or_written_is_one_line(command, message, capsys, tmp_path):
    assert main(command.format(tmp=tmp_path).split()) == 2
    assert message in capsys.readouterr().err


def test_an_empty_init_is_no_random_start(capsys, tmp_path):
    recipe = share_dir() / "config" / "train" / "camvid_tiny.yaml"
    assert main(["train", str(recipe), "--data", str(tmp_path), "--init", ""]) == 2
    assert "--init: got nothing" in capsys.readouterr().err
