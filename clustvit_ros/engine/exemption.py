# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Which tokens must not be merged: those of a region, and those of classes that the last mask showed there.

What a token shows is known after the frame, what it showed a frame ago before it. So a class is exempt where the
previous mask had it, and one patch around that, since things move. A class that appears where it was not a frame ago is
protected one frame later; where that is too late, `two_pass` segments every frame twice and takes the frame's own mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from clustvit_ros.errors import ConfigError

Region = tuple[float, float, float, float]
"""Top, left, bottom and right as fractions of the image."""


def region_tokens(grid_size: tuple[int, int], regions: Sequence[Region]) -> np.ndarray:
    """Tokens that a region touches: (h, w) bool."""
    h, w = grid_size
    tokens = np.zeros(grid_size, bool)
    for top, left, bottom, right in regions:
        # A hair inside, so that an edge that lies on a token's border does not touch the token beyond.
        rows = slice(int(top * h + 1e-9), int(np.ceil(bottom * h - 1e-9)))
        tokens[rows, int(left * w + 1e-9) : int(np.ceil(right * w - 1e-9))] = True
    return tokens


def class_tokens(grid_size: tuple[int, int], masks: np.ndarray, class_ids: Sequence[int]) -> np.ndarray:
    """Tokens with a pixel of some classes in or beside them.

    Args:
        grid_size: (h, w).
        masks: (H, W) or (B, H, W) class ids, of any size.
        class_ids: the classes.

    Returns:
        (B, h, w) bool, dilated by one token.
    """
    batch = masks[None] if masks.ndim == 2 else masks
    found = np.isin(batch, np.asarray(class_ids))
    rows, columns = (_starts(length, target) for length, target in zip(batch.shape[1:], grid_size, strict=True))
    touched = np.maximum.reduceat(np.maximum.reduceat(found, rows, axis=1), columns, axis=2)
    # Where the mask is coarser than the grid, one of its pixels covers several tokens.
    row_of, column_of = (np.arange(n) * m // n for n, m in zip(grid_size, touched.shape[1:], strict=True))
    touched = touched[:, row_of][:, :, column_of].astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    return np.stack([cv2.dilate(tokens, kernel) for tokens in touched]).astype(bool)


def exempt_tokens(
    grid_size: tuple[int, int], regions: Sequence[Region], masks: np.ndarray | None, class_ids: Sequence[int]
) -> np.ndarray | None:
    """Regions and classes together.

    Args:
        grid_size: (h, w).
        regions: rectangles.
        masks: what `class_ids` are looked for in; None when there is no mask yet.
        class_ids: exempt classes.

    Returns:
        (N,), or (B, N) where masks are of a batch, bool; None when no token is exempt.
    """
    tokens = region_tokens(grid_size, regions)
    if masks is not None and class_ids:
        tokens = tokens | class_tokens(grid_size, masks, class_ids)
    if not tokens.any():
        return None
    flat = tokens.reshape(*tokens.shape[:-2], -1)
    return flat[0] if flat.ndim == 2 and len(flat) == 1 else flat


def parse_regions(text: str) -> tuple[Region, ...]:
    """Read rectangles from their text form, `TOP LEFT BOTTOM RIGHT; ...`, fractions of the image.

    Raises:
        ConfigError: not of that form, outside the image, or empty.
    """
    regions = []
    for part in filter(str.strip, text.split(";")):
        try:
            top, left, bottom, right = (float(value) for value in part.replace(",", " ").split())
        except ValueError:
            raise ConfigError(
                f"merge_exempt_region: got {part.strip()!r}, expected four numbers: top, left, bottom, right"
            ) from None
        check_region((top, left, bottom, right))
        regions.append((top, left, bottom, right))
    return tuple(regions)


def check_region(region: Region) -> None:
    """Refuse what is no rectangle within the image.

    Raises:
        ConfigError: with what is expected.
    """
    top, left, bottom, right = region
    if not (0.0 <= top < bottom <= 1.0 and 0.0 <= left < right <= 1.0):
        raise ConfigError(
            f"merge_exempt_region: got {', '.join(f'{value:g}' for value in region)}, expected fractions of the image "
            "with 0 <= top < bottom <= 1 and 0 <= left < right <= 1"
        )


def exempt_class_ids(names: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...]:
    """Ids of classes by name.

    Args:
        names: the model's classes.
        wanted: names of the exempt ones.

    Raises:
        ConfigError: a class that the model does not have.
    """
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ConfigError(
            f"merge_exempt_classes: got {', '.join(unknown)}, expected classes of the model: {', '.join(names)}"
        )
    return tuple(names.index(name) for name in wanted)


def _starts(length: int, target: int) -> np.ndarray:
    """First of the `length` pixels of each of at most `target` groups, strictly ascending, as `reduceat` wants them."""
    return np.unique(np.arange(target) * length // target)
