# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Named architectures and the networks they stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

from clustvit_ros.config import from_mapping, to_mapping
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.cast import CASTConfig
from clustvit_ros.networks.clustr import ClusTRConfig
from clustvit_ros.networks.segmenter import NetworkConfig, Segmenter, initialise
from clustvit_ros.networks.vit_config import ViTConfig

_VIT_SIZES = {
    "t": {"embed_dim": 192, "depth": 12, "num_heads": 3}, "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12}, "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}  # fmt: skip
ARCHITECTURES: dict[str, NetworkConfig] = {
    f"{backbone}_{size}": from_mapping(ViTConfig, {"backbone": backbone, **shape}, f"{backbone}_{size}")
    for backbone in ("vit", "clustvit")
    for size, shape in _VIT_SIZES.items()
}
ARCHITECTURES |= {
    f"cast_{size}": from_mapping(CASTConfig, _VIT_SIZES[size], f"cast_{size}") for size in ("t", "s", "b")
}
ARCHITECTURES |= {
    "clustr_b1": ClusTRConfig(),
    "clustr_b2": ClusTRConfig(depths=(3, 5, 13, 2)),
    "clustr_b3": ClusTRConfig(depths=(3, 5, 18, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    "clustr_t": ClusTRConfig(
        embed_dims=(32, 64, 128, 256), depths=(1, 2, 4, 1), num_heads=(1, 1, 2, 4), mlp_ratios=(4.0, 4.0, 4.0, 4.0),
        window_tokens=256, head_dim=64,
    ),
}  # fmt: skip
"""Published sizes by name, and `clustr_t`, half as wide as `clustr_b1`, which takes a CPU as long as `vit_t` does; a
model's `network` section states what differs."""

# Far above any vision transformer.
_LARGEST_SIZE, _DEEPEST = 65_536, 512
# Hyper-parameters that mean nothing to a plain ViT.
_OF_MERGING = {
    "merging", "merge_similarity", "share_corner", "shared_windows", "num_clusters", "injection_point",
    "injection_points", "cluster_mlp_dim", "decode",
}  # fmt: skip


def network_config(architecture: str, overrides: dict[str, Any], where: str = "network") -> NetworkConfig:
    """Hyper-parameters of a named architecture with some replaced.

    Raises:
        ConfigError: unknown architecture, unknown key, or a value of the wrong type or range.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{where}: unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    published = ARCHITECTURES[architecture]
    merging = overrides.get("merging")
    if merging is not None and not isinstance(published, ViTConfig):
        raise ConfigError(
            f"{where}: merging is {merging!r}, which {architecture} cannot do: it clusters by itself; leave merging "
            "out, or take a vit or clustvit"
        )
    return from_mapping(type(published), {**to_mapping(published), **overrides}, where)


def build_network(config: NetworkConfig, num_classes: int) -> Segmenter:
    """A freshly initialised network.

    Raises:
        ConfigError: no network has these hyper-parameters.
    """
    try:
        network = config.build(num_classes)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"network: cannot be built from {config} ({str(error).splitlines()[0]})") from error
    initialise(network)
    return network


def without_merging(config: ViTConfig) -> ViTConfig:
    """The plain ViT twin of a ClustViT: same network, no clusterer, no regenerator."""
    default = ViTConfig()
    return dataclasses.replace(config, backbone="vit", **{name: getattr(default, name) for name in _OF_MERGING})


def plain_twin(architecture: str, overrides: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Architecture and `network` section of a ClustViT's plain ViT twin, as a `model.yaml` states them.

    Raises:
        ConfigError: the architecture is no ClustViT.
    """
    if not architecture.startswith("clustvit_"):
        known = ", ".join(name for name in ARCHITECTURES if name.startswith("clustvit_"))
        raise ConfigError(f"{architecture} has no plain ViT twin, expected one of {known}")
    kept = {key: value for key, value in overrides.items() if key not in _OF_MERGING}
    return architecture.removeprefix("clust"), kept


def check_sizes(network: dict[str, Any], where: str) -> None:
    """Refuse hyper-parameters that would build for ever.

    Raises:
        ConfigError: which one.
    """
    for name, value in network.items():
        largest = _DEEPEST if "depth" in name or "point" in name else _LARGEST_SIZE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= largest:
                raise ConfigError(f"{where}: {name} is {value}, expected a number of at most {largest}")
