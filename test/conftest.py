# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Where the tests find their data; what a stranger's clone lacks is skipped, saying so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from clustvit_ros.classes import ClassSet
from clustvit_ros.dds import bound_spinning
from clustvit_ros.engine import ScriptedEngine

# Before PyTorch is imported. Without a bound, its threads spin through whole time slices when a node under test has the
# other core, and tests take ten times as long. Where each core runs tests of its own, one thread is what there is.
bound_spinning()
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have what fails tried once more: many tests run processes, and some look at time, beside whatever else runs.

    A test that needs it is shown as R and counted, by pytest-rerunfailures; without that plugin nothing is tried again.
    """
    for item in items:
        item.add_marker(pytest.mark.flaky(reruns=1))
        if item.get_closest_marker("ros"):
            item.add_marker(pytest.mark.alone)


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} in a folder 'shared' beside the checkout, which is not part of the repository")
    return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Inputs, weights and outputs of the official implementation."""
    return _shared("golden")


@pytest.fixture(scope="session")
def camvid_dir() -> Path:
    """CamVid with folders `train` and `val`."""
    return _shared("data/camvid")


@pytest.fixture(scope="session")
def ycor_dir() -> Path:
    """YCOR with folders `train` and `val`."""
    return _shared("data/ycor")


@pytest.fixture(scope="session")
def make_toy_model(tmp_path_factory) -> Callable[[ClassSet], Path]:
    """Makes the folder of a small untrained ClustViT whose merge scores spread over the whole range."""
    import torch

    from clustvit_ros.networks import ModelConfig, build_network, network_config, save_model
    from clustvit_ros.networks.model_folder import InputConfig

    def make(classes: ClassSet) -> Path:
        torch.manual_seed(0)
        overrides = {"image_size": [96, 128], "embed_dim": 48, "depth": 3, "injection_point": 1, "head_depth": 1}
        config = ModelConfig(
            name="toy", architecture="clustvit_t", network=network_config("clustvit_t", overrides), classes=classes,
            input=InputConfig(size=(96, 128)), overrides=overrides,
        )  # fmt: skip
        network = build_network(config.network, len(classes))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("models") / "toy"
        save_model(folder, config, network)
        return folder

    return make


@pytest.fixture(scope="session")
def vnni():
    """For tests that compute in 8-bit integers."""
    from clustvit_ros.networks.inference import int8_problem

    if problem := int8_problem():
        pytest.skip(f"needs 8-bit products: {problem}")


class ScriptedClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


@pytest.fixture
def scripted_engine():
    """Makes an engine of a given latency, and the clock that it lives by."""

    def make(latency_ms):
        clock = ScriptedClock()
        return ScriptedEngine(latency_ms, sleep=clock.sleep, clock=clock), clock

    return make


@pytest.fixture(scope="session")
def stair_jpeg() -> Callable[[int, int], bytes]:
    """Makes JPEGs of 320x240, darker from the 16x16 unit at (row, column) on, as behind an error in the file."""

    def encode(row: int, column: int) -> bytes:
        coarse = np.random.default_rng(0).uniform(80, 180, (12, 16, 3))
        pixels = cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_CUBIC)
        pixels[16 * row : 16 * row + 16, 16 * column :] -= 30.0
        pixels[16 * row + 16 :] -= 30.0
        return cv2.imencode(".jpg", np.clip(pixels, 0, 255).astype(np.uint8))[1].tobytes()

    return encode
