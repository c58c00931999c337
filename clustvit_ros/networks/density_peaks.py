# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Density-peaks clustering of tokens with k nearest neighbours, as ClusTR uses it to merge keys and values.

Xie et al., "ClusTR: Exploring Efficient Self-attention via Clustering for Vision Transformers", arXiv 2208.13138, after
Du et al., "Study on density peaks clustering based on k-nearest neighbors". Deterministic: the reference
implementation's density noise, which breaks ties at random, is left out; among equal scores the lower position wins.

`density_peaks` is exact: the distances of all pairs decide. They are worked on in bands of rows where all at once would
take too much memory, and on a CPU a few images at a time, so that they stay in its cache. `split_windows` bounds the
work as well: clusters are then sought within windows of the grid, and cost grows with the number of tokens, not with
its square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

NEIGHBOURS = 5
# Entries of the distance matrix that are held at once: 64 MB in float32.
_MAX_DISTANCES = 1 << 24
# Entries for which a CPU's cache has room, 4 MB in float32: as many windows as have no more are clustered together.
_CACHED_DISTANCES = 1 << 20


@torch.no_grad()
def density_peaks(x: Tensor, num_clusters: Sequence[int]) -> list[Tensor]:
    """Cluster tokens at several scales, which share distances, densities and scores.

    d_ij = |x_i - x_j| / sqrt(C). A token's density is exp(-mean of its 5 smallest d^2, the one to itself included), its
    separation the distance to the nearest token of higher density, or the image's largest distance where there is
    none. The n tokens of the highest density * separation are the centres of n clusters, in falling order; every other
    token joins its nearest centre.

    Args:
        x: (B, N, C) float; half precision is taken to float32.
        num_clusters: clusters per scale, each in 1..N.

    Returns:
        Per scale (B, N) int64, cluster of each token: 0 is that of the highest score.
    """
    # What decides is computed in float32: half precision would overflow, and has no distances of few tokens.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    N = int(x.shape[1])
    together = max(_CACHED_DISTANCES // N**2, 1)
    if x.device.type == "cpu" and len(x) > together and not torch.onnx.is_in_onnx_export():
        parts = [density_peaks(part, num_clusters) for part in x.split(together)]
        return [torch.cat(ids) for ids in zip(*parts, strict=True)]
    bands = _Bands(x)
    scale = int(x.shape[2]) ** -0.5  # rounding keeps order: what is compared alone need not be scaled
    nearest = [(scale * d.topk(min(NEIGHBOURS, N), dim=2, largest=False).values).square().mean(dim=2) for _, d in bands]
    density = (-torch.cat(nearest, dim=1)).exp()
    separations, largest = [], []
    for rows, d in bands:
        farthest = d.amax(dim=2)
        denser = density[:, None, :] > density[:, rows, None]
        separations.append(d.where(denser, math.inf).amin(dim=2))
        largest.append(farthest)
    separation = torch.cat(separations, dim=1)
    farthest = torch.cat(largest, dim=1).amax(dim=1, keepdim=True)
    score = density * (scale * torch.where(separation.isinf(), farthest, separation))
    order = score.argsort(dim=1, descending=True, stable=True)[:, : max(num_clusters)]
    to_centres = [scale * d.gather(2, order[:, None, :].expand(-1, d.shape[1], -1)) for _, d in bands]
    distances = torch.cat(to_centres, dim=1)  # B N n
    ids = []
    for count in num_clusters:
        nearest_centre = distances[:, :, :count].argmin(dim=2)
        own = torch.arange(count, device=x.device).expand_as(order[:, :count])
        ids.append(nearest_centre.scatter(1, order[:, :count], own))
    return ids


class _Bands:
    """Pairwise distances (B, rows, N) in bands of rows; a single band is computed once and kept."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._count = x, int(x.shape[1])
        self._rows = max(_MAX_DISTANCES // (int(x.shape[0]) * self._count), 1)
        self._whole = _distances(x, x) if self._rows >= self._count else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        if self._whole is not None:
            yield slice(None), self._whole
            return
        for start in range(0, self._count, self._rows):
            rows = slice(start, start + self._rows)
            yield rows, _distances(self._x[:, rows], self._x)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances: (B, N, C), (B, M, C) -> (B, N, M)."""
    if torch.onnx.is_in_onnx_export():
        # The exporter would write cdist as a tensor of all N * M * C differences; this is what it computes inside.
        squares = x.square().sum(dim=2)[:, :, None] + y.square().sum(dim=2)[:, None, :]
        return (squares - 2.0 * (x @ y.transpose(1, 2))).clamp(min=0.0).sqrt()
    # The reference implementation's own function: near ties then fall the same way.
    return torch.cdist(x, y)


def split_windows(grid_size: tuple[int, int], window_tokens: int, device: torch.device) -> Tensor:
    """Positions of the tokens of each window of a grid: (W, n) int64.

    Windows are about square, of equal size and at most `window_tokens` tokens. Where a side is no multiple of theirs,
    neighbours share a row or column, so that none is padded; together they cover the grid.

    Args:
        grid_size: (h, w) tokens.
        window_tokens: at least 1; a grid that is no larger is one window.
    """
    height, width = grid_size
    if height * width <= window_tokens:
        return torch.arange(height * width, device=device)[None]
    side = max(math.isqrt(window_tokens), 1)
    # A grid that is narrower than a window leaves the other side more room.
    rows = min(height, max(side, window_tokens // max(width, 1)))
    columns = min(width, window_tokens // rows)
    # Made on the device: a CUDA graph that is being recorded cannot bring anything there.
    tops, rows = _starts(height, rows, device)
    lefts, columns = _starts(width, columns, device)
    first = tops[:, None] * width + lefts
    inside = torch.arange(rows, device=device)[:, None] * width + torch.arange(columns, device=device)
    return first.flatten()[:, None] + inside.flatten()


def _starts(length: int, side: int, device: torch.device) -> tuple[Tensor, int]:
    """First positions of the fewest windows of at most `side` that cover `length`, and their common size."""
    count = -(-length // side)
    return torch.arange(count, device=device) * length // count, -(-length // count)
