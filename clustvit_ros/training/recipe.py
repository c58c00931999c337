"""A training recipe: everything that, with the data, fixes a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clustvit_ros.classes import ClassSet
from clustvit_ros.config import from_mapping, read_yaml
from clustvit_ros.errors import ConfigError
from clustvit_ros.modeling.architectures import network_config
from clustvit_ros.modeling.model_folder import InputConfig, ModelConfig
from clustvit_ros.training.augmentation import Augmentation


@dataclass(frozen=True)
class ClassEntry:
    """One class of the data, in the order of its id."""

    name: str
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Schedule:
    """Optimisation.

    Args:
        epochs: passes over the training images.
        batch_size: crops per step.
        learning_rate: peak of AdamW's, after a linear warm-up over `warmup` of all steps; then poly decay.
        poly_power: of the decay (1 - progress) ** poly_power.
        weight_decay: on matrices and kernels only, not on biases, norms and embeddings.
        clip_norm: largest gradient norm.
        ema_decay: of the averaged weights that are validated and shipped.
        class_weighting: weight the segmentation loss by inverse log frequency.
        kept_fractions: share of tokens kept in a step, drawn anew each step, so that one model serves the whole ladder.
        merge_after: share of all steps that run unmerged first, until the Clusterer knows something.
        validate_every: epochs between validations.
        seed: of everything random.
    """

    epochs: int
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.05
    poly_power: float = 0.9
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    class_weighting: bool = True
    kept_fractions: tuple[float, ...] = (1.0, 0.75, 0.5, 0.375, 0.25)
    merge_after: float = 0.05
    validate_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"schedule: {name} is {getattr(self, name)}, expected at least 1")
        if not self.kept_fractions or not all(0.0 < share <= 1.0 for share in self.kept_fractions):
            raise ConfigError(f"schedule: kept_fractions is {list(self.kept_fractions)}, expected shares in (0, 1]")


@dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Args:
        name: of the model.
        architecture, network: as in `model.yaml`.
        classes: of the data.
        input: as in `model.yaml`.
        augmentation, schedule: how it is trained.
        data: what the data is, for the model card.
        licence: of the data, for the model card.
    """

    name: str
    architecture: str
    classes: tuple[ClassEntry, ...]
    input: InputConfig
    augmentation: Augmentation
    schedule: Schedule
    network: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    licence: str = ""

    def model_config(self) -> ModelConfig:
        """The model that this recipe trains.

        Raises:
            ConfigError: unknown architecture or hyper-parameter.
        """
        overrides = {"image_size": list(self.input.size), **self.network}
        return ModelConfig(
            name=self.name,
            architecture=self.architecture,
            network=network_config(self.architecture, overrides),
            classes=ClassSet(tuple(c.name for c in self.classes), tuple(c.colour for c in self.classes)),
            input=self.input,
            overrides=overrides,
            licence=self.licence,
        )


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        ConfigError: unreadable, or it holds something unknown, mis-typed or out of range.
    """
    return from_mapping(Recipe, read_yaml(path), str(path))
