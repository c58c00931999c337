# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Streaming mIoU: what a consumer holds, on a timeline and on frames whose masks are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustvit_ros.cli.main import main
from clustvit_ros.engine import ScriptedEngine, Settings
from clustvit_ros.measure.streaming import MOST_AGE, age_curves, sources, stream


@pytest.mark.parametrize(
    ("latency_ms", "held", "filled"),
    [
        (20.0, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),  # in time for its own frame
        # Taken at 0, done at 60 (frame 1's period ends at 66); then frame 1, done at 120, frame 3 at 180.
        (60.0, [None, 0, 0, 1, 1, 3], [None, 0, 0, 0, 1, 1]),
        (400.0, [None] * 6, [None] * 6),
    ],
)
def test_what_is_held_follows_from_the_engines_latency(
    latency_ms: float, held: list[int | None], filled: list[int | None]
) -> None:
    assert sources(6, 100 / 3, latency_ms) == (held, filled)


@given(st.integers(1, 60), st.floats(1.0, 100.0), st.floats(0.1, 500.0))
def test_nobody_holds_what_does_not_exist_yet(count: int, period_ms: float, latency_ms: float) -> None:
    held, filled = sources(count, period_ms, latency_ms)
    for index, (old, carried) in enumerate(zip(held, filled, strict=True)):
        assert (old is None) == (carried is None)
        if old is not None and carried is not None:
            assert carried <= old <= index
            assert old * period_ms + latency_ms <= (index + 1) * period_ms + 1e-6
    known = [source for source in held if source is not None]
    assert known == sorted(known)


def frames(count: int, step: int = 4) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A textured plane that moves; labels are the scripted engine's bands of brightness, before texture."""
    rng = np.random.default_rng(0)
    fine = cv2.GaussianBlur(rng.normal(0.0, 1.0, (160, 400)).astype(np.float32), (0, 0), 2.0)
    broad = cv2.GaussianBlur(rng.normal(0.0, 1.0, (160, 400)).astype(np.float32), (0, 0), 16.0)
    bands = np.digitize(broad, np.quantile(broad, (0.25, 0.5, 0.75)))
    grey = (64 * bands + 32 + np.clip(9 * fine / fine.std(), -28, 28)).astype(np.uint8)
    cut = [np.s_[10:130, step * i : step * i + 160] for i in range(count)]
    return [np.repeat(grey[c][..., None], 3, axis=2) for c in cut], [bands[c].astype(np.uint8) for c in cut]


def test_filling_is_worth_what_age_costs() -> None:
    images, labels = frames(30)
    slow, fast = stream(
        ScriptedEngine(lambda _call, kept, total: 100.0 * kept / total), images, labels,
        [Settings(1.0), Settings(1.0, input_scale=0.375)], 30.0,
    )  # fmt: skip
    assert slow.fresh == 100.0 and slow.held < slow.filled - 20 and slow.filled > 80
    # In time for every frame, a smaller input streams better than a better mask that is late.
    assert fast.fresh == fast.held == fast.filled > slow.filled and fast.best and not slow.best


def test_interrupted_it_gives_what_it_has() -> None:
    images, labels = frames(10)
    segmented = 0

    def latency_ms(call: int, kept: int, total: int) -> float:
        nonlocal segmented
        segmented += 1
        if segmented > 18:
            raise KeyboardInterrupt
        return 1.0

    settings = [Settings(1.0), Settings(0.5)]
    rows = stream(ScriptedEngine(latency_ms), images, labels, settings, 30.0)
    assert [row.merge_threshold for row in rows] == [1.0] and rows[0].best
    with pytest.raises(KeyboardInterrupt):
        stream(ScriptedEngine(latency_ms), images, labels, settings, 30.0)


def test_masks_lose_with_age_and_less_when_carried() -> None:
    images, labels = frames(20)
    engine = ScriptedEngine()
    curves = age_curves(images, labels, [engine.segment(image) for image in images], 4)
    assert {name: len(values) for name, values in curves.items()} == dict.fromkeys(curves, MOST_AGE + 1)
    assert curves["stale"][0] == curves["carried"][0] == curves["fresh"][0] == 100.0
    assert curves["stale"] == sorted(curves["stale"], reverse=True)
    assert curves["stale"][4] < curves["carried"][4] - 10 and curves["carried"][8] > 80


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    images, labels = frames(12)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        cv2.imwrite(str(tmp_path / "images" / f"{index:03}.png"), image)
        cv2.imwrite(str(tmp_path / "labels" / f"{index:03}.png"), np.minimum(label, 2))
    return tmp_path


def test_the_command_compares_settings_and_draws(model_dir: Path, drive: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["tune", "--model", str(model_dir), "--images", str(drive / "images"), "--device", "cpu", "--streaming"]
    outputs = ["--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    assert main([*arguments, "20", "--labels", str(drive / "labels"), *outputs]) == 0
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["rate_hz"] == 20 and report["images"] == 12 and len(report["rows"]) >= 12
    assert sum(row["best"] for row in report["rows"]) >= 1
    assert len(report["miou_over_age"]["carried"]) == MOST_AGE + 1
    assert cv2.imread(str(tmp_path / "s.png")) is not None
    assert "without fill_frames, the best is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "expected labels for every frame"),
        (["--labels", "LABELS", "--limit", "5"], "got 5 images of 1 sizes, expected more than 8 consecutive frames"),
        (["--labels", "LABELS", "--write"], "expected one of them"),
    ],
)
def test_what_cannot_be_a_stream_is_refused(
    extra: list[str], message: str, model_dir: Path, drive: Path, capsys: Any
) -> None:
    extra = [str(drive / "labels") if text == "LABELS" else text for text in extra]
    command = ["tune", "--model", str(model_dir), "--images", str(drive / "images"), "--device", "cpu", "--streaming"]
    assert main([*command, *extra]) == 2
    assert message in capsys.readouterr().err


def test_a_rate_must_be_one(model_dir: Path, drive: Path, capsys: Any) -> None:
    for rate in ("0", "-5", "nan"):
        assert main(["tune", "--model", str(model_dir), "--images", str(drive / "images"), "--streaming", rate]) == 2
        assert "--streaming: got" in capsys.readouterr().err


def test_the_simulated_drive_needs_a_model_of_its_classes(model_dir: Path, capsys: Any) -> None:
    pytest.importorskip("panda3d", reason="needs panda3d (the 'sim' extra)")
    assert main(["tune", "--model", str(model_dir), "--images", "sim:3", "--streaming"]) == 2
    assert "expected one of the simulated world's classes" in capsys.readouterr().err
