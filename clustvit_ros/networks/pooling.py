"""Adaptive average pooling as matrices, made with tensor operations alone.

They can be traced with a number of cells only known at run time, captured in a CUDA graph, and exported to ONNX,
which has no adaptive pooling to cells of unequal size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pooling_matrix(length: int, cells: int | Tensor, like: Tensor) -> Tensor:
    """Adaptive average pooling of a line: (cells, length), each row the mean of its cell, which may share samples.

    Args:
        length: samples.
        cells: of the result; a () int64 tensor where traced.
        like: gives the matrix its type and device.
    """
    index = torch.arange(cells, device=like.device)  # type: ignore[arg-type]  # a tensor where traced
    place = torch.arange(length, device=like.device)
    start, end = index * length // cells, ((index + 1) * length + cells - 1) // cells
    inside = (place >= start[:, None]) & (place < end[:, None])
    return inside.to(like.dtype) / (end - start)[:, None].to(like.dtype)
