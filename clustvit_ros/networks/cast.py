# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""CAST: self-attention within clusters that form around learnt surrogate tokens, in place of a ViT block's attention.

Van Engelenhoven, Strisciuglio, Talavera, "CAST: Clustering Self-Attention using Surrogate Tokens for Efficient
Transformers", arXiv 2402.04239. Each token attends to the members of its clusters and to one summary of every other
cluster: cost grows with the number of tokens, not with its square.

Where the paper leaves a choice, this is what is chosen:

* The temperatures tau_q and tau_k are sqrt(d) of a head, as in ordinary attention, unless given.
* The gate phi is one number per token, shared by the heads; surrogate tokens are split into heads as queries are.
* Surrogate tokens are drawn from a unit normal distribution, so that clusters differ from the start.
* Top-K takes the lower position among equal affinities on a CPU; other devices may not.
* Single assignment is greedy over all pairs of token and cluster in falling order of affinity: the best pair is joined
  first, and full clusters and assigned tokens drop out. Clusters hold ceil(N / Nc) tokens; where Nc does not divide N,
  some have empty slots.
* Inside the network the class token is a token like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.heads import MaskTransformer
from clustvit_ros.networks.segmenter import NetworkConfig, Segmenter, check_transformer
from clustvit_ros.networks.vit import VisionTransformer

Assignment = Literal["top_k", "single"]
Affinity = Literal["softmax", "laplace"]


class Members(NamedTuple):
    """The tokens of each cluster.

    Attributes:
        positions: (B, Nc, kappa) int64.
        valid: (B, Nc, kappa) bool, False = an empty slot, whose position means nothing; None when no slot is empty.
    """

    positions: Tensor
    valid: Tensor | None


def laplace(x: Tensor) -> Tensor:
    """The Laplace function 0.5 (1 + erf((x - mu) / (sigma sqrt 2))) with mu = sqrt(1/2) and sigma = sqrt(1/(4 pi))."""
    mu, sigma = 0.5**0.5, (0.25 / torch.pi) ** 0.5
    return 0.5 * (1.0 + torch.erf((x - mu) / (sigma * 2.0**0.5)))


def cluster_affinity(a_q: Tensor, a_k: Tensor, phi: Tensor, affinity: Affinity = "softmax") -> Tensor:
    """A_g = sigmoid(phi) f(A_q) + (1 - sigmoid(phi)) f(A_k), summed over heads.

    Args:
        a_q, a_k: (B, H, N, Nc) similarities of queries and keys to the surrogate tokens.
        phi: (B, N, 1) gate.
        affinity: f, a softmax over the clusters or the Laplace function.

    Returns:
        (B, N, Nc)
    """
    gate = phi.sigmoid()[:, None]
    if affinity == "softmax":
        a_q, a_k = a_q.softmax(dim=3), a_k.softmax(dim=3)
    else:
        a_q, a_k = laplace(a_q), laplace(a_k)
    return (gate * a_q + (1.0 - gate) * a_k).sum(dim=1)


@torch.no_grad()
def top_k_members(a_g: Tensor, cluster_size: int) -> Members:
    """The kappa tokens of highest affinity to each cluster; a token may be in several clusters, or in none.

    Args:
        a_g: (B, N, Nc).
        cluster_size: kappa; all tokens where there are fewer.
    """
    index = a_g.transpose(1, 2).topk(min(cluster_size, a_g.shape[1]), dim=2).indices
    return Members(index, None)


