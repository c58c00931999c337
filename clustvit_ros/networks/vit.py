# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Plain vision transformer encoder, in the form that ClustViT and its published baseline use.

Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929; the convolutional stem is from Xiao et al.,
"Early Convolutions Help Transformers See Better", arXiv 2106.14881. As in the reference implementation of ClustViT
(arXiv 2510.01948), the patch projection has no bias, images are zero-padded to whole patches at the bottom and right,
and the position embedding is resized (bicubic) only when the number of tokens differs from its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.errors import ImageError
from clustvit_ros.networks.segmenter import Backbone, Features

BACKBONE_NORM_EPS = 1e-6
# Grids whose resized position embedding is remembered: one for each camera.
_MOST_GRIDS = 8


class PatchProjection(nn.Module):
    """Non-overlapping patches, linearly projected: (B, 3, H, W) -> (B, C, H/p, W/p)."""

    def __init__(self, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images)


class ConvStem(nn.Module):
    """Strided 3x3 convolutions instead of one large patch projection: (B, 3, H, W) -> (B, C, H/p, W/p).

    Learns from little data where a 16x16 projection does not, at about one block's cost (arXiv 2106.14881). On the way
    to the patches it passes finer maps, of strides 2 to p/2, which a head may use: see `detail_dims`.

    Args:
        embed_dim: C.
        patch_size: p, a power of two.
        num_blocks: residual blocks that refine each of the maps of strides 4 to p/2.
        detail_stride: stride of the finest map that is handed out, 2 or 4.
    """

    def __init__(self, embed_dim: int, patch_size: int, num_blocks: int = 0, detail_stride: int = 4) -> None:
        super().__init__()
        self.finest_detail = _level(detail_stride)
        widths = [3, *_stem_widths(embed_dim, patch_size)]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [
                nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))
        self.refine = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(num_blocks)))
            for width in detail_dims(embed_dim, patch_size)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_details(images)[0]

    def forward_with_details(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The patches and the maps of strides `detail_stride` to p/2, finest first."""
        x = images
        maps: list[Tensor] = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                level = len(maps) - 1  # the first map, of stride 2, is as large as the others together
                if 0 <= level < len(self.refine):
                    x = self.refine[level](x)
                maps.append(x)
        return x, tuple(maps[self.finest_detail : -1])


class ResidualBlock(nn.Sequential):
    """Two 3x3 convolutions beside a skip connection (He et al., arXiv 1512.03385): (B, C, h, w) -> (B, C, h, w).

    It starts as the identity for what is not negative, so that a stem trained without it can go on with it.
    """

    def __init__(self, dim: int) -> None:
        last_norm = nn.BatchNorm2d(dim)
        nn.init.zeros_(last_norm.weight)
        super().__init__(
            nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False), last_norm,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + super().forward(x))


def detail_dims(embed_dim: int, patch_size: int, detail_stride: int = 4) -> list[int]:
    """Channels of a convolutional stem's maps of strides `detail_stride` to p/2, finest first; may be none."""
    return _stem_widths(embed_dim, patch_size)[_level(detail_stride) : -1]


def _level(stride: int) -> int:
    """Place of the map of a stride among a convolutional stem's, whose first has stride 2."""
    return stride.bit_length() - 2


def _stem_widths(embed_dim: int, patch_size: int) -> list[int]:
    num_layers = patch_size.bit_length() - 1  # each layer halves; config checks that patch_size is a power of two
    return [max(embed_dim >> (num_layers - 1 - i), 8) for i in range(num_layers)]


class Attention(nn.Module):
    """Multi-head self-attention over (B, L, C) tokens, fused (scores are never materialised)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.attend(*self.heads(x), None if key_mask is None else key_mask[:, None, None, :])

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (B, L, C) -> three times (B, H, L, D)."""
        B, L, C = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # B L 3 H D -> 3 B H L D
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention proper, with a boolean or additive mask that broadcasts to (B, H, L, L): -> (B, L, C)."""
        x = _attention(q, k, v, mask)
        return self.proj(x.transpose(1, 2).flatten(2))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if not (q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # PyTorch's fused backward pass prepares every tile's product anew on a CPU in bfloat16: written out, attention
    # learns in 0.4 of the time (24 heads, 193 tokens).
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1).to(v.dtype) @ v


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear: (..., C) -> (..., C)."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.act: nn.Module = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        norm_eps: epsilon of both LayerNorms; the backbone and the Segmenter head differ in it.
        drop_path: probability of skipping a residual branch for an image, in training only (stochastic depth).
    """

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_ratio: float, norm_eps: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x), key_mask))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1.0 - self.drop_path)


