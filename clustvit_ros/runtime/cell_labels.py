"""Upsampling and arg-max that look only at the classes that can win.

Between four neighbouring logits a bilinear surface stays between their least and their greatest. So inside one cell of
the patch grid a class whose greatest corner is below some other class's least corner is nowhere the best, and is left
out before any pixel is computed. A trained network leaves a few classes per cell (two of eleven on CamVid), a random
one a third. Nothing is approximated; how much work remains depends on the image, so this is for a CPU, where nothing
waits for a shape.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Cells that are computed together: their pixels of all candidates then stay in a CPU's cache.
_CELLS = 128
# Interpolated values may exceed their corners by rounding.
_ROUNDING = 1e-5
# Measured on one core: finding and gathering candidates costs as much as 40 classes' plain arithmetic, and each
# candidate as much as two and a half classes.
_FIXED_CLASSES, _CLASSES_PER_CANDIDATE = 40, 2.5
# Cells of fewer pixels than this along a side cost more than they save.
_LEAST_SIDE = 4


def cell_labels(logits: Tensor, size: tuple[int, int]) -> Tensor | None:
    """The best class of every pixel.

    Args:
        logits: (Q, h, w) float32 on the CPU.
        size: (H, W) of the result.

    Returns:
        (H, W) uint8 (int32 above 255 classes), the first class in case of a tie; None where this way is not the
        cheaper one, or where logits are not finite.
    """
    Q, h, w = logits.shape
    if Q <= _FIXED_CLASSES or size[0] < _LEAST_SIDE * h or size[1] < _LEAST_SIDE * w:
        return None
    if not bool(logits.isfinite().all()):
        return None
    grid = _cells(h, w, size)
    padded = F.pad(logits[None], (1, 1, 1, 1), mode="replicate")[0]
    highest = F.max_pool2d(padded, 2, 1).flatten(1)  # Q cells
    floor, winner = (-F.max_pool2d(-padded, 2, 1)).flatten(1).max(dim=0)
    alive = (highest >= floor - _ROUNDING * floor.abs().clamp(min=1.0)).t()  # cells Q
    counts = alive.sum(dim=1)
    if _FIXED_CLASSES + _CLASSES_PER_CANDIDATE * float(counts.float().mean()) > Q:
        return None
    cell, candidate = alive.nonzero(as_tuple=True)
    slot = torch.arange(len(cell)) - (counts.cumsum(0) - counts)[cell]
    # Slots left over repeat the class that is certain to be alive.
    candidates = winner.repeat(int(counts.max()), 1)
    candidates[slot, cell] = candidate
    labels = torch.empty(grid.down.shape[0], grid.right.shape[0], len(counts), dtype=_label_type(Q))
    # Cells with as many candidates side by side, so that few slots are left over.
    for cells in counts.argsort().split(_CELLS):
        labels[:, :, cells] = _best(padded, grid, cells, candidates[: int(counts[cells[-1]]), cells]).to(labels.dtype)
    return labels.view(-1)[grid.source]


def _best(padded: Tensor, grid: _Cells, cells: Tensor, candidates: Tensor) -> Tensor:
    """Best class of some cells' pixels: (rows, columns, cells) float; cells are innermost, so that loops are long."""
    corner = candidates * padded[0].numel() + grid.corner[cells]
    width = padded.shape[2]
    top_left, top_right = padded.take(corner), padded.take(corner + 1)
    bottom_left, bottom_right = padded.take(corner + width), padded.take(corner + width + 1)
    down, right = grid.down[:, cells], grid.right[:, cells]
    left_edge = torch.lerp(top_left[:, None], bottom_left[:, None], down)  # slots rows cells
    right_edge = torch.lerp(top_right[:, None], bottom_right[:, None], down)
    values = torch.lerp(left_edge[:, :, None], right_edge[:, :, None], right)  # slots rows columns cells
    # Falling codes make the maximum the first class of a tie.
    codes = (padded.shape[0] - candidates).to(values.dtype)[:, None, None]
    return padded.shape[0] - values.eq_(values.amax(dim=0)).mul_(codes).amax(dim=0)


class _Cells(NamedTuple):
    """Where each cell's corners and pixels are.

    Attributes:
        corner: (cells,) flat position of a cell's upper left corner in one padded class.
        down: (rows, cells) weight of the lower corners.
        right: (columns, cells) weight of the right corners.
        source: (H, W) flat position of each pixel in (rows, columns, cells).
    """

    corner: Tensor
    down: Tensor
    right: Tensor
    source: Tensor


@lru_cache(maxsize=8)
def _cells(h: int, w: int, size: tuple[int, int]) -> _Cells:
    row_cell, row_slot, down = _axis(h, size[0])
    column_cell, column_slot, right = _axis(w, size[1])
    cells = torch.arange((h + 1) * (w + 1))
    corner = cells // (w + 1) * (w + 2) + cells % (w + 1)
    slots = row_slot[:, None] * right.shape[0] + column_slot
    source = slots * len(cells) + row_cell[:, None] * (w + 1) + column_cell
    return _Cells(corner, down[:, cells // (w + 1)].contiguous(), right[:, cells % (w + 1)].contiguous(), source)


def _axis(length: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """For samples along one side: their cell (0 to `length`), their slot in it, and weights (slots, cells)."""
    position = (torch.arange(target, dtype=torch.float64) + 0.5) * length / target + 0.5
    cell = position.floor().long().clamp(0, length)
    first = torch.searchsorted(cell, torch.arange(length + 1))
    slot = torch.arange(target) - first[cell]
    weights = torch.zeros(int(slot.max()) + 1, length + 1)
    weights[slot, cell] = (position - cell).float()
    return cell, slot, weights


def _label_type(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 255 else torch.int32