@torch.no_grad()
def single_assignment_members(a_g: Tensor) -> Members:
    """Each token in exactly one of equal-sized clusters, greedily by affinity.

    Equals going through all pairs of token and cluster in falling order of affinity, joining a pair when its token is
    free and its cluster not full. Since both sides rank pairs by one number, that greedy matching is the only stable
    one, and deferred acceptance finds it in few parallel rounds: tokens ask the best cluster that has not refused them,
    clusters keep the best kappa that ever asked and refuse the others.

    Args:
        a_g: (B, N, Nc).

    Returns:
        Members with kappa = ceil(N / Nc). Empty slots come last in their cluster.
    """
    N, num_clusters = a_g.shape[1:]
    size = -(-N // num_clusters)
    # On the meta device there are shapes and no values, which decide nothing.
    chosen = a_g.argmax(dim=2) if a_g.is_meta else _stable_matching(a_g, size)
    return _members_of(chosen, a_g, size)


def _stable_matching(a_g: Tensor, size: int) -> Tensor:
    """Cluster of each token: (B, N, Nc) -> (B, N) int64."""
    if torch.onnx.is_in_onnx_export():
        raise ConfigError(
            "network: assignment is 'single', whose number of rounds depends on the image and cannot be exported; "
            "use the torch engine, or train with assignment top_k"
        )
    open_ = torch.ones_like(a_g, dtype=torch.bool)
    clusters = torch.arange(a_g.shape[2], device=a_g.device)
    while True:
        chosen = a_g.masked_fill(~open_, -torch.inf).argmax(dim=2)
        asks = chosen[..., None] == clusters  # B N Nc
        offers = a_g.masked_fill(~asks, -torch.inf)
        ranked = offers.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(ranked).scatter_(
            1, ranked, torch.arange(a_g.shape[1], device=a_g.device)[:, None].expand_as(ranked).contiguous()
        )
        refused = asks & (rank >= size)
        if not bool(refused.any()):
            return chosen
        open_ &= ~refused


def _members_of(chosen: Tensor, a_g: Tensor, size: int) -> Members:
    """Positions by cluster, best affinity first: (B, N) cluster of each token -> members."""
    num_clusters = a_g.shape[2]
    asks = chosen[..., None] == torch.arange(num_clusters, device=a_g.device)
    index = a_g.masked_fill(~asks, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :size]
    index = index.transpose(1, 2)  # B kappa Nc -> B Nc kappa
    if a_g.shape[1] == size * num_clusters:
        return Members(index, None)
    valid = asks.transpose(1, 2).gather(2, index)
    return Members(index, valid)


class CASTAttention(nn.Module):
    """Clustered self-attention over (B, N, C) tokens.

    Args:
        embed_dim: C.
        num_heads: heads; affinities are per head and summed, so that all heads share one clustering.
        num_clusters: Nc, surrogate tokens.
        cluster_size: kappa of Top-K.
        assignment: "top_k", or "single" for Single-Assignment Top-K, whose clusters hold ceil(N / Nc) tokens.
        affinity: f of the affinities, "softmax" or "laplace".
        tau_q, tau_k: temperatures of mixing and of the summaries; 0 is sqrt(C / num_heads).
    """

    def __init__(
        self, embed_dim: int, num_heads: int, num_clusters: int, cluster_size: int, assignment: Assignment = "top_k",
        affinity: Affinity = "softmax", tau_q: float = 0.0, tau_k: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("num_clusters", num_clusters), ("cluster_size", cluster_size)):
            if value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        self.num_heads, self.cluster_size = num_heads, cluster_size
        self.assignment: Assignment = assignment
        self.affinity: Affinity = affinity
        self.tau_q, self.tau_k = (tau or (embed_dim // num_heads) ** 0.5 for tau in (tau_q, tau_k))
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.gate = nn.Linear(embed_dim, 1)
        self.surrogate_tokens = nn.Parameter(torch.randn(num_clusters, embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, key_mask: None = None) -> Tensor:
        """Attend: (B, N, C) -> (B, N, C). There is no key mask; the argument is ordinary attention's."""
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # B N 3 H D -> 3 B H N D
        surrogates = self.surrogate_tokens.unflatten(1, (self.num_heads, -1)).permute(1, 2, 0)  # Nc C -> H D Nc
        a_q, a_k = q @ surrogates, k @ surrogates  # B H N Nc
        phi = self.gate(x)
        members = self.assign(cluster_affinity(a_q, a_k, phi, self.affinity))
        mixing = (a_q * ((F.softplus(phi) + 1.0) / self.tau_q)[:, None]).softmax(dim=3)
        importance = a_k * ((F.softplus(-phi) + 1.0) / self.tau_k)[:, None]
        out = mix_clusters(q, k, v, mixing, importance, members)
        return self.proj(out.transpose(1, 2).flatten(2))

    def assign(self, a_g: Tensor) -> Members:
        """Cluster members by affinity (B, N, Nc). No gradient passes."""
        if self.assignment == "single":
            return single_assignment_members(a_g)
        return top_k_members(a_g, self.cluster_size)


def mix_clusters(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, importance: Tensor, members: Members) -> Tensor:
    """Attention inside clusters, their summaries, and the mix of both.

    out_i = sum over clusters c that hold i of mixing[i, c] R_intra[c, i] + sum over the others of mixing[i, c]
    R_inter[c]. The second sum is first taken over all clusters, one matrix product; a member then adds what R_intra has
    beyond R_inter. Nothing of size N x N or N x Nc x D exists.

    Args:
        q, k, v: (B, H, N, D).
        mixing: A_sum, (B, H, N, Nc).
        importance: (B, H, N, Nc), logits of a token's share in a cluster's summary.
        members: tokens of the Nc clusters, kappa slots each.

    Returns:
        (B, H, N, D)
    """
    B, H, N, D = q.shape
    num_clusters, size = members.positions.shape[1:]
    slots = (members.positions + N * torch.arange(B, device=q.device)[:, None, None]).flatten()  # in all images' tokens
    # Whole tokens are picked, with all their heads: rows of memory, which is many times faster than numbers one by one.
    q_g, k_g, v_g = (
        _tokens(x).index_select(0, slots).view(B * num_clusters, size, H, D).transpose(1, 2) for x in (q, k, v)
    )  # B*Nc H kappa D
    valid = None if members.valid is None else members.valid.flatten(0, 1)[:, None]  # B*Nc 1 kappa
    intra = F.scaled_dot_product_attention(q_g, k_g, v_g, None if valid is None else valid[:, :, None])

    per_slot = members.positions[:, None].expand(-1, H, -1, -1)  # B H Nc kappa
    importance, weight = (
        x.transpose(2, 3).gather(3, per_slot).transpose(1, 2).flatten(0, 1) for x in (importance, mixing)
    )  # B*Nc H kappa
    if valid is not None:
        importance = importance.masked_fill(~valid, torch.finfo(importance.dtype).min)
        weight = weight * valid
    inter = importance.softmax(dim=2)[:, :, None] @ v_g  # B*Nc H 1 D
    beyond = (weight[..., None] * (intra - inter)).transpose(1, 2).reshape(B * num_clusters * size, H * D)
    summaries = inter.view(B, num_clusters, H, D).transpose(1, 2)
    out = _tokens(mixing @ summaries).scatter_add(0, slots[:, None].expand_as(beyond), beyond)
    return out.view(B, N, H, D).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """Rows of all images' tokens: (B, H, N, D) -> (B*N, H*D)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


class CAST(VisionTransformer):
    """ViT whose blocks attend by CAST.

    Args:
        num_clusters, cluster_size, assignment, affinity, tau_q, tau_k: as in `CASTAttention`.
        embed_dim, num_heads: sizes of the encoder.
        vit: further arguments of `VisionTransformer`.
    """

    decides = True

    def __init__(
        self, num_clusters: int, cluster_size: int, assignment: Assignment, affinity: Affinity, tau_q: float,
        tau_k: float, embed_dim: int, num_heads: int, **vit,
    ) -> None:  # fmt: skip
        super().__init__(embed_dim=embed_dim, num_heads=num_heads, **vit)
        for block in self.blocks:
            block.attn = CASTAttention(
                embed_dim, num_heads, num_clusters, cluster_size, assignment, affinity, tau_q, tau_k
            )


@dataclass(frozen=True)
class CASTConfig(NetworkConfig):
    """Everything that fixes the shape of a ViT with CAST attention and its decode head.

    Args:
        stem: "patch" (one linear projection) or "conv" (strided convolutions).
        embed_dim, depth, num_heads, mlp_ratio: sizes of the encoder.
        num_clusters: surrogate tokens of each block.
        cluster_size: tokens per cluster; with single assignment it follows from the number of tokens instead.
        assignment: "top_k", or "single" for each token in exactly one cluster.
        affinity: "softmax" or "laplace".
        tau_q, tau_k: temperatures; 0 is the square root of a head's channels.
        head_depth, head_heads: blocks of the decode head, with ordinary attention, and their heads; 0 heads means as
            the encoder.
        drop_path: stochastic depth, in training only.
    """

    stem: Literal["patch", "conv"] = "patch"
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    num_clusters: int = 16
    cluster_size: int = 64
    assignment: Literal["top_k", "single"] = "top_k"
    affinity: Literal["softmax", "laplace"] = "softmax"
    tau_q: float = 0.0
    tau_k: float = 0.0
    head_depth: int = 2
    head_heads: int = 0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "num_clusters", "cluster_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"network: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("tau_q", "tau_k"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"network: {name} is {getattr(self, name)}, expected a positive number, or 0")
        check_transformer(self)

    def build(self, num_classes: int) -> Segmenter:
        backbone = CAST(
            self.num_clusters, self.cluster_size, self.assignment, self.affinity, self.tau_q, self.tau_k,
            image_size=self.image_size, patch_size=self.patch_size, stem=self.stem, embed_dim=self.embed_dim,
            depth=self.depth, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio, drop_path=self.drop_path,
        )  # fmt: skip
        head = MaskTransformer(
            self.embed_dim, num_classes, self.head_depth, self.head_heads or self.num_heads, self.mlp_ratio
        )
        return Segmenter(backbone, head)
