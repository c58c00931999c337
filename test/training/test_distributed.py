# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Several processes give the result of one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch


def torchrun(recipe, data, out, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "clustvit_ros.cli.main", "train", str(recipe), "--data", str(data), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, "--device", "cpu"], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_two_processes_train_like_one(scenes, train, write_recipe, tmp_path):
    """Same global batch, conv stem with batch norm, unequal void, class weights, OHEM, Lovász, distillation, noise."""
    extras = {
        "ohem_share": 0.7, "lovasz_weight": 0.5, "distillation_weight": 1.0, "kept_fractions": [0.5], "epochs": 1,
        "validate_every": 1,
    }  # fmt: skip
    recipe = write_recipe(schedule=extras, augmentation={"scale": [0.4, 1.4], "noise": 8.0, "blur_px": 1.0})
    assert train(recipe, tmp_path / "one") == 0
    result = torchrun(recipe, scenes, tmp_path / "two", 2)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert one["step"] == two["step"] == 2
    for name, tensor in one["network"].items():
        torch.testing.assert_close(
            two["network"][name], tensor, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_batch_that_cannot_be_divided_is_refused():
    from clustvit_ros.errors import DataError
    from clustvit_ros.training.distributed import Processes
    from clustvit_ros.training.loop import TrainingLoop
    from clustvit_ros.training.recipe import Schedule

    class Loop(TrainingLoop):
        _step_module = _batches = _inputs = None

    with pytest.raises(DataError, match="batch_size is 3, which cannot be divided between 2 processes"):
        Loop(torch.nn.Linear(1, 1), Schedule(1, 3), 3, {}, "unused", torch.device("cpu"), Processes(0, 2))
