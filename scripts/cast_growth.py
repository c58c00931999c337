# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Time and memory of CAST attention against ordinary attention as tokens grow, at one cluster size.

    python scripts/cast_growth.py [--json growth.json] [--plot growth.png]

Ordinary attention is measured twice: fused (scores are never held; what the networks here use) and with N x N scores
in memory. Time is one thread's processor time, all ways in turns; memory is the growth of the process's resident peak
during a call. Exponents are fitted over the larger half of the sizes, where fixed costs no longer count.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clustvit_ros.measure.pictures import new_figure, save_figure
from clustvit_ros.networks.cast import CASTAttention
from clustvit_ros.networks.vit import Attention

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="256,512,1024,2048,4096,8192,16384", help="sequence lengths")
    parser.add_argument("--embed-dim", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--cluster-size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5, help="timed calls, of which the median counts")
    parser.add_argument("--max-materialised", type=int, default=4096, help="longest sequence with its scores in memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ordinary = Attention(args.embed_dim, args.heads).eval()
    cast = CASTAttention(args.embed_dim, args.heads, args.clusters, args.cluster_size).eval()

    def materialised(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return ordinary(x)

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "cast": cast, "fused": ordinary, "materialised": materialised,
    }  # fmt: skip
    sizes = [int(text) for text in args.tokens.split(",")]
    held = {n: [name for name in ways if name != "materialised" or n <= args.max_materialised] for n in sizes}
    inputs = {n: torch.randn(1, n, args.embed_dim) for n in sizes}
    # First with every larger buffer from the system and back to it, so that a peak is the call's own.
    keep_buffers(below_bytes=1 << 16)
    memory_mb = {(n, name): peak_mb(ways[name], inputs[n]) for n in sizes for name in held[n]}
    keep_buffers(below_bytes=1 << 25)
    rows = []
    for n in sizes:
        for name, time_ms in median_ms({name: ways[name] for name in held[n]}, inputs[n], args.runs).items():
            rows.append({"way": name, "tokens": n, "time_ms": time_ms, "memory_mb": memory_mb[n, name]})
            print("{way:>12} {tokens:6d} tokens {time_ms:9.2f} ms {memory_mb:8.1f} MB".format(**rows[-1]), flush=True)
    for name in ways:
        for quantity in ("time_ms", "memory_mb"):
            print(f"{name}: {quantity} ~ tokens^{exponent(rows, name, quantity):.2f}")
    for other in ("fused", "materialised"):
        for quantity in ("time_ms", "memory_mb"):
            print(f"cast undercuts {other} in {quantity} from {crossover(rows, other, quantity)} tokens on")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        draw(rows, args.plot)


@torch.inference_mode()
def peak_mb(attend: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Peak memory of a call in 1e6 bytes."""
    attend(x)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_mb("VmRSS")
    attend(x)
    return max(status_mb("VmHWM") - before, 0.1)


@torch.inference_mode()
def median_ms(ways: dict[str, Callable[[Tensor], Tensor]], x: Tensor, runs: int) -> dict[str, float]:
    """Median time of a call of each way, in turns."""
    times_ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, attend in ways.items():
            start = time.process_time()
            attend(x)
            times_ms[name].append((time.process_time() - start) * 1000.0)
    return {name: statistics.median(values) for name, values in times_ms.items()}


def keep_buffers(below_bytes: int) -> None:
    """Have the C library keep freed buffers of up to so many bytes; up to 32 MB it does so once it has met them."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_M_MMAP_THRESHOLD, below_bytes)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * below_bytes)


def status_mb(name: str) -> float:
    """A memory figure of this process in 1e6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name + ":"))


def exponent(rows: list[dict], name: str, quantity: str) -> float:
    """p of quantity ~ tokens^p over the larger half of the sizes."""
    points = [(row["tokens"], row[quantity]) for row in rows if row["way"] == name]
    points = points[len(points) // 2 :]
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0])


def crossover(rows: list[dict], other: str, quantity: str) -> str:
    """The smallest measured size from which CAST stays below the other."""
    values = {(row["way"], row["tokens"]): row[quantity] for row in rows}
    sizes = sorted(tokens for way, tokens in values if way == other)
    above = [tokens for tokens in sizes if values["cast", tokens] >= values[other, tokens]]
    later = [tokens for tokens in sizes if not above or tokens > above[-1]]
    return str(later[0]) if later else f"no measured number (up to {sizes[-1]})"


def draw(rows: list[dict], path: Path) -> None:
    figure, (row_of_axes,) = new_figure((9, 3.8), columns=2)
    sizes = sorted({row["tokens"] for row in rows})
    for axes, quantity in zip(row_of_axes, ("time_ms", "memory_mb"), strict=True):
        for name in dict.fromkeys(row["way"] for row in rows):
            points = [(row["tokens"], row[quantity]) for row in rows if row["way"] == name]
            axes.loglog(*zip(*points, strict=True), marker="o", label=f"{name}: {exponent(rows, name, quantity):.2f}")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel({"time_ms": "time (ms)", "memory_mb": "peak memory (MB)"}[quantity])
        axes.grid(alpha=0.3, which="both")
        axes.legend(title="exponent", fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
