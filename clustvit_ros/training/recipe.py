# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A training recipe: everything that, with the data, fixes a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from clustvit_ros.classes import IGNORE_INDEX, ClassEntry, ClassSet, write_out_classes
from clustvit_ros.config import check_kind, from_mapping, read_yaml, to_mapping
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.architectures import build_network, network_config, plain_twin
from clustvit_ros.networks.model_folder import InputConfig, ModelConfig, load_config
from clustvit_ros.networks.vit_config import ViTConfig
from clustvit_ros.training.augmentation import Augmentation
from clustvit_ros.training.optimisation import Optimisation


@dataclass(frozen=True)
class Schedule(Optimisation):
    """Training of a segmentation network.

    Args:
        class_weighting: weight the segmentation loss by inverse log frequency.
        ohem_share: share of each crop's labelled pixels, the hardest, that count in the segmentation loss; 1 is all.
        lovasz_weight: weight of the Lovász-Softmax loss, which optimises IoU itself; 0 turns it off.
        kept_fractions: share of tokens kept in a step, drawn anew each step, so that one model serves the whole ladder.
        merge_thresholds: thresholds that are drawn as well; such a step merges what the Clusterer wants merged.
        input_scales: side of the network's input relative to the crop, drawn anew each step, so that one model serves
            several input sizes; repeat a value to draw it more often.
        merge_after: share of all steps that run unmerged first, until the Clusterer knows something.
        distillation_weight: weight of the divergence between the result of a step that merges or sees a smaller input,
            and the same network's unmerged one at full size, which is then computed and supervised in the same step; 0
            turns it off.
        distillation_temperature: softens both sides of that divergence.
        teacher: whose unmerged result at full size that is: "self", the network's own; or "init", that of the weights
            which training starts from, as they were, so that other sizes are learnt and the full one does not change.
        teachers: further models, folders or shipped names, of the same classes and normalisation, whose mean unmerged
            result at full size is learnt as well, with `distillation_weight`.
        trains: "all", or "merging": Clusterers and Regenerators, or a policy network, alone, while the plain ViT around
            them stays as it is.
        validate_every: epochs between validations.
    """

    class_weighting: bool = True
    ohem_share: float = 1.0
    lovasz_weight: float = 0.0
    kept_fractions: tuple[float, ...] = (1.0, 0.75, 0.5, 0.375, 0.25)
    merge_thresholds: tuple[float, ...] = ()
    input_scales: tuple[float, ...] = (1.0,)
    merge_after: float = 0.05
    distillation_weight: float = 0.0
    distillation_temperature: float = 2.0
    teacher: Literal["self", "init"] = "self"
    teachers: tuple[str, ...] = ()
    trains: Literal["all", "merging"] = "all"
    validate_every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("at least 1", {"validate_every": self.validate_every >= 1})
        self._require("in (0, 1]", {"ohem_share": 0.0 < self.ohem_share <= 1.0})
        self._require("in [0, 1]", {"merge_after": 0.0 <= self.merge_after <= 1.0})
        self._require("0 or above", {n: getattr(self, n) >= 0 for n in ("lovasz_weight", "distillation_weight")})
        self._require("above 0", {"distillation_temperature": self.distillation_temperature > 0})
        if not self.kept_fractions + self.merge_thresholds or not all(0.0 < s <= 1.0 for s in self.kept_fractions):
            raise ConfigError(f"schedule: kept_fractions is {list(self.kept_fractions)}, expected shares in (0, 1]")
        if not all(0.0 <= threshold <= 1.0 for threshold in self.merge_thresholds):
            raise ConfigError(
                f"schedule: merge_thresholds is {list(self.merge_thresholds)}, expected numbers in [0, 1]"
            )
        if not self.input_scales or not all(0.0 < scale <= 1.0 for scale in self.input_scales):
            raise ConfigError(f"schedule: input_scales is {list(self.input_scales)}, expected numbers in (0, 1]")
        if self.teacher == "init" and (self.distillation_weight == 0 or self.trains == "merging"):
            raise ConfigError(
                "schedule: teacher is 'init', expected a distillation_weight above 0, and trains 'all': else nothing "
                "is learnt from it"
            )
        if self.teachers and self.distillation_weight == 0:
            raise ConfigError(
                f"schedule: teachers is {list(self.teachers)}, expected a distillation_weight above 0: else nothing is "
                "learnt from them"
            )
        if self.trains == "merging" and self.input_scales != (1.0,):
            raise ConfigError(
                f"schedule: input_scales is {list(self.input_scales)} where trains is 'merging', expected [1]: what "
                "sees the input is frozen"
            )


