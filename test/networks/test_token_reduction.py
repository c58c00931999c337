# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Properties of merging without training, of several injection points, of compact and of grouped decoding."""

from __future__ import annotations

import pytest
import torch
from small_network import SMALL, make_small

from clustvit_ros.cli.arguments import write_variant
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks import (
    ModelConfig,
    ViTConfig,
    build_network,
    load_config,
    load_segmenter,
    network_config,
    save_model,
)
from clustvit_ros.networks.architectures import without_merging
from clustvit_ros.networks.bipartite_merging import Groups, merge_most_similar, most_similar
from clustvit_ros.networks.clustering import GROUP_SIZE, group_merged
from clustvit_ros.networks.grid_centres import grid_of_centres, local_kmeans, middles
from clustvit_ros.networks.model_folder import InputConfig
from clustvit_ros.networks.official import to_official
from clustvit_ros.networks.segmenter import Features

VARIANTS = [
    {"injection_points": (1, 2)}, {"injection_points": (0, 2, 3)}, {"decode": "compact"},
    {"injection_points": (1, 3), "decode": "compact"}, {"decode": "grouped"},
    {"injection_points": (1, 3), "decode": "grouped"}, {"merging": "tome"}, {"merging": "kmeans"},
    {"merging": "tome", "decode": "compact"}, {"merging": "kmeans", "decode": "compact", "head": "linear"},
    {"merging": "stvit"}, {"merging": "stvit", "decode": "compact", "depth": 8, "injection_points": (1, 5)},
    {"merging": "stvit", "head": "upernet", "head_blocks": (0, 1, 2, 3), "head_channels": 8},
    {"merging": "cts"}, {"merging": "cts", "decode": "compact", "stem": "conv", "head": "detail"},
    {"merging": "algm+clusters", "injection_point": 2}, {"merging": "algm"},
    {"merging": "algm", "injection_points": (1, 2), "decode": "compact"},
    {"stem": "conv", "head": "detail", "decode": "compact"}, {"stem": "conv", "head": "detail", "merging": "tome"},
]  # fmt: skip


@pytest.fixture(params=VARIANTS, ids=lambda changes: "-".join(str(value) for value in changes.values()))
def changes(request):
    return request.param


@pytest.fixture
def images():
    return torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_all_tokens_kept_is_the_plain_vit_bit_for_bit(changes, images):
    network = make_small(**changes)
    config = without_merging(
        ViTConfig(**{**SMALL, **changes, "merging": "", "injection_points": (), "decode": "full"})
    )
    plain = build_network(config, 5).eval()
    plain.load_state_dict({name: network.state_dict()[name] for name in plain.state_dict()})
    for capacity in (48, 1000):
        output = network(images, token_capacity=capacity)
        assert torch.equal(output.logits, plain(images).logits) and not output.cluster_ids.any()


@torch.no_grad()
@pytest.mark.parametrize("capacity", [1, 6, 17, 30, 47])
def test_capacity_is_kept(changes, images, capacity):
    output = make_small(**changes)(images, token_capacity=capacity)
    kept = (output.cluster_ids == 0).sum(dim=1)
    if changes.get("merging") == "cts" and capacity >= 12:  # whole windows
        assert (kept == 48 - 3 * -(-(48 - capacity) // 3)).all()
    elif changes.get("merging") in ("kmeans", "stvit"):
        assert (kept <= capacity).all() and (kept >= 0.7 * capacity).all()
    else:
        assert (kept == capacity).all()
    finer = 4 if changes.get("head") == "detail" else 1
    assert output.logits.shape == (2, 5, 6 * finer, 8 * finer) and bool(output.logits.isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 96), (70, 1), (1, 1)])
