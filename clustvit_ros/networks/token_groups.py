"""Groups of neighbouring merged tokens that a decode head's attention blocks handle as one.

Regenerated tokens of one cluster say nearly the same, yet Segmenter's head attends among all of them. Here up to
`GROUP_SIZE` neighbours of one cluster go through its blocks as their mean, and each gets back what the blocks did to
the mean, on top of itself: what makes it differ from its neighbours is not lost. As in ToMe (arXiv 2210.09461), an
attention score grows by the log of what a row stands for, so that a group of equal tokens weighs what they would.

Like everything in capacity mode, how many groups there are follows from the capacity alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clustvit_ros.networks.clustering import gather_rows

GROUP_SIZE = 16


class TokenGroups(NamedTuple):
    """Who goes through a head together.

    Attributes:
        order: (B, N) int64, the grid's tokens: kept ones first, then the merged ones, members of a group side by side.
        slots: (B, N) int64, the row that each token of the grid is in: T kept tokens, then G groups.
        members: (G, `GROUP_SIZE`) int64, positions in `order` after the kept ones; a last group that is not full
            repeats its last member.
        counted: (G, `GROUP_SIZE`) bool, false for what is repeated.
        num_kept: T; a () int64 tensor where traced.
    """

    order: Tensor
    slots: Tensor
    members: Tensor
    counted: Tensor
    num_kept: int | Tensor

    def pool(self, x: Tensor) -> Tensor:
        """Kept tokens as they are, groups as their means: (B, N, C) -> (B, T+G, C)."""
        rows = gather_rows(x, self.order)
        kept, merged = rows[:, : self.num_kept], rows[:, self.num_kept :]
        shares = self.counted / self.counted.sum(dim=1, keepdim=True)
        means = (merged[:, self.members] * shares[:, :, None].to(x.dtype)).sum(dim=2)
        return torch.cat([kept, means], dim=1)

    def spread(self, values: Tensor) -> Tensor:
        """To every token what its row has: (B, T+G, C) -> (B, N, C)."""
        return gather_rows(values, self.slots)

    def log_sizes(self, x: Tensor) -> Tensor:
        """What attention scores of each row grow by: (B, T+G), of the type of x (B, N, C)."""
        sizes = self.counted.sum(dim=1).to(torch.float32).log().to(x.dtype).expand(x.shape[0], -1)
        return torch.cat([torch.zeros_like(x[:, : self.num_kept, 0]), sizes], dim=1)


def group_merged(cluster_ids: Tensor, num_kept: int | Tensor, grid_size: tuple[int, int]) -> TokenGroups:
    """Group the merged tokens of each image: by cluster, along a path through neighbours.

    The path runs down and up through pairs of grid rows, so that its pieces are blocks of two rows.

    Args:
        cluster_ids: (B, N) int64, 0 = kept.
        num_kept: T, tokens of each image whose id is 0; a () int64 tensor where traced.
        grid_size: (h, w), h * w == N.
    """
    num_tokens = cluster_ids.shape[1]
    width = grid_size[1]
    token = torch.arange(num_tokens, device=cluster_ids.device)
    row, column = token // width, token % width
    path = (row // 2 * width + column) * 2 + row % 2
    order = (cluster_ids * (2 * num_tokens + 2 * width) + path).argsort(dim=1, stable=True)
    rows = torch.where(token < num_kept, token, num_kept + (token - num_kept) // GROUP_SIZE)
    slots = torch.zeros_like(order).scatter(1, order, rows.expand_as(order))
    num_merged = num_tokens - num_kept
    num_groups = (num_merged + GROUP_SIZE - 1) // GROUP_SIZE
    members = token[:num_groups, None] * GROUP_SIZE + torch.arange(GROUP_SIZE, device=token.device)
    counted = members < num_merged
    return TokenGroups(order, slots, torch.where(counted, members, num_merged - 1), counted, num_kept)
