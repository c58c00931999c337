"""Upsampling and arg-max that look only at the classes that can win.

Between four neighbouring logits a bilinear surface stays between their least and their greatest. So inside one cell of
the patch grid a class whose greatest corner is below some other class's least corner is nowhere the best, and is left
out before any pixel is computed. A trained network leaves a few classes per cell (two of eleven on CamVid), a random
one a third; where many are left, cells are halved along both sides first, whose corners lie closer together. Nothing is
approximated; how much work remains depends on the image, so this is for a CPU, where nothing waits for a shape.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Interpolated values may exceed their corners by rounding.
_ROUNDING = 1e-5
# Sums of two logits below this are finite.
_SOUND = 1e30
# Fewer classes are upsampled as soon as sorted out.
_FEWEST_CLASSES = 40
# Cells of fewer pixels than this along a side cost more than they save.
_LEAST_SIDE = 4
# Halving costs in proportion to the classes, and leaves a third or a quarter of the candidates: it pays from a tenth of
# the classes on (measured with 60, 150 and 300 of them on one AVX-512 core).
_HALVED_FROM = 0.1
# Cells that are computed together, by the number of halvings: their pixels of all candidates stay in a CPU's cache.
_CELLS = (128, 512)


def cell_labels(logits: Tensor, size: tuple[int, int]) -> Tensor | None:
    """The best class of every pixel.

    Args:
        logits: (Q, h, w) float32 on the CPU.
        size: (H, W) of the result.

    Returns:
        (H, W) uint8 (int32 above 255 classes), the first class in case of a tie; None where this way is not the
        cheaper one, or where logits are not finite or absurdly large.
    """
    Q, h, w = logits.shape
    if Q <= _FEWEST_CLASSES or size[0] < _LEAST_SIDE * h or size[1] < _LEAST_SIDE * w:
        return None
    if not bool(logits.abs().amax() < _SOUND):
        return None
    nodes = F.pad(logits[None], (1, 1, 1, 1), mode="replicate")[0].permute(1, 2, 0).contiguous()
    alive = _can_win(nodes)
    halvings = 0
    if size[0] >= 2 * _LEAST_SIDE * h and size[1] >= 2 * _LEAST_SIDE * w:
        halvings = int(float(alive.float().mean()) > _HALVED_FROM)
    if halvings:
        nodes = _halved(nodes)
        alive = _can_win(nodes)
    return _best_of(nodes, alive, _cells(h, w, size, halvings), _CELLS[halvings])


def _can_win(nodes: Tensor) -> Tensor:
    """Whether a class can be the best somewhere in a cell: corners (h, w, Q) -> (h-1, w-1, Q) bool."""
    above, below = nodes[:-1], nodes[1:]
    low, high = torch.minimum(above, below), torch.maximum(above, below)
    floor = torch.minimum(low[:, :-1], low[:, 1:]).amax(dim=2, keepdim=True)
    floor -= _ROUNDING * floor.abs().clamp(min=1.0)
    return torch.maximum(high[:, :-1], high[:, 1:]) >= floor


def _halved(nodes: Tensor) -> Tensor:
    """The same surface on cells of half the side: (h, w, Q) -> (2h-1, 2w-1, Q)."""
    h, w, Q = nodes.shape
    rows = nodes.new_empty(2 * h - 1, w, Q)
    rows[::2] = nodes
    torch.add(nodes[:-1], nodes[1:], out=rows[1::2]).mul_(0.5)
    result = nodes.new_empty(2 * h - 1, 2 * w - 1, Q)
    result[:, ::2] = rows
    torch.add(rows[:, :-1], rows[:, 1:], out=result[:, 1::2]).mul_(0.5)
    return result


def _best_of(nodes: Tensor, alive: Tensor, grid: _Cells, cells_at_once: int) -> Tensor:
    """The best of the classes that can win: (h, w, Q) and (h-1, w-1, Q) -> (H, W)."""
    Q = nodes.shape[2]
    cell, candidate = alive.view(-1, Q).nonzero().unbind(1)
    counts = torch.bincount(cell, minlength=len(grid.corner))
    start = counts.cumsum(0) - counts
    labels = torch.empty(grid.down.shape[0], grid.right.shape[0], len(counts), dtype=_label_type(Q))
    # Cells with as many candidates side by side, so that few slots are left over.
    for cells in counts.argsort().split(cells_at_once):
        slots = torch.arange(int(counts[cells[-1]]))[:, None]
        # Slots left over repeat the last candidate.
        candidates = candidate[start[cells] + torch.minimum(slots, counts[cells] - 1)]
        labels[:, :, cells] = _best(nodes, grid, cells, candidates).to(labels.dtype)
    return labels.view(-1)[grid.source]


def _best(nodes: Tensor, grid: _Cells, cells: Tensor, candidates: Tensor) -> Tensor:
    """Best class of some cells' pixels: (rows, columns, cells); cells are innermost, so that loops are long."""
    down, right = grid.down[:, cells], grid.right[:, cells]
    if len(candidates) == 1:
        return candidates[:, None].expand(len(down), len(right), -1)
    _, width, Q = nodes.shape
    corner = grid.corner[cells] * Q + candidates
    top_left, top_right = nodes.take(corner), nodes.take(corner + Q)
    bottom_left, bottom_right = nodes.take(corner + width * Q), nodes.take(corner + (width + 1) * Q)
    left_edge = torch.lerp(top_left[:, None], bottom_left[:, None], down)  # slots rows cells
    right_edge = torch.lerp(top_right[:, None], bottom_right[:, None], down)
    values = torch.lerp(left_edge[:, :, None], right_edge[:, :, None], right)  # slots rows columns cells
    # Falling codes make the maximum the first class of a tie.
    codes = (Q - candidates).to(values.dtype)[:, None, None]
    return Q - values.eq_(values.amax(dim=0)).mul_(codes).amax(dim=0)


class _Cells(NamedTuple):
    """Where each cell's corners and pixels are.

    Attributes:
        corner: (cells,) flat position of a cell's upper left corner among the nodes.
        down: (rows, cells) weight of the lower corners.
        right: (columns, cells) weight of the right corners.
        source: (H, W) flat position of each pixel in (rows, columns, cells).
    """

    corner: Tensor
    down: Tensor
    right: Tensor
    source: Tensor


@lru_cache(maxsize=8)
def _cells(h: int, w: int, size: tuple[int, int], halvings: int) -> _Cells:
    row_cell, row_slot, down = _axis(h, size[0], halvings)
    column_cell, column_slot, right = _axis(w, size[1], halvings)
    across = right.shape[1]
    cells = torch.arange(down.shape[1] * across)
    corner = cells // across * (across + 1) + cells % across
    slots = row_slot[:, None] * right.shape[0] + column_slot
    source = slots * len(cells) + row_cell[:, None] * across + column_cell
    return _Cells(corner, down[:, cells // across].contiguous(), right[:, cells % across].contiguous(), source)


def _axis(length: int, target: int, halvings: int) -> tuple[Tensor, Tensor, Tensor]:
    """For samples along one side: their cell (from 0), their slot in it, and weights (slots, cells)."""
    count = (length + 1) << halvings
    position = ((torch.arange(target, dtype=torch.float64) + 0.5) * length / target + 0.5) * 2**halvings
    cell = position.floor().long().clamp(0, count - 1)
    first = torch.searchsorted(cell, torch.arange(count))
    slot = torch.arange(target) - first[cell]
    weights = torch.zeros(int(slot.max()) + 1, count)
    weights[slot, cell] = (position - cell).float()
    return cell, slot, weights


def _label_type(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 255 else torch.int32
