# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What a recorder saw, matched by time stamp, and its summary. No ROS in here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from clustvit_ros.engine.engine import OUTCOMES
from clustvit_ros.policy import percentile

_NODE_COUNTS = tuple(f"frames_{fate}" for fate in ("received", "dropped", "over_rate", *OUTCOMES))


@dataclass
class RecordedFrame:
    """Everything that carried one time stamp.

    Args:
        stamp_ns: the frame's header stamp, nanoseconds of ROS time.
        latency_ms: from that stamp to the mask's arrival here; None while no mask came.
        mask: file name of the mask below the output folder, or None.
        overlay: likewise of the overlay.
        image: likewise of the camera's picture.
        ground_truth: likewise of the true classes.
        clusters: likewise of the clusters.
        stats: the node's statistics of this frame.
    """

    stamp_ns: int
    latency_ms: float | None = None
    mask: str | None = None
    overlay: str | None = None
    image: str | None = None
    ground_truth: str | None = None
    clusters: str | None = None
    stats: dict[str, str] = field(default_factory=dict)


class Manifest:
    """The lines that a camera node writes: which picture became the message of which stamp.

    Args:
        path: the file; it may still be growing, or not exist yet. None knows no picture.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._rest = ""
        self._entries: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        self._read()
        return len(self._entries)

    def find(self, stamp_ns: int) -> dict[str, Any]:
        """The entry of a stamp (`stamp_ns`, `index`, `name`); empty when there is none."""
        if stamp_ns not in self._entries:
            self._read()
        return self._entries.get(stamp_ns, {})

    def _read(self) -> None:
        if self._path is None or (self._file is None and not self._path.exists()):
            return
        if self._file is None:
            self._file = self._path.open(encoding="utf-8")
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            entry = json.loads(line)
            self._entries[entry["stamp_ns"]] = entry


class Recording:
    """Matches masks, overlays and statistics by stamp.

    Args:
        manifest: names the pictures.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._frames: dict[int, RecordedFrame] = {}
        self._first_mask_s = self._last_mask_s = 0.0
        self.images = 0
        self.masks = 0
        self.overlays = 0

    def file_stem(self, stamp_ns: int) -> str:
        """How files of this frame are called: the picture's place and name, or the stamp."""
        entry = self._manifest.find(stamp_ns)
        return f"{entry['index']:06d}_{Path(entry['name']).stem}" if entry else str(stamp_ns)

    def add_mask(self, stamp_ns: int, latency_ms: float, now_s: float, file: str | None) -> None:
        """A mask came.

        Args:
            stamp_ns: its header stamp.
            latency_ms: stamp to arrival.
            now_s: monotonic seconds.
            file: where it is saved, if it is.
        """
        record = self._record(stamp_ns)
        record.latency_ms, record.mask = latency_ms, file
        self.masks += 1
        self._first_mask_s = self._first_mask_s or now_s
        self._last_mask_s = now_s

    def add_overlay(self, stamp_ns: int, file: str | None) -> None:
        """An overlay came."""
        self._record(stamp_ns).overlay = file
        self.overlays += 1

    def add_file(self, stamp_ns: int, kind: str, file: str) -> None:
        """A picture of `kind` (image, ground_truth, clusters) came and is saved as `file`."""
        setattr(self._record(stamp_ns), kind, file)

    def add_stats(self, stamp_ns: int, pairs: dict[str, str]) -> None:
        """The node's statistics of a frame came."""
        self._record(stamp_ns).stats = pairs

    def summary(self, ended_by: str) -> dict[str, Any]:
        """Everything, ready for JSON.

        Args:
            ended_by: why the recording ended.
        """
        frames = [self._frames[stamp] for stamp in sorted(self._frames)]
        with_stats = [frame for frame in frames if frame.stats]
        newest = with_stats[-1].stats if with_stats else {}
        elapsed_s = self._last_mask_s - self._first_mask_s
        return {
            "ended_by": ended_by, "frames_sent": len(self._manifest) or None, "images_received": self.images,
            "masks_received": self.masks, "overlays_received": self.overlays,
            "node": {name: int(newest[name]) for name in _NODE_COUNTS if name in newest},
            "fps": (self.masks - 1) / elapsed_s if elapsed_s > 0 else None,
            "latency_ms": _distribution([frame.latency_ms for frame in frames if frame.latency_ms is not None]),
            "engine_ms": _distribution([float(frame.stats["engine_ms"]) for frame in with_stats]),
            "frames": [self._frame_entry(frame) for frame in frames],
        }  # fmt: skip

    def _frame_entry(self, frame: RecordedFrame) -> dict[str, Any]:
        return {**self._manifest.find(frame.stamp_ns), **vars(frame)}

    def _record(self, stamp_ns: int) -> RecordedFrame:
        return self._frames.setdefault(stamp_ns, RecordedFrame(stamp_ns))


def _distribution(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p95, p99 = (percentile(values, share) for share in (0.5, 0.95, 0.99))
    return {"mean": float(np.mean(values)), "p50": p50, "p95": p95, "p99": p99, "max": float(np.max(values))}
