# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Writes the tables of docs/family.md: parameters, operations and tokens of every size and head, counted, not run.

.venv/bin/python scripts/family_table.py            # prints the tables
.venv/bin/python scripts/family_table.py --write    # puts them into docs/family.md
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from clustvit_ros.measure.flops import Cost, count_cost
from clustvit_ros.networks import network_config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "family.md"
NAMES = {"t": "Tiny", "s": "Small", "b": "Base", "l": "Large"}
KEPT = 0.3
# ADE20K images are segmented in windows; the mean number per image is that of ViT-B, 473.15 GFLOPs by 258.6 a window.
ADE20K_WINDOWS = 473.15 / 258.6

# (what, architecture, network, classes, tokens kept (0 is all), GFLOPs per window, where the figure comes from)
PUBLISHED: tuple[tuple[str, str, dict[str, Any], int, int, float, str], ...] = (
    ("ViT-B, Segmenter", "vit_b", {}, 150, 0, 258.6, "the project's reference figure"),
    ("ClustViT-B, Segmenter", "clustvit_b", {}, 150, 307, 148.7, "the project's reference figure"),
    ("ViT-T, Segmenter", "vit_t", {}, 150, 0, 46.27 / ADE20K_WINDOWS, "46.27 per ADE20K image"),
    ("ViT-S, Segmenter", "vit_s", {}, 150, 0, 140.55 / ADE20K_WINDOWS, "140.55 per ADE20K image"),
    ("ViT-B, Segmenter", "vit_b", {}, 9, 0, 252.33, "SUIM"),
    ("ViT-B, Segmenter", "vit_b", {}, 3, 0, 252.07, "RumexWeeds"),
    ("ViT-B, UPerNet", "vit_b", {"head": "upernet"}, 150, 0, 637.51 / ADE20K_WINDOWS, "637.51 per ADE20K image"),
    ("ViT-B, UPerNet", "vit_b", {"head": "upernet"}, 3, 0, 348.23, "RumexWeeds"),
    ("ViT-B, UPerNet", "vit_b", {"head": "upernet"}, 9, 0, 384.24, "SUIM"),
)


def cost(architecture: str, network: dict[str, Any], classes: int, side: int = 512, kept: int = 0) -> Cost:
    config = network_config(architecture, {"image_size": [side, side], **network})
    return count_cost(config, classes, (side, side), token_capacity=kept)


def sizes() -> list[str]:
    """One row per architecture and head."""
    rows = [
        "| Network | Head | Input | Parameters (M) | GFLOPs, all tokens | tokens kept | GFLOPs | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    heads: dict[str, dict[str, Any]] = {
        "Segmenter": {"head": "segmenter"},
        "UPerNet": {"head": "upernet"},
        "linear": {"head": "linear"},
    }
    for size, name in NAMES.items():
        side = 640 if size == "l" else 512
        tokens = (side // 16) ** 2
        kept = round(KEPT * tokens)
        for title, head in heads.items():
            plain = cost(f"vit_{size}", head, 150, side)
            mlp = {"cluster_mlp_dim": 3072} if title == "UPerNet" and size == "b" else {}
            full = cost(f"clustvit_{size}", {**head, **mlp}, 150, side)
            merged = cost(f"clustvit_{size}", {**head, **mlp}, 150, side, kept)
            rows.append(
                f"| ViT-{name} | {title} | {side} x {side} | {plain.parameters / 1e6:.2f} | {plain.flops / 1e9:.1f} "
                "| - | - | - |"
            )
            rows.append(
                f"| ClustViT-{name} | {title} | {side} x {side} | {full.parameters / 1e6:.2f} "
                f"| {full.flops / 1e9:.1f} | {kept} of {tokens} | {merged.flops / 1e9:.1f} "
                f"| {merged.flops / plain.flops:.0%} |"
            )
    return rows


def published() -> list[str]:
    """Our count beside the published one."""
    rows = [
        "| Network | classes | tokens kept | published | the same counted here | difference | spent here | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, architecture, network, classes, kept, figure, source in PUBLISHED:
        counted = cost(architecture, network, classes, kept=kept)
        same, spent = counted.reference_flops / 1e9, counted.flops / 1e9
        rows.append(
            f"| {title} | {classes} | {kept or 'all'} | {figure:.2f} | {same:.2f} | {same / figure - 1:+.2%} "
            f"| {spent:.2f} | {source} |"
        )
    return rows


def ways() -> list[str]:
    """Ways to merge and to decode, ViT-B's and ClustViT-B's weights at 512 x 512."""
    rows = ["| Way | tokens kept | GFLOPs | share of plain ViT-B |", "|---|---|---|---|"]
    plain = cost("vit_b", {}, 150).flops
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        ("one injection point (3), as published", {}),
        ("points 3 and 6", {"injection_points": [3, 6]}),
        ("one point, grouped decoding", {"decode": "grouped"}),
        ("one point, compact decoding", {"decode": "compact"}),
        ("ALGM, windows in block 1, pairs in block 5", {"merging": "algm", "decode": "compact"}),
        ("ToMe from block 3", {"merging": "tome"}),
        ("local k-means after block 3", {"merging": "kmeans"}),
        ("STViT-R's semantic tokens after block 3", {"merging": "stvit"}),
    )
    for title, network in variants:
        for kept in (512, 307):
            flops = cost("clustvit_b", network, 150, kept=kept).flops
            rows.append(f"| {title} | {kept} of 1024 | {flops / 1e9:.1f} | {flops / plain:.0%} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/family.md")
    args = parser.parse_args()
    for make in (sizes, published, ways):
        table = "\n".join(make())
        if not args.write:
            print(f"{table}\n")
            continue
        text = PAGE.read_text(encoding="utf-8")
        mark = re.compile(rf"(<!-- table: {make.__name__} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = mark.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
