#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What only a GPU can tell: see gpu_check.sh, which calls this once for each part.

Usage: `python scripts/gpu_check.py agreement|graphs --device DEVICE --json FILE`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import Settings
from clustvit_ros.engine.graph_engine import GraphEngine
from clustvit_ros.engine.torch_engine import TorchEngine
from clustvit_ros.errors import ClustvitError
from clustvit_ros.networks.architectures import build_network, network_config
from clustvit_ros.networks.model_folder import InputConfig, ModelConfig, save_model
from clustvit_ros.paths import share_dir

_LEAST_AGREEMENT = 0.995
_LEAST_EQUAL = 0.9999
_FRAMES = 8


def main(arguments: list[str] | None = None) -> int:
    """Run one part.

    Returns:
        0 when it shows what it should, 1 when not.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("agreement", "graphs"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    part = {"agreement": check_agreement, "graphs": check_graphs}[args.part]
    try:
        rows = part(args.device)
    except ClustvitError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(row)
    return 0 if all(row["passed"] for row in rows) else 1


def check_agreement(device: str) -> list[dict[str, Any]]:
    """Masks of half precisions against float32: the shipped model on its own example picture's camera images."""
    frames = _frames((352, 480))
    reference = _masks(TorchEngine.from_model("camvid_tiny", device), frames)
    rows = []
    for precision in ("float16", "bfloat16"):
        masks = _masks(TorchEngine.from_model("camvid_tiny", device, precision=precision), frames)
        agreement = float((masks == reference).mean())
        # bfloat16 is reported; float16 is what the product recommends, and is held to the bound.
        passed = agreement >= _LEAST_AGREEMENT or precision == "bfloat16"
        rows.append({"model": "camvid_tiny", "precision": precision, "agreement": agreement, "passed": passed})
    return rows


def check_graphs(device: str) -> list[dict[str, Any]]:
    """Captured graphs against eager frames, at full size: masks must be equal.

    All but one pixel in 10,000: a library may choose another kernel, with other rounding, while it is captured.
    """
    # A CPU only shows that this script runs.
    size, archs = ((64, 64), ("clustvit_t",)) if device == "cpu" else ((512, 512), ("clustvit_t", "clustvit_b"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="clustvit_gpu_") as folder:
        for arch in archs:
            model = _random_model(Path(folder) / arch, size)
            for precision in ("float32", "float16"):
                graphs = GraphEngine.from_model(model, device, precision=precision)
                eager = TorchEngine.from_model(model, device, precision=precision)
                graphs.warmup()
                frames = _frames(size)[:3]
                settings = [Settings(merge_threshold=t, token_capacity=c) for t in (0.5, 1.0) for c in (0, 5, 307)]
                equal = min(
                    float((graphs.segment(frame, setting).mask == eager.segment(frame, setting).mask).mean())
                    for frame in frames
                    for setting in settings
                )
                captured = graphs.info.engine == "cuda_graph"
                passed = equal >= _LEAST_EQUAL and (captured or device == "cpu")
                row = {"arch": arch, "precision": precision, "captured": captured, "equal_pixels": equal}
                rows.append({**row, "reason": graphs.info.device_reason, "passed": passed})
                graphs.close()
    return rows


def _masks(engine: TorchEngine, frames: list[np.ndarray]) -> np.ndarray:
    return np.stack([engine.segment(frame).mask[0] for frame in frames])


def _frames(size: tuple[int, int]) -> list[np.ndarray]:
    """Crops of the shipped camera images of road scenes; noise has no classes to agree on."""
    import cv2

    picture = cv2.imread(str(share_dir() / "models" / "camvid_tiny" / "example.jpg"))
    if picture is None:
        raise ClustvitError("models/camvid_tiny/example.jpg cannot be read; check out the whole repository")
    picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    tops, lefts = np.linspace(0, height, 2, dtype=int), np.linspace(0, width, _FRAMES // 2, dtype=int)
    crops = [picture[top : top + height, left : left + width] for top in tops for left in lefts]
    return [cv2.resize(crop, size[::-1], interpolation=cv2.INTER_LINEAR) for crop in crops]


def _random_model(folder: Path, size: tuple[int, int]) -> Path:
    overrides = {"image_size": list(size)}
    config = ModelConfig(
        name=folder.name,
        architecture=folder.name,
        network=network_config(folder.name, overrides),
        classes=ClassSet.numbered(150),
        input=InputConfig(size=size),
        overrides=overrides,
    )
    torch.manual_seed(0)
    save_model(folder, config, build_network(config.network, 150))
    return folder


if __name__ == "__main__":
    sys.exit(main())
