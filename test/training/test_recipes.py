# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Recipes that come with the package, and the tables that explain them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from clustvit_ros.classes import ClassSet, load_class_set
from clustvit_ros.errors import ConfigError
from clustvit_ros.measure.flops import count_cost
from clustvit_ros.networks.architectures import without_merging
from clustvit_ros.networks.model_folder import load_config
from clustvit_ros.training.augmentation import Augmentation
from clustvit_ros.training.recipe import Pretraining, Schedule, read_recipe

FOLDER = Path(__file__).resolve().parents[2] / "config" / "train"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def table(title: str) -> list[list[str]]:
    section = README.split(f"\n### {title}\n")[1].split("\n### ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    return rows[1:]


def shown(default) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if isinstance(default, tuple):
        return "`[" + ", ".join(f"{value:g}" for value in default) + "]`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if isinstance(default, str) else f"`{default:g}`"


@pytest.mark.parametrize(
    ("title", "section"), [("schedule", Schedule), ("augmentation", Augmentation), ("pretraining", Pretraining)]
)
def test_tables_state_every_key_and_its_default(title, section):
    stated = {row[0]: row[1] for row in table(title)}
    assert stated == {f"`{field.name}`": shown(field.default) for field in dataclasses.fields(section)}
    assert all(row[2] for row in table(title))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_can_be_read_and_are_explained(path):
    recipe = read_recipe(path, "camvid_tiny" if path.stem == "add_merging" else None)
    if not recipe.classes:  # its data names them
        recipe = recipe.with_classes(load_class_set("sim"))
    recipe.model_config()
    assert path.name in README
    patch_size = recipe.model_config().network.patch_size
    sides = recipe.augmentation.crop_size + recipe.input.size
    assert not any(side % patch_size for side in sides), "crops and input are whole patches"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_start_from_what_ships_or_from_another_recipe_s_model(path):
    start = "" if path.stem == "add_merging" else read_recipe(path).init
    stage = re.fullmatch(r"runs/(\w+)/model", start)
    if stage:
        before = read_recipe(FOLDER / f"{stage[1]}.yaml")
        assert before.name == stage[1], "or its model would lie elsewhere"
    else:
        assert not start or load_config(start)


@pytest.mark.parametrize("model", ["camvid_tiny", "camvid_clustr", "offroad_tiny", "sim_tiny"])
def test_finetuning_keeps_the_network_that_it_starts_from(model):
    recipe, start = read_recipe(FOLDER / "finetune.yaml", model), load_config(model)
    other = recipe.with_classes(ClassSet.numbered(3)).model_config()
    same = recipe.with_classes(start.classes).model_config()
    assert len(other.classes) == 3 and same.classes.names == start.classes.names
    assert same.input.size == other.input.size == start.input.size
    seen = {"drop_path": 0.0, "image_size": start.input.size}  # positions are fitted to the size that is trained
    assert len({dataclasses.replace(config.network, **seen) for config in (same, start)}) == 1


def test_the_family_learns_alike_and_costs_alike():
    """Four systems differ in architecture alone, and the narrow ClusTR takes no more operations than the ViT."""
    recipes = {kind: read_recipe(FOLDER / f"family_{kind}.yaml") for kind in ("clustvit", "clustr", "cast")}
    own = {"name": "any", "architecture": "vit_t", "network": {}}
    assert len({repr(dataclasses.replace(recipe, **own)) for recipe in recipes.values()}) == 1
    vit = recipes["clustvit"].without_merging().model_config().network
    narrow = recipes["clustr"].model_config().network
    for size in ((224, 288), (352, 480), (512, 512)):
        assert count_cost(narrow, 11, size).flops < count_cost(vit, 11, size).flops


def test_merging_still_pays_where_more_of_the_network_is_convolutions():
    """At least 60 % of the operations of the unmerged network can be merged away."""
    recipe = read_recipe(FOLDER / "offroad_tiny.yaml")
    network = recipe.model_config().network
    unmerged, merged = (count_cost(network, 8, (352, 480), 1, tokens).flops for tokens in (660, 1))
    assert merged <= 0.4 * unmerged


def test_classes_may_be_named_instead_of_listed(tmp_path):
    recipe = (FOLDER / "camvid_tiny.yaml").read_text(encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.replace("classes: camvid", "classes: cityscapes"), encoding="utf-8")
    known = load_class_set("cityscapes")
    assert read_recipe(path).model_config().classes == known
    path.write_text(recipe.replace("classes: camvid", "classes: moonscapes"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: classes: got 'moonscapes', expected one of ade20k, camvid"):
        read_recipe(path)


@pytest.mark.parametrize(
    "name", ["camvid_tiny_stage4", "camvid_tiny_stage3", "camvid_tiny_gpu", "camvid_small_gpu", "cwfid_tiny"]
)
def test_twins_differ_in_nothing_but_merging(name):
    merging = read_recipe(FOLDER / f"{name}.yaml")
    plain = merging.without_merging()
    assert plain.name == f"{merging.name}_vit" and plain.architecture == merging.architecture.removeprefix("clust")
    assert plain.schedule == dataclasses.replace(merging.schedule, distillation_weight=0.0)
    same = {field.name: getattr(merging, field.name) for field in dataclasses.fields(merging)}
    for changed in ("name", "architecture", "network", "schedule"):
        same.pop(changed)
    assert same == {key: getattr(plain, key) for key in same}
    network = plain.model_config().network
    assert not network.merges and network == without_merging(merging.model_config().network)
    assert not {"injection_point", "cluster_mlp_dim"} & plain.network.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../camvid"}, "name is '../camvid', expected the name of a folder"),
        ({"name": ""}, "name is '', expected the name of a folder"),
        ({"init": 5}, "init: got 5 (int), expected str"),
        ({"init": ["camvid_tiny"]}, "init: got ['camvid_tiny'] (list), expected str"),
        ({"architecture": "init", "init": "camvid_tiny", "network": "deep"}, "network: got 'deep' (str), expected"),
        ({"architecture": "init", "init": "camvid_tiny", "augmentation": [1]}, "augmentation: got [1] (list)"),
        ({"classes": 7}, "classes: got 7 (int), expected a list, each key: value pairs"),
        ({"data": 5}, "data: got 5 (int), expected a list, each key: value pairs"),
        ({"data": [{"name": "a", "means": {"x": "y"}}]}, "means: x: got 'y' (str), expected a list, each str"),
        ({"input": {"size": [96]}}, "input: size: got [96] (list), expected a list of 2: int, int"),
        ({"network": {"drop_path": 7.0}}, "drop_path is 7.0, expected 0 or above, and below 1"),
    ],
)
def test_what_a_recipe_cannot_hold_is_one_message(tmp_path, change, message):
    content = yaml.safe_load((FOLDER / "camvid_tiny_stage1.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, **change}), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_recipe(path).model_config()


def test_numbers_with_exponents_and_classes_by_name_are_read(tmp_path):
    """YAML takes 1e-3 for text, and a class needs no colour of one's own."""
    content = yaml.safe_load((FOLDER / "finetune.yaml").read_text())
    text = yaml.safe_dump({**content, "classes": ["grass", "path"]})
    (tmp_path / "a.yaml").write_text(re.sub(r"learning_rate: [\d.]+", "learning_rate: 1e-3", text))
    recipe = read_recipe(tmp_path / "a.yaml")
    assert recipe.schedule.learning_rate == 0.001
    assert [entry.name for entry in recipe.classes] == ["grass", "path"]


def test_merging_is_added_to_no_clustr():
    with pytest.raises(ConfigError, match="--init: camvid_clustr is a clustr_t, expected a vit or clustvit"):
        read_recipe(FOLDER / "add_merging.yaml", "camvid_clustr")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("schedule", "seed", 1 << 64, "seed"), ("augmentation", "crop_size", [100_000, 100_000], "at most 16777216"),
        ("augmentation", "blur_px", 1e6, "blur_px is 1000000.0, expected 0 to 1000"),
        ("augmentation", "scale", [1e-9, 1e9], "from 0.01 to 100"),
    ],
)  # fmt: skip
def test_values_that_no_memory_holds_are_refused(section, key, value, message, tmp_path):
    content = yaml.safe_load((FOLDER / "family_cast.yaml").read_text())
    content[section][key] = value
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "a.yaml")