@dataclass(frozen=True)
class Pretraining(Optimisation):
    """Masked auto-encoding of unlabelled images (He et al., arXiv 2111.06377).

    Args:
        crop_size: (height, width) in pixels; (0, 0) is the augmentation's.
        mask_ratio: share of patches that the encoder does not see.
        decoder_dim, decoder_depth: width and blocks of the decoder, which is thrown away afterwards.
        save_every: epochs between encoder files.
    """

    learning_rate: float = 1.5e-3
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    crop_size: tuple[int, int] = (0, 0)
    mask_ratio: float = 0.75
    decoder_dim: int = 128
    decoder_depth: int = 2
    save_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("in (0, 1)", {"mask_ratio": 0.0 < self.mask_ratio < 1.0})
        self._require("at least 1", {n: getattr(self, n) >= 1 for n in ("decoder_depth", "save_every")})
        self._require("a positive multiple of 32", {"decoder_dim": self.decoder_dim > 0 and not self.decoder_dim % 32})

    @property
    def _section(self) -> str:
        return "pretraining"


@dataclass(frozen=True)
class DataSource:
    """One data set of a joint training: all share encoder and decoder.

    Each has a classifier of its own, except where `means` translates its labels.

    Args:
        name: what `--data NAME=DIR` calls it.
        weight: its share of the crops, relative to the others'.
        classes: as in the recipe; may be left out where the data set names its classes itself, and for the first one.
        about: what the data is, for the model card.
        means: which of the model's own classes each of its classes may be; one that is left out is void.
    """

    name: str
    weight: float = 1.0
    classes: tuple[ClassEntry, ...] = ()
    about: str = ""
    means: dict[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"data: weight of {self.name} is {self.weight}, expected above 0")

    def meanings(self, own: Sequence[str]) -> list[list[int]] | None:
        """Ids of the model's own classes that each of these may be; None where they have a classifier of their own.

        Raises:
            ConfigError: `means` names a class that there is not, or nothing means anything, or one class everything.
        """
        if self.means is None:
            return None
        names = [entry.name for entry in self.classes]
        meant = [name for may_be in self.means.values() for name in may_be]
        for side, known, named in (("its", names, list(self.means)), ("the model's", own, meant)):
            unknown = [name for name in named if name not in known]
            if unknown:
                raise ConfigError(
                    f"data: {self.name}: means: {unknown[0]!r} is none of {side} classes, {', '.join(known)}"
                )
        vague = [name for name, may_be in self.means.items() if set(own) <= set(may_be)]
        if vague:
            raise ConfigError(f"data: {self.name}: means: {vague[0]!r} may be any class, which teaches nothing")
        if not any(self.means.values()):
            raise ConfigError(f"data: {self.name}: means: every class is void, expected some of {', '.join(own)}")
        return [[own.index(may_be) for may_be in self.means.get(name, ())] for name in names]


@dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Args:
        name: name of the model.
        architecture, network: as in `model.yaml`. In a file, `architecture: init` is that of the model that training
            starts from, with its network, and its classes and input where the file has none; a plain ViT becomes a
            ClustViT.
        classes: classes of the data, as a list or by the name of a list in `config/classes`; may be left out, or empty,
            where the data set names its classes itself.
        input: as in `model.yaml`.
        augmentation, schedule: how it is trained.
        pretraining: settings of `clustvit-ros pretrain`.
        init: weights to start from: a model folder, an encoder of `clustvit-ros pretrain`, or ViT weights of timm
            or mmsegmentation; empty starts from random ones.
        data: what the data is, for the model card; or, for a joint training, the data sets, the model's own first. Only
            what was learnt for the first is kept at the end.
        licence: licence of the data, for the model card.
    """

    name: str
    architecture: str
    input: InputConfig
    augmentation: Augmentation
    schedule: Schedule
    classes: tuple[ClassEntry, ...] = ()
    network: dict[str, Any] = field(default_factory=dict)
    pretraining: Pretraining | None = None
    init: str = ""
    data: str | tuple[DataSource, ...] = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ConfigError(f"recipe: name is {self.name!r}, expected the name of a folder, which its model gets")
        names = [source.name for source in self.sources]
        if self.data == ():
            raise ConfigError(f"recipe {self.name}: data is an empty list; name data sets, or leave it out")
        if len(set(names)) < len(names):
            raise ConfigError(f"recipe {self.name}: data: names are {', '.join(names)}, expected each once")
        if names and self.sources[0].classes not in ((), self.classes):
            raise ConfigError(f"recipe {self.name}: data: {names[0]}, the first, lists classes of its own; drop them")
        if names and self.sources[0].means is not None:
            raise ConfigError(f"recipe {self.name}: {names[0]}, the first, has the model's classes; leave means out")
        if len(names) > 1 and self.schedule.teacher == "init":
            raise ConfigError(
                f"recipe {self.name}: teacher is 'init', which knows nothing of {', '.join(names[1:])}; expected 'self'"
            )
        if self.schedule.teacher == "init" and not self.init:
            raise ConfigError(f"recipe {self.name}: teacher is 'init', and there is none; name weights to start from")

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The data sets of a joint training; empty where there is one without a name."""
        return self.data if isinstance(self.data, tuple) else ()

    @property
    def about_data(self) -> str:
        """What the data is, for people."""
        return self.data if isinstance(self.data, str) else "; ".join(s.about or s.name for s in self.data)

    def folders(self, arguments: Sequence[str]) -> list[Path]:
        """Folders of the data sets that a recipe learns from, the model's own first.

        Raises:
            ConfigError: a data set without a folder, or a folder for which the recipe has no classifier.
        """
        names = [source.name for source in self.sources]
        folders: dict[str, Path] = {}
        for argument in arguments:
            name, separator, folder = argument.partition("=")
            if not separator or Path(argument).is_dir():
                name, folder = next(iter(names), ""), argument
            if name in folders:
                raise ConfigError(f"--data: got {folders[name]} and {folder}, expected one folder for each data set")
            folders[name] = Path(folder)
        expected = names or [""]
        unknown = [name for name in folders if name not in expected]
        if unknown:
            raise ConfigError(
                f"--data: got {unknown[0]}={folders[unknown[0]]}, and recipe {self.name} has no classifier for "
                f"{unknown[0]}; its data names {', '.join(names) or 'no data sets'}"
            )
        missing = [name for name in expected if name not in folders]
        if missing:
            raise ConfigError(
                f"--data: recipe {self.name} learns from {' and '.join(names)}, got {' and '.join(folders)} alone; "
                f"expected {' '.join(f'{name}=DIR' for name in missing)} as well"
            )
        return [folders[name] for name in expected]

    def with_classes(self, classes: ClassSet | None, *further: ClassSet | None) -> Recipe:
        """This recipe with the class lists of its data.

        Args:
            classes: as the data set states them; None where it states none.
            further: the same of a joint training's other data sets.

        Raises:
            ConfigError: neither states them, they differ, they are too many together, or the head cannot tell some
                without the others.
        """
        recipe = dataclasses.replace(self, classes=_agreed(f"recipe {self.name}", self.classes, classes))
        if not further:
            return recipe
        own, *others = self.sources
        others = [
            dataclasses.replace(s, classes=_agreed(f"recipe {self.name}: data: {s.name}", s.classes, stated))
            for s, stated in zip(others, further, strict=True)
        ]
        with torch.device("meta"):
            head = build_network(recipe.model_config().network, len(recipe.classes)).head
        if not isinstance(getattr(head, "classify", None), (nn.Linear, nn.Conv2d)):
            raise ConfigError(
                f"recipe {self.name}: data: its head scores classes against each other, so that none can be left out "
                "later; a joint training needs head detail, linear or upernet"
            )
        for source in others:
            source.meanings([entry.name for entry in recipe.classes])
        total = sum(len(classes) for classes in (recipe.classes, *(source.classes for source in others)))
        if total > IGNORE_INDEX:
            raise ConfigError(f"recipe {self.name}: data: got {total} classes together, expected up to {IGNORE_INDEX}")
        return dataclasses.replace(recipe, data=(own, *others))

    def without_merging(self) -> Recipe:
        """The recipe of this ClustViT's plain ViT twin: everything alike, `_vit` behind its name.

        Raises:
            ConfigError: the architecture is no ClustViT, or nothing but merging is trained.
        """
        architecture, network = plain_twin(self.architecture, self.network)
        if self.schedule.trains == "merging":
            raise ConfigError(
                f"recipe {self.name}: trains is 'merging', which leaves its plain ViT twin nothing to learn; it is the "
                f"model that this one starts from ({self.init or 'no init'})"
            )
        schedule = self.schedule
        if schedule.teacher == "self" and schedule.input_scales == (1.0,) and not schedule.teachers:
            # What is distilled is the merged pass, and there is none.
            schedule = dataclasses.replace(schedule, distillation_weight=0.0)
        return dataclasses.replace(
            self, name=f"{self.name}_vit", architecture=architecture, network=network, schedule=schedule
        )

    def model_config(self) -> ModelConfig:
        """The model that this recipe trains.

        Raises:
            ConfigError: unknown architecture or hyper-parameter, or no classes.
        """
        overrides = {"image_size": list(self.input.size), **self.network}
        return ModelConfig(
            name=self.name, architecture=self.architecture, network=network_config(self.architecture, overrides),
            classes=ClassSet.of(self.classes), input=self.input, overrides=overrides, licence=self.licence,
        )  # fmt: skip


