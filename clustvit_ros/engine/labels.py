# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""From class logits on the patch grid to uint8 label maps at image resolution.

Logits are upsampled bilinearly (`align_corners=False`) in bands of rows, so that a full-resolution float tensor of all
classes never exists: 150 classes at 512x512 would be 157 MB. A CPU takes narrow bands that stay in its cache, and where
only the mask is wanted just the classes that can win (`cell_labels`); a GPU takes wide bands and few kernels, all of
them of shapes that depend on sizes alone, so that they can be captured in a CUDA graph.

Which classes can win: between four neighbouring logits a bilinear surface stays between their least and their greatest.
So inside one cell of the patch grid a class whose greatest corner is below some other class's least corner is nowhere
the best, and is left out before any pixel is computed. A trained network leaves one of eleven in four of five cells, a
random one a third of all; where many are left, cells are halved along both sides, whose corners lie closer together.
Nothing is approximated; the work depends on the image, so this is for a CPU, where nothing waits for a shape.

How sure a CPU is: between two source rows a logit rises by the same step from row to row, so its exponential is
multiplied by the same factor. Two exponentials per source row and column take the place of one per pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.engine.pixels import Upsampling, upsampling

# Exponentials of logits below this, and the factor from row to row, are far from what float32 cannot hold.
_GENTLE = 40.0
# Values of all classes that are gone through at once, which stay in a CPU's cache.
_VALUES_AT_ONCE = 1 << 18
# Interpolating and subtracting logits below this makes no infinity and no NaN, so that none has to be looked for.
_SOUND = 1e30
# On a GPU: 39 MB at 150 classes and 512 columns, while each kernel still has work for the whole device.
_DEVICE_BAND_ROWS = 128


