# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What has been labelled so far, kept in a database that survives a kill at any moment.

Every frame is one row under its number, so that nothing is there twice, and a run that was cut short continues where
the last committed row ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustvit_ros.errors import BagError, ConfigError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (identity TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS frames (
  number INTEGER PRIMARY KEY, topic TEXT NOT NULL, timestamp_ns INTEGER NOT NULL, sec INTEGER, nanosec INTEGER,
  frame_id TEXT, mask BLOB, confidence BLOB, stats TEXT, device TEXT, problem TEXT
);
"""
_COMMIT_PERIOD_S = 1.0


@dataclass(frozen=True)
class LabelledFrame:
    """One image message and what became of it.

    Args:
        number: its place among the image messages that are labelled, from 0.
        topic: where it was recorded.
        timestamp_ns: when it was recorded.
        sec: seconds of its header's stamp.
        nanosec: nanoseconds of its header's stamp.
        frame_id: frame id of its header.
        mask: PNG; None when there is a problem.
        confidence: PNG; None when there is a problem.
        stats: keys and values of the stats topic.
        device: what computed it.
        problem: why it could not be labelled, or empty.
    """

    number: int
    topic: str
    timestamp_ns: int
    sec: int = 0
    nanosec: int = 0
    frame_id: str = ""
    mask: bytes | None = None
    confidence: bytes | None = None
    stats: Mapping[str, str] | None = None
    device: str = ""
    problem: str = ""


class Journal:
    """The rows of one run, in `folder`; one process at a time.

    Args:
        folder: folder of the unfinished output; made when missing.
        identity: what makes a run the same run: the bag, the model, the settings.

    Raises:
        BagError: another process is at it.
        ConfigError: the folder belongs to a run with another identity.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Held until the process ends, however it ends.
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise BagError(f"{folder}: another process writes there; wait for it, or choose another output") from error
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())
        self._database = sqlite3.connect(folder / "journal.sqlite")
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.executescript(_SCHEMA)
        self._committed_s = time.monotonic()
        try:
            self._claim(folder, identity)
        except ConfigError:
            self.close()
            raise

    @property
    def next_number(self) -> int:
        """The number of the first frame that is not there yet."""
        return self._database.execute("SELECT COALESCE(MAX(number) + 1, 0) FROM frames").fetchone()[0]

    def add(self, frame: LabelledFrame) -> None:
        """Keep a frame; it is safe after a second at the latest."""
        stats = json.dumps(frame.stats) if frame.stats is not None else None
        row = (frame.number, frame.topic, frame.timestamp_ns, frame.sec, frame.nanosec, frame.frame_id,
               frame.mask, frame.confidence, stats, frame.device, frame.problem)  # fmt: skip
        self._database.execute("INSERT INTO frames VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        if time.monotonic() - self._committed_s > _COMMIT_PERIOD_S:
            self.commit()

    def commit(self) -> None:
        """Make everything safe that was added."""
        self._database.commit()
        self._committed_s = time.monotonic()

    def frames(self) -> Iterator[LabelledFrame]:
        """All frames in order of time."""
        for row in self._database.execute("SELECT * FROM frames ORDER BY timestamp_ns, number"):
            stats = json.loads(row[8]) if row[8] is not None else None
            yield LabelledFrame(*(*row[:8], stats, *row[9:]))

    def outcomes(self) -> Iterator[tuple[int, str]]:
        """(recording time in ns, problem or nothing) of all frames in order of time."""
        yield from self._database.execute("SELECT timestamp_ns, problem FROM frames ORDER BY timestamp_ns, number")

    def close(self) -> None:
        """Commit and let go."""
        self._database.commit()
        self._database.close()
        os.close(self._lock)

    def _claim(self, folder: Path, identity: Mapping[str, Any]) -> None:
        row = self._database.execute("SELECT identity FROM run").fetchone()
        if row is None:
            self._database.execute("INSERT INTO run VALUES (?)", (json.dumps(identity, sort_keys=True),))
            self._database.commit()
            return
        check_identity(folder, json.loads(row[0]), identity)


def check_identity(place: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse output of another run.

    Raises:
        ConfigError: naming what differs.
    """
    wanted = json.loads(json.dumps(wanted))
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        changes = ", ".join(
            "bag" if key == "bag" else f"{key} {found.get(key)!r}, now {wanted.get(key)!r}" for key in different
        )
        raise ConfigError(
            f"{place}: was made with something else ({changes}); choose another output, or remove it with --restart"
        )
