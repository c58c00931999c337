# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros bench`: what it writes, never how fast anything is."""

from __future__ import annotations

import json
import re

import pytest

from clustvit_ros.cli.main import main
from clustvit_ros.measure.bench import _STAGES, ROW_KEYS, format_table


def bench(*arguments):
    return main(["bench", "--device", "cpu", "--runs", "3", "--warmup", "1", *map(str, arguments)])


def test_architectures_are_measured_side_by_side_and_reported(tmp_path, capsys, monkeypatch):
    # A process of its own per row takes seconds; test_benchmark.py has one.
    monkeypatch.setattr("clustvit_ros.measure.bench._peak_memory_mb", lambda case: 1.0)
    options = ["--arch", "vit_t,clustvit_t", "--size", "64x96", "--classes", 4, "--kept-fraction", "0.25,0.5"]
    files = ["--json", tmp_path / "deep" / "rows.json", "--plot", tmp_path / "plot.png", "--save-dir", tmp_path / "all"]
    assert bench(*options, *files, "--roofline") == 0
    rows = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert all(tuple(row) == ROW_KEYS for row in rows)
    assert [(row["arch"], row["tokens_kept"]) for row in rows] == [("vit_t", 24), ("clustvit_t", 6), ("clustvit_t", 12)]
    assert rows[1]["gflops"] < rows[2]["gflops"] < rows[0]["gflops"]
    saved = list((tmp_path / "all").iterdir())
    assert len(saved) == 1 and json.loads(saved[0].read_text()) == rows
    assert re.fullmatch(r"cpu-[a-z0-9.+-]+-threads_torch-[a-z0-9.+-]+_\d{4}-\d\d-\d\d\.json", saved[0].name)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert (
        "GFLOP/s in matrix products" in printed
        and "x roofline" in printed
        and "| clustvit_t | torch  | float32   | 64x96 | 6/24" in printed
    )


def test_a_model_is_measured_with_its_own_size_and_classes(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("clustvit_ros.measure.bench._peak_memory_mb", lambda case: 1.0)
    assert bench("--model", model_dir, "--capacity", "7,48", "--json", tmp_path / "rows.json") == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["arch"], row["size"], row["classes"], row["tokens_kept"]) for row in rows] == [
        ("toy", "96x128", 3, 7),
        ("toy", "96x128", 3, 48),
    ]


def test_ways_to_merge_and_decode_are_measured_side_by_side(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("clustvit_ros.measure.bench._peak_memory_mb", lambda case: 1.0)
    options = ("--merge", "none,clusters,tome,kmeans", "--decode", "full,compact", "--capacity", "12")
    assert bench("--model", model_dir, *options, "--json", tmp_path / "rows.json") == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    gflops = {row["arch"].split("+", 1)[1]: row["gflops"] for row in rows}
    assert len(rows) == 8 and [row["tokens_kept"] for row in rows] == [48, 48] + 6 * [12]
    assert gflops["clusters+compact"] < gflops["clusters+full"] < gflops["none+full"]
    assert gflops["tome+compact"] < gflops["tome+full"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int4"], "precision: got 'int4', expected one of auto, float32, float16, bfloat16, int8"),
        (["--arch", "resnet"], "unknown architecture 'resnet'"),
        (["--arch", "clustvit_t", "--size", "32x32", "--capacity", "5"], "capacity: got 5, the input has 4 tokens"),
        (["--engine", "scripted", "--size", "32x32"], "engine 'scripted' runs no network"),
        (["--classes", "0"], "classes: got 0, expected at least 1"),
        (["--runs", "0"], "runs: got 0, expected at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, capsys):
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_models_classes_are_its_own(model_dir, capsys):
    assert bench("--model", model_dir, "--classes", 5) == 2
    assert "leave out either --classes or --model" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--kept-fraction", "0"], ["--kept-fraction", "1.5"], ["--capacity", "-3"]])
def test_shares_and_counts_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        bench(*arguments)
    assert "expected" in capsys.readouterr().err


def test_the_table_shows_every_row_and_stage():
    names = {"arch": "net", "engine": "torch", "device": "cpu", "precision": "float32", "size": "8x8"}
    row = dict.fromkeys(ROW_KEYS, 1.0) | names
    rows = [row | {"stages_ms": {"decode": 2.0, "encode": 3.0}}, row | {"stages_ms": {"network": 4.0}}]
    lines = format_table(rows, [0.5, 0.5]).splitlines()
    assert len(lines) == 20 and [len({len(line) for line in lines[at : at + 4]}) for at in (2, 9, 16)] == [1, 1, 1]
    assert [cell.strip() for cell in lines[16].split("|")[-4:-1]] == ["network", "encode", "decode"]
    assert "2.00" in lines[11]  # measured against the roofline's half
    long = row | {"arch": "clustvit_t", "engine": "onnxruntime", "precision": "bfloat16", "size": "1024x1024",
                  "tokens_kept": 4096, "tokens_total": 4096, "peak_memory_mb": 12345.0,
                  "stages_ms": dict.fromkeys(_STAGES, 1000.0)}  # fmt: skip
    assert max(map(len, format_table([long], [0.5]).splitlines())) <= 120
