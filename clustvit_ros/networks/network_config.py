"""What every family of networks states about itself, and how their parameters are first drawn."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import nn

from clustvit_ros.networks.segmenter import Segmenter


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
