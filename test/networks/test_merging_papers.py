# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Each way to merge does what its paper says, step by step in plain loops, and gives back what it did not merge."""

from __future__ import annotations

import math

import pytest
import torch
from small_network import SMALL, make_small

from clustvit_ros.classes import ClassSet
from clustvit_ros.cli.main import main
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks import ModelConfig, ViTConfig, build_network, network_config, save_model
from clustvit_ros.networks.algm import window_similarity
from clustvit_ros.networks.bipartite_merging import similarity_score
from clustvit_ros.networks.model_folder import InputConfig
from clustvit_ros.networks.vit_config import MERGINGS

# What its centres' results are mixed for keeps no row of its own.
MIXING = ("kmeans", "stvit")


@torch.no_grad()
@pytest.mark.parametrize("capacity", [33, 21, 9, None])
@pytest.mark.parametrize("merging", [merging for merging in MERGINGS if merging not in ("none", *MIXING)])
def test_what_is_kept_comes_back_bit_for_bit(merging, capacity):
    """Each kept token's features are a row of its own of the last block's output, normalised."""
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    backbone, seen = make_small(merging=merging).backbone, {}
    last = backbone.blocks[-1]
    last.norm2.register_forward_hook(lambda module, inputs, output: seen.update(attended=inputs[0]))
    last.mlp.register_forward_hook(lambda module, inputs, output: seen.update(branch=output))
    features = backbone(images, token_capacity=capacity)
    rows = backbone.norm(seen["attended"] + seen["branch"])[:, 1:]
    assert rows.shape[1] < 48 or capacity is None
    for image in range(2):
        kept = features.tokens[image][features.cluster_ids[image] == 0]
        same = (kept[:, None] == rows[image]).all(dim=2)
        assert (same.sum(dim=1) == 1).all() and (same.sum(dim=0) <= 1).all()


def blend(tokens, sizes, members):
    """Mean of rows that stand for `sizes` tokens each."""
    return sum(sizes[row] * tokens[row] for row in members) / sum(sizes[row] for row in members)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 40, 20, 9, 2])