def test_a_picture_of_one_row_of_patches_is_segmented(changes, size):
    """Which has no window of 2x2 in it."""
    network, thin = make_small(**changes), torch.rand(2, 3, *size)
    rows, columns = -(-size[0] // 16), -(-size[1] // 16)
    finer = 4 if changes.get("head") == "detail" else 1
    for settings in ({}, {"merge_threshold": 0.0}, {"token_capacity": 1}, {"token_capacity": 3}):
        output = network(thin, **settings)
        assert output.logits.shape == (2, 5, rows * finer, columns * finer) and bool(output.logits.isfinite().all())


@torch.no_grad()
def test_a_batch_equals_its_images(changes, images):
    network = make_small(**changes)
    both = network(images, token_capacity=17)
    for index in range(2):
        alone = network(images[index : index + 1], token_capacity=17)
        assert torch.equal(alone.cluster_ids[0], both.cluster_ids[index])
        scale = max(float(alone.logits.abs().max()), 1.0)
        torch.testing.assert_close(alone.logits[0], both.logits[index], rtol=0, atol=1e-4 * scale)


@torch.no_grad()
def test_count_falls_with_the_threshold(changes, images):
    network = make_small(**changes)
    state = network.backbone.encode(images)
    counts = [int(network.backbone.count_kept(state, threshold).sum()) for threshold in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 96
    traced = network.backbone.count_kept(state, torch.tensor(0.6))
    assert torch.equal(traced, network.backbone.count_kept(state, 0.6))


def test_every_parameter_gets_a_gradient(changes, images):
    network = make_small(**changes).train()
    output = network(images, token_capacity=20)
    loss = output.logits.square().mean()
    if output.cluster_logits is not None:
        loss = loss + output.cluster_logits.square().mean()
    loss.backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@torch.no_grad()
@pytest.mark.parametrize("decode", ["full", "compact"])
def test_padding_of_a_batch_changes_nothing(images, decode):
    """Exact mode pads images to the fullest one at every point."""
    network = make_small(injection_points=(1, 2), decode=decode)
    both = network(images)
    kept = (both.cluster_ids == 0).sum(dim=1)
    assert kept[0] != kept[1]
    for index in range(2):
        alone = network(images[index : index + 1])
        assert torch.equal(alone.cluster_ids[0], both.cluster_ids[index])
        torch.testing.assert_close(alone.logits[0], both.logits[index], rtol=0, atol=1e-4)


@torch.no_grad()
def test_later_points_merge_only_what_is_still_kept(images):
    network = make_small(injection_points=(1, 2))
    one = make_small()
    one.load_state_dict({name: network.state_dict()[name] for name in one.state_dict()})
    first = one.backbone.finish(one.backbone.encode(images), token_capacity=33).cluster_ids
    features = network.backbone.finish(network.backbone.encode(images), token_capacity=18)
    # Half of the 30 merged tokens go at the first point.
    assert torch.equal(torch.where(features.cluster_ids <= 3, features.cluster_ids, 0) > 0, first > 0)
    assert ((features.cluster_ids > 3).sum(dim=1) == 15).all()
    assert features.cluster_logits.shape == (2, 48 + 33, 4) and features.cluster_positions.shape == (2, 48 + 33)
    assert (first.gather(1, features.cluster_positions[:, 48:]) == 0).all()


@torch.no_grad()
def test_regeneration_is_nested(images):
    """A token merged at the second point is regenerated there, and the first point's tokens from its result."""
    network = make_small(injection_points=(1, 2))
    backbone = network.backbone
    before = backbone.finish(backbone.encode(images), token_capacity=18).tokens
    ids = backbone.finish(backbone.encode(images), token_capacity=18).cluster_ids
    backbone.later_regenerators[0].fc2.bias += torch.randn(24)
    changed = (backbone.finish(backbone.encode(images), token_capacity=18).tokens != before).any(dim=2)
    assert torch.equal(changed, ids > 3)
    backbone.regenerator.fc2.bias += torch.randn(24)
    changed = (backbone.finish(backbone.encode(images), token_capacity=18).tokens != before).any(dim=2)
    assert torch.equal(changed, ids > 0)


@torch.no_grad()
def test_compact_decoding_gives_a_cluster_one_score(images):
    network = make_small(decode="compact")
    output = network(images, token_capacity=17)
    for image in range(2):
        scores = output.logits[image].flatten(1).T
        for cluster in (1, 2, 3):
            members = scores[output.cluster_ids[image] == cluster]
            assert torch.equal(members, members[:1].expand_as(members))
        assert len(scores[output.cluster_ids[image] == 0].unique(dim=0)) == 17


@torch.no_grad()
@pytest.mark.parametrize("num_kept", [5, 31, 47])
def test_groups_are_neighbours_of_one_cluster_wherever_its_members_allow(num_kept):
    generator = torch.Generator().manual_seed(num_kept)
    ids = torch.full((2, 48), 1)
    ids[1, 24:] = 2  # the lower half of the second image
    for image in ids:
        image[torch.randperm(48, generator=generator)[:num_kept]] = 0
    groups = group_merged(ids, num_kept, (6, 8))
    num_groups = -(-(48 - num_kept) // GROUP_SIZE)
    assert groups.counted.shape == (num_groups, GROUP_SIZE) and int(groups.counted.sum()) == 48 - num_kept
    for image in range(2):
        kept = ids[image] == 0
        assert sorted(groups.slots[image][kept].tolist()) == list(range(num_kept))
        mixed = 0
        for row in range(num_kept, num_kept + num_groups):
            members = (groups.slots[image] == row).nonzero()[:, 0]
            assert len(members) == int(groups.counted[row - num_kept].sum()) and not kept[members].any()
            mixed += len(ids[image][members].unique()) - 1
        assert mixed <= image  # at most one group holds the end of one cluster and the beginning of the next
    full = group_merged(torch.ones(1, 48, dtype=torch.int64), 0, (6, 8))
    for row in range(48 // GROUP_SIZE):  # two rows of the grid
        block = (full.slots[0] == row).view(6, 8).nonzero()
        assert (block.max(dim=0).values - block.min(dim=0).values).tolist() == [1, GROUP_SIZE // 2 - 1]


@torch.no_grad()
def test_grouping_equal_tokens_changes_nothing():
    head = make_small(head_depth=2).head
    tokens = torch.randn(2, 48, 24, generator=torch.Generator().manual_seed(3))
    ids = torch.zeros(2, 48, dtype=torch.int64)
    ids[:, 16:32], ids[:, 32:43] = 1, 2
    tokens[:, 16:32], tokens[:, 32:43] = tokens[:, 16:17], tokens[:, 32:33]
    alone = Features(tokens, (6, 8))
    torch.testing.assert_close(
        head(alone._replace(groups=group_merged(ids, 21, (6, 8)))), head(alone), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_grouped_decoding_keeps_members_apart_and_leaves_exact_mode_alone(images):
    grouped, full = make_small(decode="grouped"), make_small()
    assert torch.equal(grouped(images).logits, full(images).logits)
    output = grouped(images, token_capacity=17)
    merged = output.logits[0].flatten(1).T[output.cluster_ids[0] > 0]
    assert len(merged.unique(dim=0)) == 31
    assert (output.logits - full(images, token_capacity=17).logits).abs().max() > 1e-4


@torch.no_grad()
def test_matching_merges_the_most_similar_pairs_into_their_mean():
    metric = torch.eye(6)[None].clone()
    metric[0, 5] = metric[0, 2]  # tokens 2 and 5 are alike; every even one may join an odd one
    x = torch.randn(1, 7, 4)
    everything = torch.arange(6)[None]
    groups = merge_most_similar(Groups(x, metric, torch.ones(1, 6, 1), everything, everything), 5)
    assert groups.slots.tolist() == [[0, 1, 4, 2, 3, 4]] and groups.leads.tolist() == [[0, 1, 3, 4, 5]]
    torch.testing.assert_close(groups.x[0, 5], (x[0, 3] + x[0, 6]) / 2)
    assert torch.equal(groups.x[:, 0], x[:, 0]) and groups.size.flatten().tolist() == [1, 1, 1, 1, 2]
    assert most_similar(metric)[0].tolist() == [0, 0, 1, 0, 0, 1]


@torch.no_grad()
def test_merging_nothing_is_the_identity():
    x, metric, everything = torch.randn(2, 9, 4), torch.randn(2, 8, 3), torch.arange(8).expand(2, -1)
    groups = merge_most_similar(Groups(x, metric, torch.ones(2, 8, 1), everything, everything), 8)
    torch.testing.assert_close(groups.x, x)
    assert torch.equal(groups.slots, everything) and torch.equal(groups.leads, everything)


@torch.no_grad()
def test_kmeans_finds_two_flat_regions():
    tokens = torch.zeros(1, 6, 8, 3)
    tokens[:, :, 5:] = 4.0
    centres, weights = local_kmeans(tokens.flatten(1, 2), (6, 8), (3, 4))
    torch.testing.assert_close(weights.sum(2), torch.ones(1, 48))
    rebuilt = (weights @ centres).unflatten(1, (6, 8))
    torch.testing.assert_close(rebuilt, tokens, rtol=0, atol=0.2)


def test_centres_fit_the_capacity_and_the_grid():
    for grid in ((32, 32), (22, 30), (3, 50), (1, 7)):
        total = grid[0] * grid[1]
        for capacity in range(1, total, max(total // 40, 1)):
            rows, columns = grid_of_centres(capacity, grid)
            assert 1 <= rows <= grid[0] and 1 <= columns <= grid[1] and rows * columns <= capacity
            traced = grid_of_centres(torch.tensor(capacity), grid)
            assert (int(traced[0]), int(traced[1])) == (rows, columns)
            leads = middles(grid, (rows, columns), torch.zeros(1))
            assert len(leads.unique()) == rows * columns and int(leads.max()) < total


@pytest.mark.parametrize("merge", ["none", "algm", "tome", "kmeans"])
def test_a_clustvits_weights_run_with_another_way_to_merge(make_toy_model, tmp_path, merge):
    from clustvit_ros.classes import ClassSet

    model = make_toy_model(ClassSet.numbered(7))
    with (model / "model.yaml").open("a") as file:
        file.write("operating_points: [{size: [96, 128], capacity: 24, miou: 50.0, agreement: 0.9}]\n")
    network = load_segmenter(write_variant(model, tmp_path / "variant", {"merging": merge}))
    network = network.requires_grad_(False)
    own = load_segmenter(model).requires_grad_(False)
    image = torch.randn(1, 3, 96, 128)
    assert torch.equal(network(image, token_capacity=48).logits, own(image, token_capacity=48).logits)
    if merge != "none":
        assert int((network(image, token_capacity=24).cluster_ids == 0).sum()) in range(15, 25)


def test_merging_is_one_line_of_a_model(make_toy_model):
    from clustvit_ros.classes import ClassSet

    path = make_toy_model(ClassSet.numbered(7)) / "model.yaml"
    text = path.read_text()
    path.write_text(f"merging: algm\n{text}")
    config = load_config(path.parent)
    assert config.network.merge_method == "algm" and config.overrides["merging"] == "algm"
    assert load_segmenter(path.parent).backbone.global_point == 1
    path.write_text(f"merging: algm\n{text}".replace("network:", "network:\n  merging: tome"))
    with pytest.raises(ConfigError, match="merging is 'algm' and in network 'tome', expected it once"):
        load_config(path.parent)
    path.write_text(f"merging: magic\n{text}")
    with pytest.raises(ConfigError, match="merging"):
        load_config(path.parent)


def test_weights_of_another_network_are_still_refused(make_toy_model, tmp_path):
    from clustvit_ros.classes import ClassSet

    model = make_toy_model(ClassSet.numbered(7))
    with pytest.raises(ModelError, match=r"unknown: backbone\.clusterer"):
        load_segmenter(write_variant(model, tmp_path / "vit", {"backbone": "vit"}))
    with pytest.raises(ConfigError, match="merging"):
        write_variant(model, tmp_path / "bad", {"merging": "magic"})


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"injection_points is \[3, 1\], expected ascending"):
        ViTConfig(injection_points=(3, 1))
    with pytest.raises(ConfigError, match="injection_point: got 12 with 12 blocks"):
        build_network(ViTConfig(injection_points=(3, 12)), 2)
    with pytest.raises(ConfigError, match="injection_point: got 12 with 12 blocks"):
        build_network(ViTConfig(merging="tome", injection_point=12), 2)
    with pytest.raises(ConfigError, match="merging is 'clusters', which a plain vit has no weights for"):
        ViTConfig(backbone="vit", merging="clusters")
    with pytest.raises(ConfigError, match=r"'grouped', which is for head 'segmenter', .* got head 'linear'"):
        ViTConfig(decode="grouped", head="linear")
    with pytest.raises(ConfigError, match="'grouped', which groups a cluster's tokens, with merging 'tome'"):
        ViTConfig(decode="grouped", merging="tome")
    with pytest.raises(ConfigError, match=r"injection_points is \[2\] with merging 'algm', expected two"):
        ViTConfig(merging="algm", injection_points=(2,))
    with pytest.raises(ConfigError, match=r"injection_points: got \[3, 12\] with 12 blocks, expected ascending"):
        build_network(ViTConfig(merging="algm", injection_points=(3, 12)), 2)
    for points in ((2,), (0, 3, 7), (9, 12)):
        with pytest.raises(ConfigError, match=r"with (4|12) blocks and merging 'stvit', expected at least 3 blocks"):
            build_network(ViTConfig(merging="stvit", injection_points=points, depth=4 if points == (2,) else 12), 2)
    for similarity in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ConfigError, match=r"merge_similarity is .*, expected above 0 and below 1"):
            ViTConfig(merging="algm", merge_similarity=similarity)
    with pytest.raises(ConfigError, match="merging is 'algm', which clustr_b1 cannot do: it clusters by itself"):
        network_config("clustr_b1", {"merging": "algm"})
    with pytest.raises(ModelError, match="no name for a second injection point"):
        to_official(make_small(injection_points=(1, 2)).state_dict())


def test_a_model_of_several_points_is_saved_and_loaded(tmp_path, images):
    from clustvit_ros.classes import ClassSet

    overrides = {**SMALL, "image_size": [96, 128], "injection_points": [1, 3], "decode": "compact"}
    config = network_config("clustvit_t", overrides)
    network = build_network(config, 5).eval().requires_grad_(False)
    model = ModelConfig("m", "clustvit_t", config, ClassSet.numbered(5), InputConfig((96, 128)), overrides)
    save_model(tmp_path / "m", model, network)
    loaded = load_segmenter(tmp_path / "m").requires_grad_(False)
    assert torch.equal(loaded(images, token_capacity=9).logits, network(images, token_capacity=9).logits)
