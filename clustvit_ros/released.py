# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Weights that others have released: which there are."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clustvit_ros.classes import class_set_names
from clustvit_ros.config import from_mapping, read_yaml
from clustvit_ros.download import check_address
from clustvit_ros.errors import ConfigError
from clustvit_ros.paths import share_dir, shipped_models


@dataclass(frozen=True)
class ReleasedModel:
    """A checkpoint that its authors have released.

    Args:
        name: what it is called here.
        data: data set it was trained on, and the class list that names its classes.
        architecture: kind and size, `vit_b`, `clustvit_b` or `cts_b`; a file of another kind is refused.
        address: where the file is, http or https.
        miou: percent, as published.
        network: hyper-parameters that no shape tells, for a file without its configuration.
        config: address of the configuration that it was trained with.
        sha256: of the file; empty where its authors give none.
        note: what else a user should know.
    """

    name: str
    data: str
    architecture: str
    address: str
    miou: float
    network: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    sha256: str = ""
    note: str = ""


@dataclass(frozen=True)
class Released:
    """What `config/released.yaml` holds.

    Args:
        source: where the list is from.
        weights_terms: what the weights may be used for, as far as their authors say.
        data: terms of the data sets, and the images that scores were measured on, by name.
        models: the checkpoints.
    """

    source: str
    weights_terms: str
    data: dict[str, Any]
    models: tuple[ReleasedModel, ...]

    def terms(self, model: ReleasedModel) -> str:
        """What a model may be used for."""
        return f"{self.weights_terms}; {self.data[model.data]['terms']}"

    def split(self, model: ReleasedModel) -> str:
        """What a model's score was measured on."""
        return f"{self.data[model.data]['split']}, published"


def load_released(path: Path | None = None) -> Released:
    """The list of released models.

    Args:
        path: another file of the same form.

    Raises:
        ConfigError: it cannot be used.
    """
    path = path or share_dir() / "config" / "released.yaml"
    released = from_mapping(Released, read_yaml(path), str(path))
    taken = {folder.name for folder in shipped_models()}
    for model in released.models:
        if Path(model.name).name != model.name or model.name.startswith("."):
            raise ConfigError(f"{path}: name is {model.name!r}, expected the name of a folder")
        if model.name in taken:
            raise ConfigError(f"{path}: name is {model.name!r}, a shipped model's, or there twice; choose another one")
        taken.add(model.name)
        _check(model, released, f"{path}: {model.name}")
    return released


def _check(model: ReleasedModel, released: Released, where: str) -> None:
    about = released.data.get(model.data)
    if not isinstance(about, dict) or not {"terms", "split"} <= about.keys():
        raise ConfigError(f"{where}: data: {model.data} is missing, expected its terms and split")
    if model.data not in class_set_names():
        known = ", ".join(class_set_names())
        raise ConfigError(f"{where}: data is {model.data!r}, expected the name of a packaged class list: {known}")
    if not re.fullmatch(r"(vit|clustvit|cts)_[tsbl]", model.architecture):
        raise ConfigError(f"{where}: architecture is {model.architecture!r}, expected vit_b, clustvit_b, cts_b or such")
    if not re.fullmatch(r"([0-9a-f]{64})?", model.sha256):
        raise ConfigError(f"{where}: sha256 is {model.sha256!r}, expected 64 digits 0 to f, as sha256sum prints them")
    check_address(model.address, where)