class VisionTransformer(Backbone):
    """ViT encoder: images to normalised patch tokens.

    Args:
        image_size: (height, width) the position embedding is made for; other sizes are accepted, it is resized.
        patch_size: side of a patch in pixels.
        stem: "patch" for the paper's linear projection, "conv" for strided convolutions.
        stem_blocks: residual blocks at each finer stride of a convolutional stem.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
        level_blocks: blocks (from 0) whose outputs go into the features' `levels`.
        detail_stride: stride of the finest of the convolutional stem's maps that go into the features' `pyramid`, 2 or
            4; 0 hands none out.
        final_norm: whether the last block's output is normalised.
    """

    def __init__(
        self, image_size: tuple[int, int], patch_size: int = 16, stem: str = "patch", stem_blocks: int = 0,
        embed_dim: int = 192, depth: int = 12, num_heads: int = 3, mlp_ratio: float = 4.0, drop_path: float = 0.0,
        level_blocks: Sequence[int] = (), detail_stride: int = 0, final_norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_size = patch_size
        self.level_blocks = frozenset(level_blocks)
        self.details = detail_stride > 0
        self.embed_dim = embed_dim
        self.grid_size = grid_size_of(image_size, patch_size)
        self.patch_embed: ConvStem | PatchProjection
        if stem == "conv":
            self.patch_embed = ConvStem(embed_dim, patch_size, stem_blocks, detail_stride or 4)
        else:
            self.patch_embed = PatchProjection(embed_dim, patch_size)
        num_positions = 1 + self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_positions, embed_dim), std=0.02))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, BACKBONE_NORM_EPS, drop_path * i / max(depth - 1, 1))
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=BACKBONE_NORM_EPS) if final_norm else nn.Identity()
        self._resized: dict[tuple, Tensor] = {}

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches plus class token plus position: (B, 3, H, W) -> (B, 1+N, C) and the grid (h, w).

        Raises:
            ImageError: not a batch of three-channel images.
        """
        x, grid_size, _ = self.embed_with_details(images)
        return x, grid_size

    def embed_with_details(self, images: Tensor) -> tuple[Tensor, tuple[int, int], tuple[Tensor, ...]]:
        """`embed`, and the stem's finer maps, finest first; none unless `detail_stride` asked for them."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] == 0 or images.shape[3] == 0:
            raise ImageError(f"images: got shape {tuple(images.shape)}, expected (batch, 3, height, width)")
        pad_bottom, pad_right = -images.shape[2] % self.patch_size, -images.shape[3] % self.patch_size
        if pad_bottom or pad_right:
            images = F.pad(images, (0, pad_right, 0, pad_bottom))
        details: tuple[Tensor, ...] = ()
        if self.details:
            x, details = cast(ConvStem, self.patch_embed).forward_with_details(images)
        else:
            x = self.patch_embed(images)
        grid_size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # B C h w -> B N C
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.resized_pos_embed(grid_size), grid_size, details

    def resized_pos_embed(self, grid_size: tuple[int, int]) -> Tensor:
        """Position embedding for a grid: (1, 1+h*w, C).

        A grid of another shape but the same count uses the entries as they are, in flattened order, as the reference
        implementation does. Without gradients, one resizing serves all images of a grid; whoever records a network
        that reads it holds on to it (`constants`), for the cache forgets.
        """
        if grid_size[0] * grid_size[1] == self.grid_size[0] * self.grid_size[1]:
            return self.pos_embed
        source = self.pos_embed
        if torch.is_grad_enabled():
            return self._resize_pos_embed(grid_size)
        version = 0 if source.is_inference() else source._version
        key = (grid_size, source.device, source.dtype, version)
        if key not in self._resized:
            if len(self._resized) >= _MOST_GRIDS:
                self._resized.clear()
            self._resized[key] = self._resize_pos_embed(grid_size)
        return self._resized[key]

    def constants(self, grid_size: tuple[int, int]) -> tuple[Tensor, ...]:
        return (self.resized_pos_embed(grid_size),)

    def _resize_pos_embed(self, grid_size: tuple[int, int]) -> Tensor:
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        precise = torch.promote_types(grid.dtype, torch.float32)
        grid = grid.to(precise).transpose(1, 2).unflatten(2, self.grid_size)
        grid = F.interpolate(grid, size=grid_size, mode="bicubic", align_corners=False)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)

    def encode(self, images: Tensor) -> Any:
        """All of a plain ViT: (B, 3, H, W) -> features."""
        x, grid_size, details = self.embed_with_details(images)
        levels = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.hands_out(index):
                levels.append(x[:, 1:])
        return self.features(x, grid_size, levels, pyramid=details)

    def hands_out(self, index: int) -> bool:
        """Whether a block's output is a level as it is; the last block's is one after the final norm."""
        return index in self.level_blocks and index + 1 < len(self.blocks)

    def features(self, x: Tensor, grid_size: tuple[int, int], levels: Sequence[Tensor], **extra: Any) -> Features:
        """Features of the last block's output.

        Args:
            x: (B, 1+L, C), before the final norm.
            grid_size: (h, w) tokens.
            levels: outputs of earlier blocks, (B, N, C) each.
            extra: further fields of `Features`.
        """
        tokens = self.norm(x)[:, 1:]
        if len(self.blocks) - 1 in self.level_blocks:
            levels = [*levels, tokens]
        return Features(tokens, grid_size, levels=tuple(levels), **extra)

    def finish(self, state: Any, merge_threshold: float = 0.5, token_capacity: int | Tensor | None = None) -> Features:
        return state


def grid_size_of(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Patches along (height, width), the last ones padded: (H, W) -> (ceil(H/p), ceil(W/p))."""
    return -(-image_size[0] // patch_size), -(-image_size[1] // patch_size)
