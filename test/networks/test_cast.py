# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""CAST attention, term by term, against plain loops over tokens, heads and clusters."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clustvit_ros.errors import ConfigError
from clustvit_ros.networks import build_network, network_config
from clustvit_ros.networks.cast import (
    CASTAttention,
    cluster_affinity,
    laplace,
    mix_clusters,
    single_assignment_members,
    top_k_members,
)

B, N, C, CLUSTERS, SIZE = 2, 23, 24, 5, 7


@pytest.fixture(params=[1, 3], ids=["single_head", "multi_head"])
def heads(request):
    return request.param


@pytest.fixture
def x():
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attention(heads=3, seed=0, **options):
    torch.manual_seed(seed)
    options = {"num_clusters": CLUSTERS, "cluster_size": SIZE, **options}
    module = CASTAttention(C, heads, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def softmax(values):
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def softplus(value):
    return math.log1p(math.exp(value))


def sigmoid(value):
    return 1.0 / (1.0 + math.exp(-value))


def f_of(row, affinity):
    if affinity == "softmax":
        return softmax(row)
    mu, sigma = math.sqrt(0.5), math.sqrt(1.0 / (4.0 * math.pi))
    return [0.5 * (1.0 + math.erf((value - mu) / (sigma * math.sqrt(2.0)))) for value in row]


def loop_top_k(a_g, size):
    """Members of each cluster, one image: N rows of Nc affinities."""
    return [sorted(range(len(a_g)), key=lambda i: -a_g[i][c])[: min(size, len(a_g))] for c in range(len(a_g[0]))]


def loop_single_assignment(a_g):
    """All pairs in falling order of affinity, the first among equals, one image."""
    num_tokens, num_clusters = len(a_g), len(a_g[0])
    size = math.ceil(num_tokens / num_clusters)
    members, free = [[] for _ in range(num_clusters)], set(range(num_tokens))
    for _, i, c in sorted((-a_g[i][c], i, c) for i in range(num_tokens) for c in range(num_clusters)):
        if i in free and len(members[c]) < size:
            members[c].append(i)
            free.remove(i)
    return members


def loop_cast(module, x, assignment, affinity):
    """The formulas of the paper for one image and all heads, one token at a time."""
    heads, dim = module.num_heads, C // module.num_heads
    rows = module.qkv(x)
    q, k, v = rows[:, :C].tolist(), rows[:, C : 2 * C].tolist(), rows[:, 2 * C :].tolist()
    phi = module.gate(x)[:, 0].tolist()
    surrogates = module.surrogate_tokens.tolist()

    def dot(a, b, h):
        return sum(a[j] * b[j] for j in range(h * dim, (h + 1) * dim))

    n, num_clusters = len(q), len(surrogates)
    a_q = [[[dot(q[i], s, h) for s in surrogates] for i in range(n)] for h in range(heads)]
    a_k = [[[dot(k[i], s, h) for s in surrogates] for i in range(n)] for h in range(heads)]
    a_g = [[0.0] * num_clusters for _ in range(n)]
    for h in range(heads):
        for i in range(n):
            of_q, of_k = f_of(a_q[h][i], affinity), f_of(a_k[h][i], affinity)
            for c in range(num_clusters):
                a_g[i][c] += sigmoid(phi[i]) * of_q[c] + (1.0 - sigmoid(phi[i])) * of_k[c]
    members = loop_top_k(a_g, module.cluster_size) if assignment == "top_k" else loop_single_assignment(a_g)
    out = [[0.0] * C for _ in range(n)]
    for h in range(heads):
        channels = range(h * dim, (h + 1) * dim)
        summaries = []
        for c, group in enumerate(members):
            shares = softmax([a_k[h][i][c] * (softplus(-phi[i]) + 1.0) / module.tau_k for i in group]) if group else []
            summaries.append({j: sum(s * v[i][j] for s, i in zip(shares, group, strict=True)) for j in channels})
        for i in range(n):
            mixing = softmax([a * (softplus(phi[i]) + 1.0) / module.tau_q for a in a_q[h][i]])
            for c, group in enumerate(members):
                result = summaries[c]
                if i in group:
                    weights = softmax([dot(q[i], k[other], h) / math.sqrt(dim) for other in group])
                    result = {j: sum(w * v[o][j] for w, o in zip(weights, group, strict=True)) for j in channels}
                for j in channels:
                    out[i][j] += mixing[c] * result[j]
    return module.proj(torch.tensor(out, dtype=x.dtype))


@pytest.mark.parametrize("affinity", ["softmax", "laplace"])
@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_it_computes_the_papers_formulas(x, heads, assignment, affinity):
    module = attention(heads, assignment=assignment, affinity=affinity)
    with torch.no_grad():
        out = module(x)
        for image in range(B):
            torch.testing.assert_close(out[image], loop_cast(module, x[image], assignment, affinity))


def test_temperatures_take_effect_and_default_to_the_heads_width(x):
    assert attention(3).tau_q == attention(3).tau_k == math.sqrt(C / 3)
    module = attention(3, tau_q=0.7, tau_k=5.0)
    with torch.no_grad():
        torch.testing.assert_close(module(x)[0], loop_cast(module, x[0], "top_k", "softmax"))


def test_laplace_is_the_normal_distribution_function():
    mu, sigma = math.sqrt(0.5), math.sqrt(1.0 / (4.0 * math.pi))
    assert laplace(torch.tensor(mu)).item() == pytest.approx(0.5)
    assert laplace(torch.tensor(mu + sigma)).item() == pytest.approx(0.841345, abs=1e-5)


def test_the_gate_chooses_between_queries_and_keys():
    a_q, a_k = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 3)
    for phi, chosen in ((40.0, a_q), (-40.0, a_k)):
        found = cluster_affinity(a_q, a_k, torch.full((1, 4, 1), phi))
        torch.testing.assert_close(found, chosen.softmax(dim=3).sum(dim=1))