def _as_its_init(content: dict[str, Any], where: str) -> dict[str, Any]:
    """What a recipe's sections become whose architecture is that of the model that it starts from."""
    if not content.get("init") or Path(content["init"]).is_file():  # weights alone do not say of what network
        raise ConfigError(f"{where}: architecture is that of the model to start from; name one, e.g. --init MODEL")
    model, wanted = load_config(content["init"]), content.get("network") or {}
    architecture = model.architecture
    if isinstance(model.network, ViTConfig):
        if model.network.backbone == "vit" and wanted.get("merging", "clusters") == "clusters":
            architecture = f"clust{architecture}"
    elif "merging" in wanted or (content.get("schedule") or {}).get("trains") == "merging":
        raise ConfigError(f"--init: {content['init']} is a {architecture}, expected a vit or clustvit for this recipe")
    overrides = {name: value for name, value in model.overrides.items() if name not in ("merging", "image_size")}
    return {
        "architecture": architecture, "network": {**overrides, **wanted},
        "classes": content.get("classes", model.classes.entries()),
        "input": content.get("input") or {name: list(value) for name, value in to_mapping(model.input).items()},
        "augmentation": {"crop_size": list(model.input.size), **(content.get("augmentation") or {})},
    }  # fmt: skip


def _agreed(where: str, written: tuple[ClassEntry, ...], stated: ClassSet | None) -> tuple[ClassEntry, ...]:
    """The class list that a recipe writes and a data set states; either may leave it out."""
    if stated is None and not written:
        raise ConfigError(
            f"{where}: classes is missing, and the data set names none; list them in its dataset.yaml, in the order of "
            "their ids (classes: [sky, road, car]), or in the recipe"
        )
    if stated is None:
        return written
    if not written:
        return tuple(ClassEntry(n, c) for n, c in zip(stated.names, stated.colours, strict=True))
    if tuple(entry.name for entry in written) != stated.names:
        raise ConfigError(
            f"{where}: its class list differs from the data set's: got {', '.join(entry.name for entry in written)}; "
            f"expected {', '.join(stated.names)}; leave classes out of the recipe to take the data set's"
        )
    return written


def read_recipe(path: Path, init: str | None = None) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: the file.
        init: weights to start from, instead of the file's.

    Raises:
        ConfigError: unreadable, or it holds something unknown, mis-typed or out of range.
        ModelError: the architecture is that of a model that there is not.
    """
    content = read_yaml(path)
    if init is not None:
        content["init"] = init
    for key, kind in {"init": str, "network": dict, "augmentation": dict, "input": dict}.items():
        check_kind(kind, content.get(key), f"{path}: {key}")
    if content.get("architecture") == "init":
        content |= _as_its_init(content, str(path))
    sources = content["data"] if isinstance(content.get("data"), list) else []
    for section in filter(lambda part: isinstance(part, dict), [content, *sources]):
        write_out_classes(section, str(path), named=True)
    return from_mapping(Recipe, content, str(path))
