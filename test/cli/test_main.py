# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The command line as a whole."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest

from clustvit_ros.cli.main import COMMANDS, main


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
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