def test_one_cluster_of_all_tokens_is_ordinary_attention(x, heads):
    for assignment in ("top_k", "single"):
        module = attention(heads, num_clusters=1, cluster_size=N, assignment=assignment)
        q, k, v = module.qkv(x).view(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        torch.testing.assert_close(module(x), module.proj(expected))


@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_permuted_tokens_give_permuted_results(x, heads, assignment):
    module = attention(heads, assignment=assignment)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])


@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_images_of_a_batch_do_not_meet(x, assignment):
    module = attention(assignment=assignment)
    torch.testing.assert_close(module(x)[1:], module(x[1:]))


def test_top_k_takes_the_highest_of_each_column():
    a_g = torch.rand(3, 50, 6, generator=torch.Generator().manual_seed(0))
    index = top_k_members(a_g, 9).positions
    for image in range(3):
        for cluster, expected in enumerate(loop_top_k(a_g[image].tolist(), 9)):
            assert set(index[image, cluster].tolist()) == set(expected)
    assert top_k_members(a_g, 1000).positions.shape == (3, 6, 50)


@pytest.mark.parametrize(("num_tokens", "num_clusters"), [(48, 6), (50, 6), (7, 7), (5, 8), (60, 1), (257, 16)])
def test_single_assignment_is_greedy_over_all_pairs(num_tokens, num_clusters):
    generator = torch.Generator().manual_seed(num_tokens)
    # A common favourite makes long chains of refusals.
    a_g = torch.rand(3, num_tokens, num_clusters, generator=generator) + torch.linspace(2, 0, num_clusters)
    members = single_assignment_members(a_g)
    assert members.positions.shape == (3, num_clusters, math.ceil(num_tokens / num_clusters))
    for image in range(3):
        found = []
        for cluster, expected in enumerate(loop_single_assignment(a_g[image].tolist())):
            slots = members.positions[image, cluster]
            group = slots if members.valid is None else slots[members.valid[image, cluster]]
            assert set(group.tolist()) == set(expected)
            found += group.tolist()
        assert sorted(found) == list(range(num_tokens))


def test_single_assignment_of_equal_affinities_still_gives_every_token_one_cluster():
    members = single_assignment_members(torch.zeros(1, 24, 4))
    assert sorted(members.positions.flatten().tolist()) == list(range(24))


@pytest.mark.parametrize("assignment", ["top_k", "single"])
def test_every_parameter_learns_and_the_indices_pass_no_gradient(x, assignment):
    module = attention(assignment=assignment)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert (module.surrogate_tokens.grad.abs().amax(dim=1) > 0).all()


def test_surrogate_tokens_learn_through_summary_and_mixing_each(x):
    module = attention()
    q, k, v = module.qkv(x).view(B, N, 3, 3, C // 3).permute(2, 0, 3, 1, 4).detach()
    surrogates = module.surrogate_tokens.view(CLUSTERS, 3, C // 3).permute(1, 2, 0)
    members = top_k_members(cluster_affinity(q @ surrogates, k @ surrogates, module.gate(x)), SIZE)
    assert not members.positions.requires_grad
    for mixing, importance in (
        ((q @ surrogates).softmax(dim=3), (k @ surrogates).detach()),
        ((q @ surrogates).softmax(dim=3).detach(), k @ surrogates),
    ):
        (gradient,) = torch.autograd.grad(
            mix_clusters(q, k, v, mixing, importance, members).square().sum(), module.surrogate_tokens,
            retain_graph=True,
        )  # fmt: skip
        assert gradient.abs().max() > 0


def test_gradients_are_those_of_finite_differences():
    module = CASTAttention(8, 2, 3, 4).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), eps=1e-7)


@pytest.mark.parametrize("overrides", [{}, {"assignment": "single"}, {"affinity": "laplace", "stem": "conv"}])
def test_the_network_segments_and_every_parameter_learns(overrides):
    shape = {"image_size": [64, 96], "embed_dim": 48, "depth": 2, "head_depth": 1, "num_clusters": 4}
    network = build_network(network_config("cast_t", {**shape, "cluster_size": 8, **overrides}), 5)
    output = network(torch.randn(2, 3, 64, 96))
    assert output.logits.shape == (2, 5, 4, 6) and output.cluster_ids is None
    output.logits.square().mean().backward()
    still = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not still, still
    assert network.eval()(torch.randn(1, 3, 50, 130)).logits.shape == (1, 5, 4, 9)


@pytest.mark.parametrize("overrides", [{"num_clusters": 0}, {"cluster_size": 0}, {"tau_q": -1.0}, {"assignment": "x"}])
def test_hyper_parameters_that_make_no_network_are_refused(overrides):
    with pytest.raises(ConfigError, match="expected"):
        network_config("cast_t", overrides)


def test_cost_grows_linearly_at_a_fixed_cluster_size():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(num_tokens):
        with torch.device("meta"):
            module, tokens = CASTAttention(64, 1, 16, 32), torch.empty(1, num_tokens, 64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(tokens)
        return counter.get_total_flops()

    assert flops(4096) - flops(2048) == flops(2048) * 2 - flops(1024) * 2
