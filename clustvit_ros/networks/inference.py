# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Makes a network ready to be run only: exact algebra first, then the precision.

Half precision (Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3) keeps in float32 what
decides or sums: the cluster logits, the cosines that the decode head compares, and, inside PyTorch's own kernels, the
sums of norms and the softmax. Everything else, weights and activations, is in the chosen precision.

Layers in the form in which a CPU computes them fastest: weights laid out for it once, or in 8-bit integers.

Both go to oneDNN, which applies GELU on the way out of the product. Convolutions are channels last, as tokens are, so
that neither is copied where one becomes the other.

In float32 and bfloat16, a linear layer's weights are put into oneDNN's own layout once instead of at every call, which
a third of the tokens does not pay for; in float32, ClusTR's depthwise convolution takes its skip connection into the
kernel's centre, where bfloat16 would have no digits left for the rest of it.

In 8-bit integers, weights are rounded once, one scale per output channel; activations at every call, one scale and
offset per image, from their own range (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 2.1), so that no images are needed to find ranges
beforehand. Products are summed in 32 bits and leave as float32. Everything else stays in float32: norms, attention, and
what a ClustViT decides and regenerates with.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clustvit_ros.networks.clustering import Clusterer, Regenerator
from clustvit_ros.networks.clustr import ConvMlp, ResidualDepthwise
from clustvit_ros.networks.cts import PolicyNetwork
from clustvit_ros.networks.heads import ConvNorm, MaskTransformer
from clustvit_ros.networks.segmenter import Segmenter
from clustvit_ros.networks.vit import Mlp

# Layers that stay in float32, by what they are of: one decides what is merged, the other gets cosines.
_FULL_PRECISION = ((Clusterer, ""), (PolicyNetwork, "head"), (MaskTransformer, "mask_norm"))


def for_inference(network: Segmenter, dtype: torch.dtype = torch.float32) -> Segmenter:
    """A copy in evaluation mode, without gradients, that computes the same in fewer operations.

    Args:
        network: stays as it is.
        dtype: float32, float16 or bfloat16; images must come in it.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, (nn.Sequential, ConvNorm)):
            _fold_batch_norms(module)
    if dtype != torch.float32:
        network.to(dtype)
        for module in network.modules():
            for kind, layer in _FULL_PRECISION:
                if isinstance(module, kind):
                    module.get_submodule(layer).float()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fold_batch_norms(layers: nn.Module) -> None:
    """Batch norm after a convolution is another convolution: W' = W g / s, b' = (b - m) g / s + beta."""
    for (name, convolution), (norm_name, norm) in pairwise(list(layers.named_children())):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers.register_module(name, fuse_conv_bn_eval(convolution, norm).requires_grad_(False))
            layers.register_module(norm_name, nn.Identity())


# Their layers stay as they are: one decides what is merged, the other reads the halves of its weights.
_PLAIN_PARENTS = (Clusterer, Regenerator)
# A layer of fewer channels is over before its input is rounded; those of a few outputs gate, weigh or classify.
_LEAST_CHANNELS = 32
_GELU: tuple[str, list, str] = ("gelu", [], "none")  # oneDNN's exact one
_NO_ACTIVATION: tuple[str, list, str] = ("none", [], "")
_LEVELS = 254  # steps of an activation's range: one less than a byte has, for the offset is rounded
_SMALLEST_SCALE = 1e-20
_ROUNDS_TO_UNITS = 1.5 * 2.0**23  # float32 numbers around this one are the integers


class PackedLinear(nn.Module):
    """A trained linear layer in oneDNN's layout: (..., C) -> (..., D) of its type, GELU included where asked for."""

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation = _GELU if gelu else _NO_ACTIVATION

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._activation)


class FusedDepthwise(nn.Module):
    """A trained `ResidualDepthwise` and the GELU after it as one convolution: (B, C, h, w) float32, channels last."""

    def __init__(self, layer: ResidualDepthwise) -> None:
        super().__init__()
        self._weight = layer.weight.detach().clone()
        self._weight[:, :, 1, 1] += 1.0
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        ones = [1, 1]
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, self._bias, ones, ones, ones, len(self._weight), *_GELU
        )


