# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`scripts/compare.py`: one page, continued where it was interrupted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from compare import CONTENDERS, format_report, growth_exponents, main

from clustvit_ros.networks import network_config


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for index in range(count):
            labels = np.repeat(np.array([[0], [3]], np.uint8), 32, axis=0).repeat(96, axis=1)
            labels[:4, :88] = np.repeat(np.arange(11, dtype=np.uint8), 8)  # every class occurs
            image = labels[..., None] * 60 + rng.integers(0, 40, (64, 96, 3))
            folder = tmp_path / "data" / split
            cv2.imwrite(str(folder / "images" / f"{index}.png"), image.astype(np.uint8))
            cv2.imwrite(str(folder / "labels" / f"{index}.png"), labels)
    return tmp_path / "data"


def test_systems_are_measured_trained_and_put_on_one_page(tmp_path, data, capsys):
    out = tmp_path / "out"
    arguments = [
        "--systems", "CAST", "--sizes", "64", "--runs", "1", "--out", str(out), "--threads", "1",
        "--data", str(data), "--steps", "2", "--crop", "64x64", "--input", "64x96", "--device", "cpu",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    page = (out / "comparison.md").read_text()
    assert page in printed and (out / "comparison.png").stat().st_size > 1000
    content = json.loads((out / "comparison.json").read_text())
    assert {row["system"] for row in content["costs"].values()} == {"CAST"}
    for row in content["costs"].values():
        assert row["latency_ms"] > 0 and row["peak_memory_mb"] > 0 and row["gflops"] > 0
    for score in content["scores"].values():
        assert score["steps"] == 2 and 0 <= score["miou"] <= 100
    # All is kept: the second call measures and trains nothing.
    before = (out / "comparison.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (out / "comparison.json").stat().st_mtime_ns == before
    assert "measured at" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "ViT,Swin"], "systems: got Swin, expected some of ViT, ClustViT, ToMe, ClusTR, ClusTR-t, CAST"),
        (["--kept", "0"], "kept: got 0.0, expected above 0"),
        (["--steps", "0"], "steps: got 0, expected at least 1"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path, capsys):
    assert main(["--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_foreign_result_file_is_refused(tmp_path, capsys):
    (tmp_path / "comparison.json").write_text("[1]")
    assert main(["--out", str(tmp_path)]) == 2
    assert "holds something else than costs and scores" in capsys.readouterr().err


def rows(name, power):
    return [
        {
            "system": name, "architecture": "vit_t", "size_px": size, "tokens": (size // 16) ** 2, "kept": 1.0,
            "parameters": 5_000_000, "gflops": 2.0 * size**2, "latency_ms": 0.1 * (size // 16) ** (2 * power),
            "peak_memory_mb": 50.0, "threads": 2,
        }
        for size in (256, 512, 1024)
    ]  # fmt: skip


def test_exponents_are_those_of_the_growth():
    exponents = growth_exponents(rows("quadratic", 2.0) + rows("linear", 1.0) + rows("one", 1.0)[:1])
    assert exponents["quadratic"]["latency_ms"] == pytest.approx(2.0)
    assert exponents["linear"]["latency_ms"] == pytest.approx(1.0)
    assert exponents["linear"]["peak_memory_mb"] == pytest.approx(0.0, abs=1e-6)
    assert "one" not in exponents


def test_the_page_states_exponents_and_ceilings():
    costs = rows("ViT", 2.0)
    page = format_report(costs, {}, growth_exponents(costs), {1024: 0.182, 4096: 0.4706}, "cpu")
    assert "| 2.00" in page and "1.22x" in page and "1.89x" in page
    assert "Scores:" not in page


def test_every_contender_can_be_built():
    for contender in CONTENDERS.values():
        for overrides in (contender.network, {**contender.network, **contender.training}):
            assert network_config(contender.architecture, overrides).patch_size in (16, 32)
