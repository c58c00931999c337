# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A network small enough for a test, and with weights that merge some of everything."""

from __future__ import annotations

import torch

from clustvit_ros.networks import Segmenter, ViTConfig, build_network

SMALL = {"image_size": (96, 128), "embed_dim": 24, "depth": 4, "num_heads": 2, "injection_point": 1, "head_depth": 1}


def make_small(**changes) -> Segmenter:
    """An untrained network of five classes; `changes` are those of its configuration."""
    torch.manual_seed(0)
    network = build_network(ViTConfig(**{**SMALL, **changes}), 5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()
