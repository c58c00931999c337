# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The tests of this folder share `recordings`, which is no test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def expected(tmp_path: Path) -> list[bytes]:
    """What an undisturbed run makes of the bag of FRAMES pictures."""
    pytest.importorskip("rosbags", reason="needs rosbags")
    from recordings import FRAMES, camera_bag, label, masks

    label(camera_bag(tmp_path / "plain" / "in", FRAMES), tmp_path / "plain" / "out")
    return masks(tmp_path / "plain" / "out")
