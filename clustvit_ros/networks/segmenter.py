# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A backbone and a decode head that together turn normalised images into class logits on the patch grid.

What every backbone offers (features, in two steps where it merges tokens), and what every family of networks states
about itself.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks.clustering import TokenGroups


class Features(NamedTuple):
    """What a backbone hands to the decode head.

    Attributes:
        tokens: (B, L, C) float, after the final norm, without class token; the grid's tokens row by row, L == N, unless
            `slots` is given.
        grid_size: (h, w) tokens, h * w == N.
        cluster_logits: (B, N, k+1) float, of a CTS (B, W, 2), keep and share, for each of its windows; None for a
            backbone that has neither Clusterer nor policy network. With several injection points the later ones' logits
            follow, and `cluster_positions` says whose they are.
        cluster_ids: (B, N) int64, 0 = kept, above = merged into that cluster; None for a backbone that does not merge.
        cluster_positions: (B, M) int64, the token (0..N-1) that each row of `cluster_logits` is about; None where they
            are all tokens in order.
        levels: outputs of the blocks that a multi-level head asked for, shallow first, (B, N, C) each, without class
            token; only the last block's is normalised.
        slots: (B, N) int64, the row of `tokens` that stands for each token of the grid, where the sequence is left
            compact for the head; None where it is not.
        key_mask: (B, L) bool, False = padding of a compact sequence; None when there is none.
        pyramid: maps (B, C_i, h_i, w_i) of several strides, finest first: all of the features of a backbone that works
            at several strides; of a ViT the convolutional stem's, finer than the tokens, where its head asks for them.
        groups: merged tokens that a head's attention blocks may handle together; None where each goes alone.
    """

    tokens: Tensor
    grid_size: tuple[int, int]
    cluster_logits: Tensor | None = None
    cluster_ids: Tensor | None = None
    cluster_positions: Tensor | None = None
    levels: tuple[Tensor, ...] = ()
    slots: Tensor | None = None
    key_mask: Tensor | None = None
    pyramid: tuple[Tensor, ...] = ()
    groups: TokenGroups | None = None

    def to_grid(self, values: Tensor) -> Tensor:
        """What was computed per row of `tokens`, on the token grid: (B, L, K) -> (B, K, h, w)."""
        if self.slots is not None:
            values = values.gather(1, self.slots[..., None].expand(-1, -1, values.shape[2]))
        return values.transpose(1, 2).unflatten(2, self.grid_size)


