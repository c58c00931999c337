# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Data of two drives and a model that knows one of them, for scripts that score models by drives."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine import Settings, create_engine


@pytest.fixture
def drives(make_toy_model, tmp_path):
    """A model, and data on whose drive a it is right unmerged, and on b one class too many."""
    model = make_toy_model(ClassSet.numbered(3))
    engine, rng = create_engine(str(model)), np.random.default_rng(0)
    for split, drive in (("train", "a"), ("val", "b")):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for index in range(2):
            image = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (128, 96), interpolation=cv2.INTER_CUBIC)
            mask = engine.segment(image, Settings(1.0)).mask[0]
            mask = mask if drive == "a" else (mask + 1) % 3
            cv2.imwrite(str(tmp_path / f"data/{split}/images/{drive}_{index}.png"), image[..., ::-1])
            cv2.imwrite(str(tmp_path / f"data/{split}/labels/{drive}_{index}.png"), mask)
    names = json.dumps(list(ClassSet.numbered(3).names))
    (tmp_path / "data/dataset.yaml").write_text(f"classes: {names}\ngroup: '[^_]+'\n")
    return model, tmp_path / "data"
