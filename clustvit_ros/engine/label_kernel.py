# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Label maps on a GPU in one kernel: upsample, best class, its probability, threshold.

As single operations these steps move as much memory as a small network does: 112 MB for 11 classes at 480x640 in
float16. A kernel that keeps a pixel's classes in registers reads the logits and writes the maps: 1 MB. Classes are gone
through once, with the running maximum and sum of the online softmax (Milakov and Gimelshein, arXiv 1805.02867).

There is one for Triton, which PyTorch brings along on x86-64, and the same in CUDA C, for NVRTC by PyTorch or CuPy.
Whichever compiles is tried on the device and compared before it is believed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.engine.labels import static_label_maps
from clustvit_ros.engine.pixels import upsampling

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_LOG = logging.getLogger(__name__)
_BLOCK = 256
# Share of a test picture's pixels that may differ: where two classes are equal but for rounding.
_TIES = 0.01

Launcher = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]
"""Fills a mask and a confidence map: logits (B, Q, h, w), mask (B, H, W), confidence or None, () threshold or None."""


def fused_label_maps(
    launch: Launcher, logits: Tensor, size: tuple[int, int], confidence_threshold: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """As `labels.static_label_maps`, in one kernel.

    Args:
        launch: what `find_launcher` gave for the logits' device and type.
        logits: (B, Q, h, w) float.
        size: (H, W) of the result.
        confidence_threshold: a () float32 tensor on the device; None computes no confidence.
    """
    B, Q, _, _ = logits.shape
    label_type = torch.uint8 if Q <= IGNORE_INDEX else torch.int32
    mask = torch.empty(B, *size, dtype=label_type, device=logits.device)
    confidence = None if confidence_threshold is None else torch.empty_like(mask, dtype=torch.uint8)
    launch(logits, mask, confidence, confidence_threshold)
    return mask, confidence


@lru_cache(maxsize=8)
def find_launcher(device: torch.device, dtype: torch.dtype) -> Launcher | None:
    """A kernel that compiles here and gives the right maps for logits of a type; None, which is told once, for none."""
    problems = []
    for name, make in _makers(dtype):
        try:
            launch = make()
            problem = _problem(launch, device, dtype)
        except Exception as error:  # whatever a compiler raises
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if not problem:
            return launch
        problems.append(f"{name}: {problem}")
    _LOG.warning(
        "label maps are made by several kernels instead of one, which takes longer (%s); `pip install triton` or "
        "cupy, where there is a build for this machine", "; ".join(problems),
    )  # fmt: skip
    return None


def _problem(launch: Launcher, device: torch.device, dtype: torch.dtype) -> str:
    generator = torch.Generator().manual_seed(0)
    logits = (3.0 * torch.randn(2, 5, 6, 7, generator=generator)).to(device, dtype)
    threshold = torch.full((), 0.3, device=device)
    found, certainty = fused_label_maps(launch, logits, (19, 33), threshold)
    how = upsampling((6, 7), (19, 33), device)
    expected, confidence = static_label_maps(logits.float(), how, threshold)
    assert certainty is not None and confidence is not None  # a threshold was given
    wrong = float((found != expected).float().mean())
    apart = float((certainty.float() - confidence.float()).abs().median())
    return f"{wrong:.0%} of a test picture's labels are wrong" if wrong > _TIES or apart > 1.0 else ""


def _makers(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Launcher]]]:
    if triton is not None:
        yield "Triton", lambda: launch_triton
    if hasattr(torch.cuda, "_compile_kernel"):
        yield "NVRTC", lambda: _nvrtc_launcher(dtype)
    yield "CuPy", lambda: _cupy_launcher(dtype)