class Backbone(nn.Module, abc.ABC):
    """Images to features, in two steps: `encode` costs what no setting changes, `finish` what the settings decide.

    A backbone that merges nothing does all its work in `encode`, and its `finish` ignores the settings.

    All steps can be traced for export: threshold and capacity are then tensors, the shapes that follow from the
    capacity are dynamic, and nothing may be decided in Python by their values.

    Attributes:
        patch_size: side in pixels of what one token of the grid stands for.
        merges: whether threshold and capacity have an effect.
        decides: whether it decides inside, by clustering, what no result shows: where two choices are equal but for
            rounding, devices and engines may then choose differently.
        exempts: whether single tokens can be left out of merging.
        merge_unit: side in patches of what is merged by one decision; `cluster_logits` has a row for each of these.
    """

    patch_size: int
    merges: bool = False
    decides: bool = False
    exempts: bool = False
    merge_unit: int = 1

    @abc.abstractmethod
    def encode(self, images: Tensor) -> Any:
        """Normalised images (B, 3, H, W) to a state, a (nested) tuple of tensors and plain values, for `finish`.

        Raises:
            ImageError: not a batch of three-channel images.
        """

    def count_kept(self, state: Any, merge_threshold: float | Tensor) -> Tensor:
        """Tokens per image that the threshold leaves unmerged: (B,) int64, on the state's device.

        Args:
            state: what `encode` gave.
            merge_threshold: 0..1; a () float32 tensor where traced or recorded.
        """
        raise NotImplementedError(f"{type(self).__name__} merges no tokens")

    def exempt(self, state: Any, tokens: Tensor) -> Any:
        """The state with some tokens never merged, as long as `finish` is given a capacity that has room for them.

        Args:
            state: what `encode` gave; stays as it is.
            tokens: (N,) or (B, N) bool on the state's device, true where a token must be kept.

        Raises:
            ConfigError: this backbone's way to merge cannot leave single tokens out (`exempts` is false).
        """
        raise ConfigError(
            f"{type(self).__name__} cannot exempt single tokens from merging; leave merge_exempt_classes and "
            "merge_exempt_region empty"
        )

    def constants(self, grid_size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Tensors that are made once for a grid (h, w) of tokens, and that every call reads."""
        return ()

    @abc.abstractmethod
    def finish(self, state: Any, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None) -> Features:
        """Features of a state.

        Args:
            state: what `encode` gave.
            merge_threshold: tokens whose merge score is above are merged: 0.5 is the paper's arg-max, 1.0 is plain ViT.
            token_capacity: keep exactly this many tokens per image, or all where there are no more; None lets the
                threshold alone decide (exact mode). A () int64 tensor, 1 up to all tokens, where traced: its value
                then decides no shape in Python, and all tokens must still give what the unmerged network gives.
        """

    def forward(self, images: Tensor, merge_threshold: float = 0.5, token_capacity: int | None = None) -> Features:
        """`encode` and `finish` in one."""
        return self.finish(self.encode(images), merge_threshold, token_capacity)


class SegmenterOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        logits: (B, Q, h, w) float, class logits before any upsampling, on the patch grid; UPerNet with a neck has them
            four times as fine, the detail head at a quarter of the image's resolution.
        cluster_logits, cluster_ids, cluster_positions: as in `Features`.
    """

    logits: Tensor
    cluster_logits: Tensor | None
    cluster_ids: Tensor | None
    cluster_positions: Tensor | None = None


class Segmenter(nn.Module):
    """A backbone and a decode head. The network neither resizes nor normalises: an engine around it does.

    Args:
        backbone: images to features.
        head: maps `Features` to class logits (B, Q, h, w).

    Attributes:
        temperature: what class logits are divided by; no arg-max changes, confidences do.
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.temperature = 1.0
        self.backbone = backbone
        self.head = head

    def forward(
        self, images: Tensor, merge_threshold: float = 0.5, token_capacity: int | None = None
    ) -> SegmenterOutput:
        """Segment normalised images.

        Args:
            images: (B, 3, H, W) float, normalised; any size, padded to whole patches inside.
            merge_threshold: tokens whose merge score is above are merged: 0.5 is the paper's arg-max, 1.0 is plain ViT.
            token_capacity: keep exactly this many tokens per image; None lets the threshold alone decide (exact mode).

        Raises:
            ImageError: not a batch of three-channel images.
        """
        return self.decode(self.backbone(images, merge_threshold, token_capacity))

    def decode(self, features: Features) -> SegmenterOutput:
        """Run the head on backbone features."""
        logits = self.head(features)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return SegmenterOutput(
            logits, features.cluster_logits, features.cluster_ids, features.cluster_positions
        )


@dataclass(frozen=True)
class NetworkConfig(abc.ABC):
    """Everything that fixes the shape of a network; each family adds its own hyper-parameters.

    Args:
        image_size: (height, width) in pixels the network is made for, which fixes position embeddings; networks accept
            other sizes as well.
        patch_size: side in pixels of what one token of the grid stands for.
    """

    image_size: tuple[int, int] = (512, 512)
    patch_size: int = 16

    @property
    def merges(self) -> bool:
        """Whether threshold and capacity have an effect."""
        return False

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Beginnings of names that a weights file may hold though the network has no use for them."""
        return ()

    @abc.abstractmethod
    def build(self, num_classes: int) -> Segmenter:
        """The network, its parameters as PyTorch draws them; `build_network` initialises them as well."""


def initialise(network: Segmenter) -> None:
    """ViT's usual initialisation: truncated normal 0.02 for linear layers, fan-out for convolutions."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_transformer(config: Any) -> None:
    """Refuse sizes that no transformer on patches can have.

    Args:
        config: hyper-parameters of a ViT's shape: image, patch, width, heads, stem.

    Raises:
        ConfigError: the sizes do not fit each other.
    """
    if min(config.image_size) < config.patch_size:
        raise ConfigError(f"network: image_size {config.image_size} is below one patch of {config.patch_size} px")
    for name in ("num_heads", "head_heads"):
        heads = getattr(config, name) or config.num_heads
        if config.embed_dim % heads:
            raise ConfigError(f"network: embed_dim {config.embed_dim} is not a multiple of {name} {heads}")
    check_drop_path(config)
    if config.stem == "conv" and config.patch_size & (config.patch_size - 1):
        raise ConfigError(f"network: patch_size is {config.patch_size}, a conv stem needs a power of two")


def check_drop_path(config: Any) -> None:
    """Refuse a stochastic depth that leaves nothing to learn with.

    Raises:
        ConfigError: it is no probability below 1.
    """
    if not 0.0 <= config.drop_path < 1.0:
        raise ConfigError(f"network: drop_path is {config.drop_path}, expected 0 or above, and below 1")


# What the weights of a network that merges in another way have no part for.
_MERGING_PARTS = ("backbone.policy_net.", "backbone.clusterer.", "backbone.regenerator.", "backbone.later_")


def check_weights(
    network: Segmenter, weights: dict[str, Tensor], where: str, remedy: str = "check model.yaml's network"
) -> None:
    """Compare names, shapes and kinds with a network's, before any is loaded.

    Args:
        network: stays as it is.
        weights: parameter names to tensors.
        where: what errors call the weights.
        remedy: what to do where they do not fit.

    Raises:
        ModelError: with every missing, unknown and mis-shaped name, or those that hold no finite numbers (the first
            ten of each).
    """
    check_shapes(network, {name: tuple(tensor.shape) for name, tensor in weights.items()}, where, remedy)
    broken = []
    for name, own in network.state_dict().items():
        tensor = weights[name]
        if tensor.dtype.is_complex or tensor.is_quantized or tensor.is_floating_point() != own.is_floating_point():
            broken.append(f"{name} ({tensor.dtype}, expected {own.dtype})".replace("torch.", ""))
        elif tensor.layout != torch.strided or tensor.is_meta:
            broken.append(f"{name} ({tensor.layout if tensor.layout != torch.strided else 'without values'})")
        elif not tensor.to(own.dtype).isfinite().all():
            broken.append(name)
    if broken:
        raise ModelError(f"{where}: infinite or no numbers in {', '.join(broken[:10])}; train or fetch the model again")


def check_shapes(
    network: Segmenter, shapes: dict[str, tuple[int, ...]], where: str, remedy: str = "check model.yaml's network"
) -> None:
    """Compare names and shapes with a network's.

    Raises:
        ModelError: with every missing, unknown and mis-shaped name (the first ten of each).
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    findings = {
        "missing": [name for name in expected if name not in shapes],
        "unknown": [name for name in shapes if name not in expected],
        "mis-shaped": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    lacks = {part for name in findings["missing"] for part in _MERGING_PARTS if name.startswith(part)}
    if lacks and all(name.startswith(_MERGING_PARTS) for names in findings.values() for name in names):
        part = "policy network" if "backbone.policy_net." in lacks else "Clusterer for each injection point"
        raise ModelError(
            f"{where}: the weights have no {part}, which this way to merge needs; choose another merging in "
            "model.yaml, or train it (config/train/add_merging.yaml)"
        )
    if any(findings.values()):
        texts = [
            f"{kind}: {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"
            for kind, names in findings.items()
            if names
        ]
        raise ModelError(f"{where}: the weights do not fit the network: {'; '.join(texts)}; {remedy}")