def test_pairs_merge_block_by_block_as_a_plain_loop_merges_them(capacity):
    """ToMe (arXiv 2210.09461): matching by keys, means by size, proportional attention, and each token its group's."""
    network = make_small(merging="tome", merge_similarity=0.7)
    backbone, cosine = network.backbone, torch.nn.functional.cosine_similarity
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    x = backbone.blocks[0](backbone.embed(images)[0])[0]
    groups, target, steps = [[token] for token in range(48)], capacity, len(backbone.blocks) - 1
    for step, block in enumerate(backbone.blocks[1:]):
        q, k, v = (part.unflatten(1, (2, 12)) for part in block.attn.qkv(block.norm1(x)).chunk(3, dim=1))
        sizes = [len(group) for group in groups]
        heads = []
        for head in range(2):
            scores = q[:, head] @ k[:, head].T / 12**0.5
            for column, size in enumerate(sizes):
                scores[:, 1 + column] += math.log(size)
            heads.append(scores.softmax(dim=1) @ v[:, head])
        x = x + block.attn.proj(torch.cat(heads, dim=1))
        keys = [row.mean(dim=0) for row in k[1:]]
        if target is None:  # as many as have no other one that is alike
            alike = [max(float(cosine(one, other, dim=0)) for other in keys if other is not one) for one in keys]
            target = sum(similarity <= 0.7 for similarity in alike)
            assert 1 < target < 48
        tokens, wanted = list(x[1:]), 48 - (48 - target) * (step + 1) // steps
        while len(groups) > wanted:
            partner = {}
            for a in range(0, len(groups), 2):
                similar = {b: float(cosine(keys[a], keys[b], dim=0)) for b in range(1, len(groups), 2)}
                partner[a] = max(similar.items(), key=lambda item: item[1])
            best = sorted(partner, key=lambda a: -partner[a][1])[: min(len(groups) - wanted, len(groups) // 2)]
            staying = [row for row in range(len(groups)) if row not in best]
            joined = [[row, *(a for a in best if partner[a][0] == row)] for row in staying]
            tokens, keys = ([blend(rows, sizes, members) for members in joined] for rows in (tokens, keys))
            groups = [[token for row in members for token in groups[row]] for members in joined]
            order = sorted(range(len(groups)), key=lambda row: groups[row][0])
            tokens, keys, groups = ([rows[row] for row in order] for rows in (tokens, keys, groups))
            sizes = [len(group) for group in groups]
        x = torch.stack([x[0], *tokens])
        x = x + block.mlp(block.norm2(x))
    features = backbone(images, token_capacity=capacity)
    assert int((features.cluster_ids == 0).sum()) == len(groups) == target
    for row, members in zip(backbone.norm(x)[1:], groups, strict=True):
        torch.testing.assert_close(features.tokens[0, members], row.expand(len(members), -1), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("decode", ["full", "compact"])
@pytest.mark.parametrize(("capacity", "centre_grid"), [(12, (3, 4)), (31, (4, 7)), (2, (1, 2))])
def test_centres_of_a_grid_as_a_plain_loop_moves_them(capacity, centre_grid, decode):
    """Local k-means (arXiv 2210.01035): means of coarse cells, five soft rounds near by, and reconstruction."""
    backbone = make_small(merging="kmeans", decode=decode).backbone
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    x, (rows, columns) = backbone.blocks[0](backbone.embed(images)[0])[0], centre_grid
    tokens = {(r, c): x[1 + 8 * r + c] for r in range(6) for c in range(8)}
    places = [(i, j) for i in range(rows) for j in range(columns)]
    centres = []
    for i, j in places:
        cell = [tokens[r, c] for r in range(6 * i // rows, -(-6 * (i + 1) // rows))
                for c in range(8 * j // columns, -(-8 * (j + 1) // columns))]  # fmt: skip
        centres.append(sum(cell) / len(cell))
    mean = sum(x[1:].flatten()) / (48 * 24)
    spread = sum((x[1:].flatten() - mean) ** 2) / 48
    for _ in range(5):
        shares = {}
        for (r, c), token in tokens.items():
            near = {place: centre for place, centre in zip(places, centres, strict=True)
                    if abs(r * rows // 6 - place[0]) <= 2 and abs(c * columns // 8 - place[1]) <= 2}  # fmt: skip
            closeness = torch.stack([-5.0 * ((token - centre) ** 2).sum() / spread for centre in near.values()])
            shares[r, c] = dict(zip(near, closeness.softmax(dim=0), strict=True))
        for index, place in enumerate(places):
            given = [(shares[at].get(place, torch.zeros(())), token) for at, token in tokens.items()]
            centres[index] = sum(share * token for share, token in given) / sum(share for share, _ in given)
    x = torch.stack([x[0], *centres])[None]
    for block in backbone.blocks[1:]:
        x = block(x)
    results = dict(zip(places, x[0, 1:], strict=True))
    expected = torch.stack([
        results[max(share, key=share.get)] if decode == "compact" else sum(share[at] * results[at] for at in share)
        for share in shares.values()
    ])  # fmt: skip
    features = backbone(images, token_capacity=capacity)
    assert int((features.cluster_ids == 0).sum()) == len(places) <= capacity
    found = features.tokens[0] if decode == "full" else features.tokens[0][features.slots[0]]
    torch.testing.assert_close(found, backbone.norm(expected), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("decode", ["full", "compact"])
@pytest.mark.parametrize(("points", "depth"), [((1,), 5), ((0, 5), 9)])
@pytest.mark.parametrize(("capacity", "centre_grid"), [(12, (3, 4)), (31, (4, 7)), (2, (1, 2))])
def test_semantic_tokens_as_a_plain_loop_makes_and_recovers_from_them(capacity, centre_grid, points, depth, decode):
    """STViT-R (arXiv 2303.08685): pooled queries, two blocks that see all, some on semantic tokens, and recovery."""
    network = make_small(merging="stvit", injection_points=points, depth=depth, decode=decode)
    backbone, (rows, columns) = network.backbone, centre_grid

    def run(block, queries, context):
        """Row by row and head by head."""
        rows_of = [block.attn.qkv(block.norm1(row)).chunk(3) for row in context]
        results = []
        for row in queries:
            q, heads = block.attn.qkv(block.norm1(row)).chunk(3)[0], []
            for head in (slice(0, 12), slice(12, 24)):
                scores = torch.stack([q[head] @ k[head] / 12**0.5 for _, k, _ in rows_of]).softmax(dim=0)
                heads.append(sum(score * v[head] for score, (_, _, v) in zip(scores, rows_of, strict=True)))
            row = row + block.attn.proj(torch.cat(heads))
            results.append(row + block.mlp(block.norm2(row)))
        return results

    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    x = list(backbone.embed(images)[0][0])
    for index, block in enumerate(backbone.blocks):
        if index in points:
            tokens, semantic = x[1:], x[:1]
            for i in range(rows):
                for j in range(columns):
                    cell = [tokens[8 * r + c] for r in range(6 * i // rows, -(-6 * (i + 1) // rows))
                            for c in range(8 * j // columns, -(-8 * (j + 1) // columns))]  # fmt: skip
                    semantic.append(sum(cell) / len(cell))
            made = {index, index + 1}
            end = depth - 1 if index == points[-1] else points[points.index(index) + 1] - 2
        if index < points[0] or index > end:
            x = run(block, x, x)
        elif index in made:
            semantic = run(block, semantic, [*semantic, *tokens])
        elif index < end or (decode == "compact" and index == depth - 1):
            semantic = run(block, semantic, semantic)
        else:
            x = run(block, [semantic[0], *tokens], semantic)
    if decode == "compact":
        x = [
            semantic[0],
            *(semantic[1 + r * rows // 6 * columns + c * columns // 8] for r in range(6) for c in range(8)),
        ]
    features = backbone(images, token_capacity=capacity)
    found = features.tokens[0] if decode == "full" else features.tokens[0][features.slots[0]]
    assert int((features.cluster_ids == 0).sum()) == rows * columns
    torch.testing.assert_close(found, backbone.norm(torch.stack(x[1:])), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 40, 20, 9])
def test_windows_then_pairs_as_a_plain_loop_merges_them(capacity):
    """ALGM (arXiv 2406.09936), row by row: each token's result is that of its group."""
    network = make_small(merging="algm", injection_points=(1, 2), merge_similarity=0.7)
    backbone, images = network.backbone, torch.randn(1, 3, 96, 112, generator=torch.Generator().manual_seed(2))
    images[:, :, 40:] *= 0.05  # half of the image is nearly flat
    x, (height, width) = backbone.embed(images)
    x = backbone.blocks[0](x)
    x = x + backbone.blocks[1].attn(backbone.blocks[1].norm1(x))
    cosine = torch.nn.functional.cosine_similarity
    windows = {}
    for row in range(0, height - 1, 2):
        for column in range(0, width - 1, 2):
            corner = row * width + column
            members = [corner, corner + 1, corner + width, corner + width + 1]
            pairs = [cosine(x[0, 1 + i], x[0, 1 + j], dim=0) for i in members for j in members if i != j]
            windows[tuple(members)] = float(sum(pairs) / 12)
    best = sorted(windows, key=lambda members: -windows[members])
    count = sum(windows[m] > 0.7 for m in best) if capacity is None else min((42 - capacity) * 2 // 9, 9)
    assert capacity is not None or 0 < count < 9
    alone = [(token,) for token in range(42) if not any(token in members for members in best[:count])]
    groups = [list(members) for members in [*best[:count], *alone]]
    rows = torch.cat([x[:, :1], torch.stack([x[0, [1 + i for i in g]].mean(0) for g in groups])[None]], dim=1)
    rows = rows + backbone.blocks[1].mlp(backbone.blocks[1].norm2(rows))
    rows = rows + backbone.blocks[2].attn(backbone.blocks[2].norm1(rows))
    while capacity is None or len(groups) > capacity:
        tokens = rows[0, 1:]
        nearest = {}
        for a in range(1, len(groups), 2):
            similar = {b: float(cosine(tokens[a], tokens[b], dim=0)) for b in range(0, len(groups), 2)}
            nearest[a] = max(similar.items(), key=lambda item: item[1])
        order = sorted(nearest, key=lambda a: -nearest[a][1])
        if capacity is None:
            found = torch.tensor([nearest[a][1] for a in order])
            order = order[: int((found >= found.mean() + found.std() / 3).sum())]
        else:
            order = order[: len(groups) - capacity]
        joined = {b: [b, *(a for a in order if nearest[a][0] == b)] for b in range(len(groups)) if b not in order}
        sizes = torch.tensor([float(len(group)) for group in groups])
        means = [(tokens[j] * sizes[j, None]).sum(0) / sizes[j].sum() for j in joined.values()]
        groups = [[token for row in j for token in groups[row]] for j in joined.values()]
        place = sorted(range(len(groups)), key=lambda row: groups[row][0])
        groups = [groups[row] for row in place]
        rows = torch.cat([rows[:, :1], torch.stack([means[row] for row in place])[None]], dim=1)
        if capacity is None:
            break
    rows = rows + backbone.blocks[2].mlp(backbone.blocks[2].norm2(rows))
    rows = backbone.norm(backbone.blocks[3](rows))[0, 1:]
    features = backbone(images, token_capacity=capacity)
    assert int((features.cluster_ids == 0).sum()) == len(groups) < 42
    for row, members in enumerate(groups):
        torch.testing.assert_close(features.tokens[0, members], rows[row].expand(len(members), -1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_clusters_of_windows_as_a_plain_loop_merges_them():
    """The most similar windows first, then each cluster of what is left, down to the capacity of 15 of 48."""
    network = make_small(merging="algm+clusters", injection_point=2)
    backbone, images = network.backbone, torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    x, grid_size = backbone.embed(images)
    x = x + backbone.blocks[0].attn(backbone.blocks[0].norm1(x))
    best = window_similarity(x[:, 1:], grid_size)[0].argsort(descending=True)[: (48 - 15) * 2 // 9].tolist()
    groups = [[w // 4 * 16 + w % 4 * 2 + step for step in (0, 1, 8, 9)] for w in best]
    groups += [[token] for token in range(48) if not any(token in group for group in groups)]
    rows = torch.cat([x[:, :1], torch.stack([x[0, [1 + i for i in g]].mean(0) for g in groups])[None]], dim=1)
    rows = backbone.blocks[1](rows + backbone.blocks[0].mlp(backbone.blocks[0].norm2(rows)))
    logits = backbone.clusterer(rows[0, 1:])
    margin, cluster = logits[:, 1:].max(dim=1).values - logits[:, 0], logits[:, 1:].argmax(dim=1)
    kept = sorted(margin.argsort()[:15].tolist())
    merged = [row for row in range(len(groups)) if row not in kept]
    members = [[row for row in merged if cluster[row] == c] for c in range(3)]
    means = [rows[0, [1 + row for row in m]].mean(0) if m else torch.zeros(24) for m in members]
    compact = torch.cat([rows[0, :1], rows[0, [1 + row for row in kept]], torch.stack(means)])[None]
    for block in backbone.blocks[2:]:
        compact = block(compact)
    features = backbone(images, token_capacity=15)
    assert int((features.cluster_ids == 0).sum()) == 15
    for row, group in enumerate(groups):
        if row in kept:
            expected = compact[0, 1 + kept.index(row)]
        else:
            pair = torch.cat([rows[0, 1 + row], compact[0, 16 + int(cluster[row])]])
            hidden = torch.nn.functional.gelu(backbone.regenerator.fc1(pair))
            expected = backbone.regenerator.fc2(hidden)
            assert (features.cluster_ids[0, group] == 1 + cluster[row]).all()
        result = backbone.norm(expected).expand(len(group), -1)
        torch.testing.assert_close(features.tokens[0, group], result, rtol=0, atol=1e-4)


@torch.no_grad()
def test_scores_of_similarity_are_a_half_where_the_paper_merges():
    score = similarity_score(torch.tensor([-1.0, 0.0, 0.44, 0.88, 0.94, 1.0]), 0.88)
    torch.testing.assert_close(score, torch.tensor([0.0, 0.0, 0.25, 0.5, 0.75, 1.0]))
    network = make_small(merging="algm")
    images = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(4))
    state = network.backbone.encode(images)
    merged = int((window_similarity(state.x[:, 1:], (6, 8)) > 0.88).sum())
    assert int(network.backbone.count_kept(state, 0.5)) == 48 - 3 * merged


@torch.no_grad()
@pytest.mark.parametrize(("corner", "decode"), [(False, "full"), (False, "compact"), (True, "full")])
@pytest.mark.parametrize("capacity", [33, 20, None])
def test_windows_share_a_token_as_a_plain_loop_lets_them(corner, decode, capacity):
    """CTS (arXiv 2306.02095), window by window: half the resolution, one position, and one result."""
    network = make_small(merging="cts", share_corner=corner, decode=decode, head="linear")
    backbone, images = network.backbone, torch.randn(1, 3, 96, 112, generator=torch.Generator().manual_seed(2))
    positions = torch.nn.functional.interpolate(
        backbone.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (6, 8)), size=(6, 7), mode="bicubic"
    )[0]
    logits = backbone.policy_net(images[:, :, :, :96])[0]
    shares = {(r, c): float(logits[1, r, c] - logits[0, r, c]) for r in range(3) for c in range(3)}
    order = sorted(shares, key=lambda window: -shares[window])
    wanted = sum(margin > 0 for margin in shares.values()) if capacity is None else -(-(42 - capacity) // 3)
    chosen = order[:wanted]
    rows, places = [], []
    for row in range(6):
        for column in range(7):
            if (row // 2, column // 2) not in chosen:
                patch = images[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                rows.append(backbone.patch_embed(patch).flatten() + positions[:, row, column])
                places.append([(row, column)])
    for row, column in chosen:
        window = images[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        half = torch.nn.functional.interpolate(window, scale_factor=0.5, mode="bilinear", align_corners=False)
        around = positions[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        position = around[:, 0, 0] if corner else around.mean(dim=(1, 2))
        rows.append(backbone.patch_embed(half).flatten() + position)
        places.append([(2 * row + i, 2 * column + j) for i in (0, 1) for j in (0, 1)])
    x = torch.cat([backbone.cls_token[0] + backbone.pos_embed[0, :1], torch.stack(rows)])[None]
    for block in backbone.blocks:
        x = block(x)
    results = network.head.classify(backbone.norm(x)[0, 1:])
    expected = network.head.classify.bias[:, None, None].expand(-1, 6, 7).clone()
    for result, place in zip(results, places, strict=True):
        for row, column in place[:1] if corner else place:
            expected[:, row, column] = result
    output = network(images, token_capacity=capacity)
    assert int((output.cluster_ids == 0).sum()) == 42 - 3 * wanted < 42
    torch.testing.assert_close(output.logits[0], expected, rtol=0, atol=1e-4)
    counts = [int(backbone.count_kept(backbone.encode(images), threshold)) for threshold in (0.0, 0.5, 1.0)]
    assert counts == [0, 42 - 3 * sum(margin > 0 for margin in shares.values()), 42]


def test_what_cts_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="patch_size is 8 with merging 'cts', whose policy network sees windows"):
        ViTConfig(merging="cts", patch_size=8)
    with pytest.raises(ConfigError, match="share_corner with merging 'algm' and decode 'full', expected 'cts'"):
        ViTConfig(merging="algm", share_corner=True)


@pytest.mark.parametrize(
    ("architecture", "network", "options", "message"),
    [
        ("clustvit_t", {}, ("--merge", "cts"), "--merge: small has no policy network, which cts shares tokens by"),
        ("clustvit_t", {}, ("--merge", "magic"), "--merge: got 'magic', expected one of none, clusters, algm"),
        ("clustvit_t", {}, ("--decode", "half"), "--decode: got 'half', expected one of full, compact, grouped"),
        ("clustvit_t", {}, ("--merge", "algm+clusters", "--decode", "compact"), "'compact' with merging 'algm+clu"),
        ("clustvit_t", {"injection_point": 0}, ("--merge", "algm+clusters"), "with injection_point 0, expected 1 or"),
        ("clustvit_t", {"injection_points": [0, 2]}, ("--merge", "algm+clusters"), "one Clusterer, small has 2, for"),
        ("clustvit_t", {"depth": 3}, ("--merge", "stvit"), "with 3 blocks and merging 'stvit', expected at least 3"),
        ("vit_t", {}, ("--merge", "clusters"), "merging is 'clusters', which a plain vit has no weights for; use algm"),
        ("clustr_b1", None, ("--merge", "tome"), "--merge: small is of another family than ViT and ClustViT"),
    ],
)  # fmt: skip
def test_what_a_model_has_no_part_for_is_one_message(architecture, network, options, message, tmp_path, capsys):
    if network is None:
        overrides = {"image_size": [96, 128], "embed_dims": [16] * 4, "num_heads": [1] * 4, "depths": [1] * 4}
    else:
        overrides = {**SMALL, "image_size": [96, 128], **network}
    config = network_config(architecture, overrides)
    model = ModelConfig("m", architecture, config, ClassSet.numbered(5), InputConfig((96, 128)), overrides=overrides)
    save_model(tmp_path / "small", model, build_network(config, 5))
    assert main(["bench", "--model", str(tmp_path / "small"), *options]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
