# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Masks are matched with pictures by stamp, also while the manifest is still being written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clustvit_ros.demo.recording import Manifest, Recording


def test_manifest_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    manifest = Manifest(path)
    assert manifest.find(1) == {}
    with path.open("w") as file:
        file.write(json.dumps({"stamp_ns": 1, "index": 0, "name": "a.jpg"}) + "\n" + '{"stamp_ns": 2, ')
        file.flush()
        assert manifest.find(1)["name"] == "a.jpg"
        assert manifest.find(2) == {}
        file.write('"index": 1, "name": "b.jpg"}\n')
        file.flush()
        assert manifest.find(2)["name"] == "b.jpg"
    assert len(manifest) == 2


def test_summary_joins_everything_by_stamp(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps({"stamp_ns": n, "index": n, "name": f"p{n}.jpg"}) + "\n" for n in range(4)))
    recording = Recording(Manifest(path))
    assert recording.file_stem(3) == "000003_p3"
    assert recording.file_stem(77) == "77"
    for stamp_ns, latency_ms in ((2, 30.0), (0, 10.0)):
        recording.add_mask(stamp_ns, latency_ms, now_s=100.0 + (2 - stamp_ns), file=f"masks/{stamp_ns}.png")
    recording.add_overlay(2, "overlays/2.jpg")
    recording.add_stats(2, {"engine_ms": "7.5", "frames_received": "3", "frames_dropped": "1"})
    recording.images = 4
    summary = recording.summary("idle")
    assert summary["frames_sent"] == 4
    assert summary["images_received"] == 4
    assert summary["masks_received"] == 2
    assert summary["node"] == {"frames_received": 3, "frames_dropped": 1}
    assert summary["latency_ms"]["p50"] == pytest.approx(10.0)  # one that occurred
    assert summary["engine_ms"]["mean"] == pytest.approx(7.5)
    assert summary["fps"] == pytest.approx(0.5)
    assert [frame["name"] for frame in summary["frames"]] == ["p0.jpg", "p2.jpg"]
    assert summary["frames"][1]["mask"] == "masks/2.png"
    assert summary["frames"][1]["overlay"] == "overlays/2.jpg"
    json.dumps(summary)


def test_empty_recording_has_a_summary() -> None:
    summary = Recording(Manifest(None)).summary("start_timeout_s")
    assert summary["masks_received"] == 0
    assert summary["latency_ms"] is None
    assert summary["frames_sent"] is None