class _Int8Layer(nn.Module):
    """A trained layer, rounded; the images of a batch are rounded one by one, so that none hangs on another."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self._rounded, self._scales = _round_weight(layer.weight)
        self._zeros = torch.zeros(len(self._rounded), dtype=torch.int64)
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._multiply(image) for image in x.split(1)]) if len(x) > 1 else self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Int8Linear(_Int8Layer):
    """A trained linear layer, rounded: (B, ..., C) float32 -> (B, ..., D) float32, GELU included where asked for.

    Raises:
        RuntimeError, AttributeError: this PyTorch has no such product.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__(linear)
        self._rounded = torch.ops.onednn.qlinear_prepack(self._rounded, None)
        self._activation = _GELU if gelu else _NO_ACTIVATION

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            *_round(x), self._rounded, self._scales, self._zeros, self._bias, 1.0, 0, torch.float32, *self._activation
        )


class Int8Conv2d(_Int8Layer):
    """A trained convolution, rounded: (B, C, H, W) float32 -> (B, D, h, w) float32, channels last in memory."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(convolution)
        self._shape = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        # The layout has room for any offset of the input once it has for one.
        self._rounded = torch.ops.onednn.qconv_prepack(self._rounded, self._scales, 1.0, 1, *self._shape)

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(
            *_round(x), self._rounded, self._scales, self._zeros, self._bias, *self._shape,
            1.0, 0, torch.float32, *_NO_ACTIVATION,
        )  # fmt: skip


def pack_layers(network: nn.Module) -> None:
    """Replace layers where that pays, in place; the network is on a CPU, in float32 or bfloat16, for inference only.

    It pays with AVX-512, by 2 to 4 % in float32 and 5 to 8 % in bfloat16 (a Zen 5); with AVX2 it costs as much, and
    elsewhere it was not measured.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    # PyTorch's compiler uses the same operation, which is not promised to stay.
    if has_avx512 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        _replace_layers(network, PackedLinear)


def to_int8(network: nn.Module) -> None:
    """Replace layers by 8-bit ones, in place; the network is on a CPU, in float32, for inference only."""
    _replace_layers(network, Int8Linear, Int8Conv2d)


def _replace_layers(
    parent: nn.Module, linear: type[PackedLinear | Int8Linear], convolution: type[Int8Conv2d] | None = None
) -> None:
    if isinstance(parent, _PLAIN_PARENTS):
        return
    for name, child in list(parent.named_children()):
        if type(child) is nn.Linear:
            if min(child.in_features, child.out_features) >= _LEAST_CHANNELS:
                gelu = isinstance(parent, Mlp) and child is parent.fc1
                parent.register_module(name, linear(child, gelu))
                if gelu:
                    parent.act = nn.Identity()
        elif isinstance(parent, ConvMlp) and child is parent.dwconv and child.weight.dtype == torch.float32:
            parent.register_module(name, FusedDepthwise(child))
            parent.act = nn.Identity()
        elif type(child) is nn.Conv2d:
            if convolution and child.in_channels >= _LEAST_CHANNELS and child.kernel_size > (1, 1):
                parent.register_module(name, convolution(child))
        else:
            _replace_layers(child, linear, convolution)


def int8_problem() -> str:
    """Why layers should stay in floating point here; empty where 8-bit products are exact.

    Without instructions for them (VNNI), oneDNN sums pairs of products in 16 bits, which overflow, and is not faster.
    """
    layer = nn.Linear(64, 16, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    try:
        with torch.inference_mode():
            sums = Int8Linear(layer)(torch.ones(1, 32, 64))
    except (RuntimeError, AttributeError) as error:
        return f"this PyTorch has no 8-bit layers ({str(error).splitlines()[0]})"
    if (sums - 64).abs().max() > 1:
        return "this CPU has no VNNI instructions, without which 8-bit products overflow"
    return ""


def _round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """To int8, symmetrically, and a scale per output channel: (D, ...) -> (D, ...), (D,)."""
    weight = weight.detach()
    scales = (weight.flatten(1).abs().amax(dim=1) / 127).clamp(min=_SMALLEST_SCALE)
    return (weight / scales.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8), scales


def _round(x: Tensor) -> tuple[Tensor, float, int]:
    """To uint8 of the same shape; a value is (byte - offset) * scale."""
    low, high = (float(bound) for bound in x.aminmax())
    low, high = min(0.0, low), max(0.0, high)  # in this order, for what is not a number
    scale = max(_SMALLEST_SCALE, (high - low) / _LEVELS)
    offset = round(-low / scale) if math.isfinite(scale) else 0
    # One pass instead of three: the sum's low byte is the rounded quotient plus the offset.
    shifted = torch.add(torch.tensor(_ROUNDS_TO_UNITS + offset), x, alpha=1.0 / scale)
    return shifted.view(torch.int32).to(torch.uint8), scale, offset