def label_maps(
    logits: Tensor, size: tuple[int, int], confidence_threshold: float | Tensor = 0.0, with_confidence: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Upsample logits, take the best class and its softmax probability.

    Args:
        logits: (B, Q, h, w) float.
        size: (H, W) of the result.
        confidence_threshold: pixels below this probability (0..1) get the ignore index.
        with_confidence: compute the confidence map.

    Returns:
        mask: (B, H, W) uint8 (int32 above 255 classes): the first class in case of a tie, the ignore index where logits
            are not numbers.
        confidence: (B, H, W) uint8, probability scaled to 0..255 and 0 where the mask is 255; None if not asked for.
    """
    needs_confidence = with_confidence or confidence_threshold > 0.0
    if logits.device.type != "cpu":
        threshold = torch.full((), float(confidence_threshold), device=logits.device)
        mask, confidence = on_device(logits, size)(logits, threshold if needs_confidence else None)
        return mask, confidence if with_confidence else None
    logits = logits.float()
    masks = [cell_labels(image, size) for image in logits]
    pairs = list(zip(logits, masks, strict=True))
    if not needs_confidence:
        return torch.stack([_banded_labels(image, size) if mask is None else mask for image, mask in pairs]), None
    maps = [_with_probabilities(image, size, mask) for image, mask in pairs]
    mask, probability = torch.stack([labels for labels, _ in maps]), torch.stack([sureness for _, sureness in maps])
    if confidence_threshold > 0.0 or not _is_sound(logits):
        unsure = ~(probability >= confidence_threshold)  # NaN as well
        mask.masked_fill_(unsure, IGNORE_INDEX)
        probability.masked_fill_(unsure, 0.0)
    return mask, probability.mul_(255.0).round_().to(torch.uint8) if with_confidence else None


DeviceMaps = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Label maps of logits and a () float32 threshold; None computes no confidence."""


def on_device(logits: Tensor, size: tuple[int, int]) -> DeviceMaps:
    """How label maps of such logits are made on their device: by one kernel where there is one, else by operations.

    Args:
        logits: (B, Q, h, w) float.
        size: (H, W) of the result.

    Returns:
        To be called with such logits; a recorded graph must hold on to it.
    """
    if logits.device.type == "cuda":
        from clustvit_ros.engine.label_kernel import find_launcher, fused_label_maps  # Triton takes a second to load

        launch = find_launcher(logits.device, logits.dtype)
        if launch is not None:
            return lambda logits, threshold: fused_label_maps(launch, logits, size, threshold)
    # In float16 half of the traffic; bfloat16's digits are too few to be interpolated.
    dtype = torch.float16 if logits.dtype == torch.float16 else torch.float32
    how = upsampling((logits.shape[2], logits.shape[3]), size, logits.device, dtype)
    return lambda logits, threshold: static_label_maps(logits.to(dtype), how, threshold)


def static_label_maps(
    logits: Tensor, how: Upsampling, confidence_threshold: float | Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`label_maps` as few operations whose shapes depend on sizes alone.

    Args:
        logits: (B, Q, h, w) float.
        how: to the result's size, on the logits' device.
        confidence_threshold: a number or a () tensor; None computes no confidence.
    """
    B, Q, _, _ = logits.shape
    height, width = len(how.upper), how.columns.shape[1]
    columns = logits @ how.columns  # B Q h W
    mask = torch.empty(B, height, width, dtype=_mask_type(Q), device=logits.device)
    confidence = None if confidence_threshold is None else torch.empty_like(mask, dtype=torch.uint8)
    for start in range(0, height, _DEVICE_BAND_ROWS):
        rows = slice(start, start + _DEVICE_BAND_ROWS)
        band = torch.lerp(columns[:, :, how.upper[rows]], columns[:, :, how.lower[rows]], how.down[rows])
        best, labels = band.max(dim=1)
        unsure = best.isnan()
        if confidence is not None and confidence_threshold is not None:
            probability = band.sub_(best[:, None]).exp_().sum(dim=1).reciprocal_().nan_to_num_(0.0)
            unsure = unsure | (probability < confidence_threshold)
            confidence[:, rows] = probability.mul_(255.0).round_().masked_fill_(unsure, 0.0)
        mask[:, rows] = labels.masked_fill_(unsure, IGNORE_INDEX)
    return mask, confidence


def _banded_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class of every pixel, found among all classes: (Q, h, w) float32 -> (H, W), the ignore index for NaN."""
    Q, h, w = logits.shape
    how = upsampling((h, w), size, logits.device)
    labels = torch.empty(size, dtype=_mask_type(Q))
    sound = _is_sound(logits)
    columns = _columns(logits, how)
    count = max(_VALUES_AT_ONCE // columns[0].numel(), 1)
    for start in range(0, size[0], count):
        rows = slice(start, start + count)
        upper, lower = columns.index_select(0, how.upper[rows]), columns.index_select(0, how.lower[rows])
        band = upper.lerp_(lower, how.down[rows, :, None])  # rows Q W
        labels[rows] = _first_best(band, band.amax(dim=1, keepdim=True), sound)
    return labels


def _first_best(values: Tensor, best: Tensor, sound: bool) -> Tensor:
    """The first class that has the best value: (n, Q, W), which is overwritten, and (n, 1, W) -> (n, W).

    Equality in place and a second maximum, of codes that fall: several times faster on a CPU than max() or argmax(),
    which find indices one by one, and than a comparison that makes booleans.
    """
    Q = values.shape[1]
    code = values.eq_(best).mul_(_falling_codes(Q)).amax(dim=1)
    # Code 0 is left to pixels that equal no maximum; nor is a comparison with NaN true.
    return Q - code if sound else (Q - code).masked_fill_(code == 0, IGNORE_INDEX)


@lru_cache(maxsize=16)
def _falling_codes(count: int) -> Tensor:
    return torch.arange(count, 0, -1, dtype=torch.float32)[:, None]


def _is_sound(logits: Tensor, limit: float = _SOUND) -> bool:
    """Whether all are numbers, and none is as large as the limit."""
    return bool(logits.abs().amax() < limit)


def _columns(logits: Tensor, how: Upsampling) -> Tensor:
    """Logits in all columns of the result, of the source's rows: (Q, h, w) -> (h, Q, W)."""
    return (logits @ how.columns).transpose(0, 1).contiguous()


@lru_cache(maxsize=16)
def _row_groups(length: int, target: int) -> tuple[Tensor, Tensor, int]:
    """A result's rows by the source rows around them: group g has those between g - 1 and g, of `length` rows.

    Returns:
        (length + 1, 1, 1) float32, weight of a group's lower source row in its first result row, `length / target` less
        than in the next; (target,) int64, group * most + place of each result row; and `most`, rows of the largest one.
    """
    position = (torch.arange(target, dtype=torch.float64) + 0.5) * length / target + 0.5
    group = position.floor().long()
    start = torch.searchsorted(group, torch.arange(length + 1)).clamp(max=target - 1)
    most = int(torch.bincount(group).max())
    first = (position[start] - group[start]).float()[:, None, None]
    return first, group * most + torch.arange(target) - start[group], most


def _with_probabilities(logits: Tensor, size: tuple[int, int], labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best class of every pixel and its softmax probability.

    Args:
        logits: (Q, h, w) float32.
        size: (H, W) of the result.
        labels: (H, W), the best class, where it is known.

    Returns:
        The labels, and (H, W) float32, NaN where logits are none.
    """
    Q, h, w = logits.shape
    columns = _columns(logits, upsampling((h, w), size, logits.device))
    # Above the first source row the second one has no weight; a NaN there counts all the same, as on a GPU.
    columns = torch.cat((torch.lerp(columns[:1], columns[:2][-1:], 0.0), columns, columns[-1:]))
    first, position, most = _row_groups(h, size[0])
    gentle, sound = _is_sound(logits, _GENTLE), _is_sound(logits)
    best, total = torch.ones(h + 1, most, size[1]), torch.empty(h + 1, most, size[1])
    found = torch.empty(h + 1, most, size[1] if labels is None else 0, dtype=_mask_type(Q))
    count = max(_VALUES_AT_ONCE // (Q * size[1]), 1)
    for start in range(0, h + 1, count):
        groups = slice(start, min(start + count, h + 1))
        upper, rise = columns[groups], columns[groups.start + 1 : groups.stop + 1] - columns[groups]  # groups Q W
        power = torch.addcmul(upper, rise, first[groups]).exp_() if gentle else upper
        factor = (rise * (h / size[0])).exp_() if gentle else rise
        for place in range(most):
            if gentle:
                best[groups, place] = highest = power.amax(dim=1)
                torch.sum(power, dim=1, out=total[groups, place])
                values = power
                power = power * factor if labels is None else power.mul_(factor)
            else:
                values = torch.addcmul(upper, rise, first[groups] + place * h / size[0])
                highest = values.amax(dim=1)
                total[groups, place] = (values - highest[:, None]).exp_().sum(dim=1)
            if labels is None:
                found[groups, place] = _first_best(values, highest[:, None], sound)
    maps = (best.div_(total), found) if labels is None else (best.div_(total),)
    probability, *others = (each.flatten(0, 1).index_select(0, position) for each in maps)
    return others[0] if labels is None else labels, probability


def _mask_type(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= IGNORE_INDEX else torch.int32


# Interpolated values may exceed their corners by rounding.
_ROUNDING = 1e-5
# Pixels along a cell's side: a cell of fewer costs more than it saves.
_LEAST_SIDE = 2
_LEAST_HALVED_SIDE = 8
# Halving costs in proportion to the classes, and leaves a third or a quarter of the candidates: it pays from so many of
# them on, and from a tenth of the classes (measured with 10 to 300 on one AVX-512 core).
_HALVED_FROM = (4.0, 0.1)
# Of all classes at all pixels, the share that may be left to interpolate for this way to be the cheaper one; cells have
# a cost that is that of so many pixels (break-even of 2 to 40 classes on grids of 36x48 to 192x256).
_WORTH_SHARE = 0.2
_CELL_PIXELS = 30
# Pixels of cells that are computed together, which stay in a CPU's cache with all candidates.
_PIXELS_AT_ONCE = 32_768


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
    if size[0] < _LEAST_SIDE * h or size[1] < _LEAST_SIDE * w:
        return None
    if not _is_sound(logits):
        return None
    nodes = F.pad(logits[None], (1, 1, 1, 1), mode="replicate")[0].permute(1, 2, 0).contiguous()
    alive = _can_win(nodes)
    halvings = 0
    if size[0] >= _LEAST_HALVED_SIDE * h and size[1] >= _LEAST_HALVED_SIDE * w:
        halvings = int(float(alive.float().mean()) > max(_HALVED_FROM[0] / Q, _HALVED_FROM[1]))
    if halvings:
        nodes = _halved(nodes)[1:-1, 1:-1]  # whose outermost cells have no pixels
        alive = _can_win(nodes)
    return _best_of(nodes, alive, _cells(h, w, size, halvings))


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


def _best_of(nodes: Tensor, alive: Tensor, grid: _Cells) -> Tensor | None:
    """The best of the classes that can win: (h, w, Q) and (h-1, w-1, Q) -> (H, W); None where too many can."""
    Q = nodes.shape[2]
    cell, candidate = alive.view(-1, Q).nonzero().unbind(1)
    counts = torch.bincount(cell, minlength=len(grid.corner))
    contested = (counts > 1).nonzero()[:, 0]
    cell_pixels = grid.row_cell.size * grid.column_cell.size / len(counts)
    if float(counts[contested].sum()) / (Q * len(counts)) > _WORTH_SHARE / (1.0 + _CELL_PIXELS / cell_pixels):
        return None
    start = counts.cumsum(0) - counts
    # Every pixel of a cell gets its first candidate, in most cells the only one. NumPy moves bytes faster.
    first = candidate[start].to(_mask_type(Q)).view(alive.shape[:2]).numpy()
    labels = first.take(grid.column_cell, axis=1).take(grid.row_cell, axis=0)
    contested = contested[counts[contested].argsort()]  # as many candidates side by side: few slots are left over
    for cells in contested.split(max(int(_PIXELS_AT_ONCE / cell_pixels), 1)) if len(contested) else ():
        slots = torch.arange(int(counts[cells[-1]]))[:, None]
        # Slots left over repeat the last candidate.
        candidates = candidate[start[cells] + torch.minimum(slots, counts[cells] - 1)]
        best = _best(nodes, grid, cells, candidates)
        labels.reshape(-1)[grid.pixels(cells)] = best.numpy()
    return torch.from_numpy(labels)


def _best(nodes: Tensor, grid: _Cells, cells: Tensor, candidates: Tensor) -> Tensor:
    """Best class of some cells' pixels: (rows, columns, cells); cells are innermost, so that loops are long."""
    down, right = grid.down[:, cells], grid.right[:, cells]
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
    """Where each cell's corners and pixels are. Where a cell has fewer rows or columns than others, its last repeats.

    Attributes:
        corner: (cells,) flat position of a cell's upper left corner among the nodes.
        row_cell, column_cell: (H,) and (W,) int64, which row and column of cells a pixel is in.
        row, column: (rows, cells) and (columns, cells) int64, a cell's rows of pixels (times W) and columns.
        down: (rows, cells) weight of the lower corners.
        right: (columns, cells) weight of the right corners.
    """

    corner: Tensor
    row_cell: np.ndarray
    column_cell: np.ndarray
    row: np.ndarray
    column: np.ndarray
    down: Tensor
    right: Tensor

    def pixels(self, cells: Tensor) -> np.ndarray:
        """Flat positions in (H, W): (rows, columns, cells)."""
        return self.row[:, None, cells.numpy()] + self.column[None, :, cells.numpy()]


@lru_cache(maxsize=8)
def _cells(h: int, w: int, size: tuple[int, int], halvings: int) -> _Cells:
    row_cell, row, down = _axis(h, size[0], halvings)
    column_cell, column, right = _axis(w, size[1], halvings)
    across = right.shape[1]
    cells = torch.arange(down.shape[1] * across)
    above, left = cells // across, cells % across
    return _Cells(
        above * (across + 1) + left, row_cell.numpy(), column_cell.numpy(), (row[:, above] * size[1]).numpy(),
        column[:, left].numpy(), down[:, above].contiguous(), right[:, left].contiguous(),
    )  # fmt: skip


def _axis(length: int, target: int, halvings: int) -> tuple[Tensor, Tensor, Tensor]:
    """For samples along one side: their cell (from 0); and for (slots, cells) the sample there, and its weight."""
    count = length << 1 if halvings else length + 1
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * length / target
    position = centre * 2 if halvings else centre + 0.5
    cell, numbers = position.floor().long().clamp(0, count - 1), torch.arange(count)
    first, end = torch.searchsorted(cell, numbers), torch.searchsorted(cell, numbers, right=True)
    sample = torch.minimum(first + torch.arange(int((end - first).max()))[:, None], end - 1)
    return cell, sample, (position[sample] - numbers).float()