if triton is not None:

    @triton.jit
    def _label_kernel(
        logits, mask, confidence, threshold, h, w, H, W, stride_b, stride_q, stride_h, stride_w, ignore,
        Q: tl.constexpr, CONFIDENT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row, image = tl.program_id(1), tl.program_id(2)
        inside = column < W
        y = tl.maximum((row + 0.5) * h / H - 0.5, 0.0)
        x = tl.maximum((column + 0.5) * w / W - 0.5, 0.0)
        top, left = tl.minimum(y.to(tl.int32), h - 1), tl.minimum(x.to(tl.int32), w - 1)
        bottom, right = tl.minimum(top + 1, h - 1), tl.minimum(left + 1, w - 1)
        down, across = y - top, x - left
        above = logits + image * stride_b + top * stride_h
        below = logits + image * stride_b + bottom * stride_h
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        label = tl.full([BLOCK], 0, tl.int32) + ignore
        total = tl.full([BLOCK], 0.0, tl.float32)
        sound = inside
        for q in range(Q):
            a = tl.load(above + q * stride_q + left * stride_w, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(above + q * stride_q + right * stride_w, mask=inside, other=0.0).to(tl.float32)
            c = tl.load(below + q * stride_q + left * stride_w, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(below + q * stride_q + right * stride_w, mask=inside, other=0.0).to(tl.float32)
            upper, lower = a + (b - a) * across, c + (d - c) * across
            value = upper + (lower - upper) * down
            sound = sound & (value == value)
            higher = tl.maximum(best, value)
            if CONFIDENT:
                total = total * tl.exp(best - higher) + tl.exp(value - higher)
            label = tl.where(value > best, q, label)
            best = higher
        label = tl.where(sound, label, ignore)
        place = (image * H + row) * W + column
        if CONFIDENT:
            probability = 1.0 / total
            sure = sound & (probability >= tl.load(threshold))
            label = tl.where(sure, label, ignore)
            scaled = tl.where(sure, probability * 255.0 + 0.5, 0.0)
            tl.store(confidence + place, scaled.to(tl.uint8), mask=inside)
        tl.store(mask + place, label.to(mask.dtype.element_ty), mask=inside)


def launch_triton(logits: Tensor, mask: Tensor, confidence: Tensor | None, threshold: Tensor | None) -> None:
    """A `Launcher`."""
    B, H, W = mask.shape
    confident = confidence is not None
    _label_kernel[triton.cdiv(W, _BLOCK), H, B](
        logits, mask, confidence if confident else mask, threshold if confident else logits, *logits.shape[2:], H, W,
        *logits.stride(), IGNORE_INDEX, Q=logits.shape[1], CONFIDENT=confident, BLOCK=_BLOCK,
    )  # fmt: skip


# Without CUDA's headers, which a robot need not have: half precisions are read as the bits that they are.
CUDA_READERS = {
    torch.float32: "typedef float Logit;\n__device__ float read(Logit value) { return value; }",
    torch.float16: (
        "typedef unsigned short Logit;\n__device__ float read(Logit bits) {\n"
        '  float value; asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits)); return value;\n}'
    ),
    torch.bfloat16: (
        "typedef unsigned short Logit;\n"
        "__device__ float read(Logit bits) { return __uint_as_float((unsigned int)bits << 16); }"
    ),
}
CUDA_SOURCE = r"""
extern "C" __global__ void label_kernel(
    const Logit* logits, void* mask, unsigned char* confidence, const float* threshold, int Q, int h, int w, int H,
    int W, int stride_b, int stride_q, int stride_h, int stride_w, int ignore, int confident) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y, image = blockIdx.z;
  if (column >= W) return;
  const float y = fmaxf((row + 0.5f) * h / H - 0.5f, 0.0f), x = fmaxf((column + 0.5f) * w / W - 0.5f, 0.0f);
  const int top = min((int)y, h - 1), left = min((int)x, w - 1);
  const int bottom = min(top + 1, h - 1), right = min(left + 1, w - 1);
  const float down = y - top, across = x - left;
  const Logit* above = logits + image * stride_b + top * stride_h;
  const Logit* below = logits + image * stride_b + bottom * stride_h;
  float best = -INFINITY, total = 0.0f;
  int label = ignore;
  bool sound = true;
  for (int q = 0; q < Q; ++q) {
    const float a = read(above[q * stride_q + left * stride_w]), b = read(above[q * stride_q + right * stride_w]);
    const float c = read(below[q * stride_q + left * stride_w]), d = read(below[q * stride_q + right * stride_w]);
    const float upper = a + (b - a) * across, lower = c + (d - c) * across;
    const float value = upper + (lower - upper) * down;
    sound = sound && value == value;
    const float higher = fmaxf(best, value);
    if (confident) total = total * expf(best - higher) + expf(value - higher);
    if (value > best) label = q;
    best = higher;
  }
  const long long place = ((long long)image * H + row) * W + column;
  if (confident) {
    const float probability = 1.0f / total;
    sound = sound && probability >= *threshold;
    confidence[place] = sound ? (unsigned char)(probability * 255.0f + 0.5f) : 0;
  }
  if (!sound) label = ignore;
  if (Q <= 255) ((unsigned char*)mask)[place] = (unsigned char)label;
  else ((int*)mask)[place] = label;
}
"""


def cuda_source(dtype: torch.dtype) -> str:
    """The kernel in CUDA C for logits of a type."""
    infinity = "#ifndef INFINITY\n#define INFINITY __int_as_float(0x7f800000)\n#endif"
    return f"{infinity}\n{CUDA_READERS[dtype]}\n{CUDA_SOURCE}"


def _numbers(logits: Tensor, mask: Tensor, confident: bool) -> list[int]:
    return [*logits.shape[1:], *mask.shape[1:], *logits.stride(), IGNORE_INDEX, int(confident)]


def _nvrtc_launcher(dtype: torch.dtype) -> Launcher:
    kernel = torch.cuda._compile_kernel(cuda_source(dtype), "label_kernel")

    def launch(logits: Tensor, mask: Tensor, confidence: Tensor | None, threshold: Tensor | None) -> None:
        B, H, W = mask.shape
        buffers: list[Any] = [logits, mask, mask if confidence is None else confidence]
        buffers.append(logits if threshold is None else threshold)
        kernel(
            grid=(-(-W // _BLOCK), H, B), block=(_BLOCK, 1, 1),
            args=[*buffers, *_numbers(logits, mask, confidence is not None)],
        )  # fmt: skip

    return launch


def _cupy_launcher(dtype: torch.dtype) -> Launcher:
    import cupy
    import numpy as np

    kernel = cupy.RawKernel(cuda_source(dtype), "label_kernel")

    def launch(logits: Tensor, mask: Tensor, confidence: Tensor | None, threshold: Tensor | None) -> None:
        B, H, W = mask.shape
        pointers = [tensor.data_ptr() if tensor is not None else 0 for tensor in (logits, mask, confidence, threshold)]
        numbers = map(np.int32, _numbers(logits, mask, confidence is not None))
        with cupy.cuda.ExternalStream(torch.cuda.current_stream(logits.device).cuda_stream):
            kernel((-(-W // _BLOCK), H, B), (_BLOCK, 1, 1), (*pointers, *numbers))

    return launch
