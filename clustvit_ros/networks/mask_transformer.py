"""Segmenter's mask-transformer decode head.

Strudel et al., "Segmenter: Transformer for Semantic Segmentation", arXiv 2105.05633, as mmsegmentation computes it:
class embeddings behind the patch tokens, joint self-attention, cosine similarity, LayerNorm over classes. Its
LayerNorm epsilon differs from the backbone's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.networks.backbone import Features
from clustvit_ros.networks.vit import Block

HEAD_NORM_EPS = 1e-5


class MaskTransformer(nn.Module):
    """Class logits per patch token: features -> (B, Q, h, w).

    On a compact sequence it runs on kept tokens and representatives alone; a merged token gets the class scores of its
    representative. Where merged tokens are grouped, its blocks run on kept tokens and groups; a merged token gets what
    they added to its group.
    """

    def __init__(self, embed_dim: int, num_classes: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dec_proj = nn.Linear(embed_dim, embed_dim)
        self.class_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_classes, embed_dim), std=0.02))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, HEAD_NORM_EPS) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=HEAD_NORM_EPS)
        self.patch_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.class_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes, eps=HEAD_NORM_EPS)

    def forward(self, features: Features) -> Tensor:
        projected = self.dec_proj(features.tokens)
        groups = features.groups
        rows = projected if groups is None else groups.pool(projected)
        x = torch.cat([rows, self.class_embed.expand(rows.shape[0], -1, -1)], dim=1)
        key_mask = features.key_mask
        if groups is not None:
            key_mask = F.pad(groups.log_sizes(projected), (0, self.num_classes))
        elif key_mask is not None:
            key_mask = F.pad(key_mask, (0, self.num_classes), value=True)
        for block in self.blocks:
            x = block(x, key_mask)
        patches, classes = x[:, : -self.num_classes], x[:, -self.num_classes :]
        if groups is not None:
            patches = projected + groups.spread(patches - rows)
        patches, classes = self.norm(patches), self.norm(classes)
        # Cosines of many classes differ in digits that half precision lacks: at least float32 from here on.
        precise = torch.promote_types(x.dtype, torch.float32)
        patches = F.normalize(self.patch_proj(patches).to(precise), dim=-1)
        classes = F.normalize(self.class_proj(classes).to(precise), dim=-1)
        scores = self.mask_norm(patches @ classes.transpose(1, 2))
        return features.to_grid(scores)
