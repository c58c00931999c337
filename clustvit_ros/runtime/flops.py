"""Floating-point operations and parameters of a network, counted without running it.

Counted is what PyTorch's own counter counts: matrix products, convolutions and both products of attention, two
operations per multiply-add; norms, activations, softmax and the merge's sort are not. This is how ClustViT's published
figures are counted as well: ViT-B with Segmenter's head at 512x512 and 150 classes has 258.6 GFLOPs here and there.
ClustViT-B with 307 of 1024 tokens kept has 147.8 instead of 148.7, because the representatives' half of the
regenerator's first layer is computed once per cluster here, and once per merged token in the reference implementation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from clustvit_ros.modeling.architectures import build_network
from clustvit_ros.modeling.network_config import NetworkConfig


class Cost(NamedTuple):
    """What one call of a network takes.

    Attributes:
        flops: two per multiply-add, of the whole batch.
        parameters: weights of the network.
    """

    flops: int
    parameters: int


def count_cost(
    network: NetworkConfig, num_classes: int, size: tuple[int, int], batch: int = 1, token_capacity: int = 0
) -> Cost:
    """Count one call.

    Args:
        network: hyper-parameters.
        num_classes: of the head.
        size: (height, width) of the input.
        batch: images of the call.
        token_capacity: tokens kept; 0 is all. A plain ViT keeps all in any case.
    """
    # On the meta device tensors have shapes and no values: nothing is computed and no memory is taken.
    with torch.device("meta"):
        segmenter = build_network(network, num_classes).eval()
        images = torch.empty(batch, 3, *size)
    capacity = token_capacity or images[0, 0].numel()
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        segmenter(images, merge_threshold=1.0, token_capacity=capacity)
    return Cost(counter.get_total_flops(), sum(parameter.numel() for parameter in segmenter.parameters()))
