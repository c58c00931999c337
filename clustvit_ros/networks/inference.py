"""Makes a network ready to be run only: exact algebra first, then the precision.

Half precision (Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3) keeps in float32 what
decides or sums: LayerNorm, the cluster logits, the cosines that the decode head compares, and, inside PyTorch's fused
attention, the softmax. Everything else, weights and activations, is in the chosen precision.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clustvit_ros.networks.clustering import Clusterer
from clustvit_ros.networks.segmenter import Segmenter

# Parameters that stay in float32.
_FULL_PRECISION = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm, Clusterer)


class MixedLayerNorm(nn.LayerNorm):
    """LayerNorm that computes in its parameters' precision whatever comes in, and returns what came in."""

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return normalised.to(x.dtype)


def for_inference(network: Segmenter, dtype: torch.dtype = torch.float32) -> Segmenter:
    """A copy in evaluation mode, without gradients, that computes the same in fewer operations.

    Args:
        network: stays as it is.
        dtype: float32, float16 or bfloat16; images must come in it.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            _fold_batch_norms(module)
    if dtype != torch.float32:
        _convert(network, dtype)
    return network


def _fold_batch_norms(layers: nn.Sequential) -> None:
    """Batch norm after a convolution is another convolution: W' = W g / s, b' = (b - m) g / s + beta."""
    for index in range(len(layers) - 1):
        convolution, norm = layers[index], layers[index + 1]
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[index] = fuse_conv_bn_eval(convolution, norm).requires_grad_(False)
            layers[index + 1] = nn.Identity()


def _convert(network: Segmenter, dtype: torch.dtype) -> None:
    network.to(dtype)
    for module in network.modules():
        if isinstance(module, _FULL_PRECISION):
            module.float()
        for name, child in module.named_children():
            if type(child) is nn.LayerNorm:
                module.register_module(name, _mixed(child))


def _mixed(norm: nn.LayerNorm) -> MixedLayerNorm:
    mixed = MixedLayerNorm(list(norm.normalized_shape), norm.eps, bias=norm.bias is not None)
    mixed.weight, mixed.bias = norm.weight, norm.bias
    return mixed.float().requires_grad_(False)
