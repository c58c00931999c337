# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Counted operations and measured rows: their form and their relations, never a speed."""

from __future__ import annotations

import pytest

from clustvit_ros.errors import ConfigError
from clustvit_ros.measure.bench import ROW_KEYS, BenchCase, Pipeline, run_cases
from clustvit_ros.measure.flops import Cost, DeviceRates, count_cost, roofline_ms
from clustvit_ros.networks import network_config


@pytest.mark.parametrize(("arch", "kept", "published_gflops"), [("vit_b", 0, 258.6), ("clustvit_b", 307, 148.7)])
def test_operations_are_the_published_ones(arch, kept, published_gflops):
    counted = count_cost(network_config(arch, {}), 150, (512, 512), token_capacity=kept).flops / 1e9
    # The reference implementation's regenerator runs its first layer on [token; representative] of each of the 717
    # merged tokens; here the representative's half runs once per cluster.
    saved = 0.0 if arch == "vit_b" else 2 * (1024 - 307) * 768 * 768 / 1e9
    assert counted + saved == pytest.approx(published_gflops, abs=0.06)


def test_operations_grow_with_capacity_size_and_batch():
    config = network_config("clustvit_t", {"image_size": [128, 128]})
    counts = [count_cost(config, 5, (128, 128), token_capacity=kept).flops for kept in (1, 16, 32, 48, 64)]
    assert counts == sorted(set(counts))
    assert count_cost(config, 5, (128, 128), batch=3, token_capacity=16).flops == 3 * counts[1]
    assert count_cost(config, 5, (256, 128), token_capacity=16).flops > counts[1]
    plain = count_cost(network_config("vit_t", {"image_size": [128, 128]}), 5, (128, 128))
    assert plain.parameters < count_cost(config, 5, (128, 128)).parameters


def test_roofline_is_the_slower_of_arithmetic_and_memory():
    cost = Cost(flops=10**9, parameters=10**6)
    assert roofline_ms(cost, DeviceRates(100.0, 1e9), 0, 0) == pytest.approx(10.0)
    assert roofline_ms(cost, DeviceRates(1e9, 1.0), 500_000, 500_000) == pytest.approx(5.0)


def test_rows_have_the_agreed_keys_and_share_the_work(toy_model):
    cases = [BenchCase("toy", toy_model, "torch", "cpu", 0, (96, 128), 2, capacity) for capacity in (5, 0)]
    rows = run_cases(cases, runs=4, warmup=1)
    for row in rows:
        assert tuple(row) == ROW_KEYS
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["peak_memory_mb"] > 0 and row["parameters"] > 0
        assert list(row["stages_ms"]) == ["preprocess", "encode", "finish", "decode", "postprocess"]
    first = {name: rows[0][name] for name in ("arch", "engine", "precision", "size", "batch", "classes")}
    assert first == {
        "arch": "toy", "engine": "torch", "precision": "float32", "size": "96x128", "batch": 2, "classes": 7,
    }  # fmt: skip
    assert [row["tokens_kept"] for row in rows] == [5, 48] and rows[0]["tokens_total"] == 48
    assert rows[0]["gflops"] < rows[1]["gflops"]


@pytest.mark.parametrize("engine", ["torch", "cuda_graph"])
def test_what_is_timed_is_what_a_node_runs(toy_model, engine):
    case = BenchCase("toy", toy_model, engine, "cpu", 0, (96, 128), token_capacity=6, input_scale=0.5)
    stats = Pipeline(case, case.open())()
    assert stats.operating_point == (0.5, 6, 12) and stats.input_size == (48, 64)


def test_an_engine_without_a_network_is_refused(toy_model):
    with pytest.raises(ConfigError, match="engine 'scripted' runs no network"):
        BenchCase("toy", toy_model, "scripted", "cpu", 0, (96, 128)).open()


def test_counting_takes_no_memory():
    # Terabytes of weights, which exist as shapes only.
    config = network_config("vit_l", {"embed_dim": 1024 * 64})
    assert count_cost(config, 5, (64, 64)).parameters > 1e12
