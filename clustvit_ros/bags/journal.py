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

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustvit_ros.errors import BagError, ConfigError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (identity TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS frames (
  number INTEGER PRIMARY KEY, topic TEXT NOT NULL, timestamp_ns INTEGER NOT NULL, sec INTEGER, nanosec INTEGER,
  frame_id TEXT, mask BLOB, confidence BLOB, stats TEXT, device TEXT, problem TEXT, checksum INTEGER NOT NULL
);
"""
_COMMIT_PERIOD_S = 1.0
_LOCK, _DATABASE, _STAGE = "lock", "journal.sqlite", "output"
_DATABASE_FILES = tuple(_DATABASE + end for end in ("", "-wal", "-shm", "-journal"))
# Begins the lock file: what tells a folder of this package from a user's own of the same name.
_MARK = b"clustvit-ros label-bag "
# What SQLite says of the disk, not of the database.
_STORAGE_TROUBLE = ("full", "disk I/O", "unable to open", "readonly", "locked")


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


class WorkFolder:
    """The folder of unfinished output, locked: one process at a time, and never a folder of somebody else's.

    Leaving it removes it, unless a journal is in it.

    Args:
        path: the folder; made when missing.

    Raises:
        BagError: another process is at it.
        ConfigError: it exists and holds what label-bag does not write there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stage = path / _STAGE
        """Where output is written before it gets its name."""
        while not self._lock_it():
            pass  # its last owner removed it meanwhile

    def clear(self) -> None:
        """Remove the journal and the stage."""
        self.clear_stage()
        for name in _DATABASE_FILES:
            (self.path / name).unlink(missing_ok=True)

    def clear_stage(self) -> None:
        """Remove what was written of the output."""
        if self.stage.exists():
            shutil.rmtree(self.stage)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not (self.path / _DATABASE).exists():
                (self.path / _LOCK).unlink()
                with contextlib.suppress(OSError):  # somebody put a file there
                    self.path.rmdir()
        finally:
            os.close(self._lock)

    def _lock_it(self) -> bool:
        lock = self.path / _LOCK
        if not lock.exists():
            self._make()
        if not self._is_ours():
            raise ConfigError(
                f"{self.path}: is needed for unfinished output, but exists and is not label-bag's; move it away, or "
                "choose another output"
            )
        try:
            # Held until the process ends, however it ends.
            self._lock = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(lock.stat(), os.fstat(self._lock)):
                os.pwrite(self._lock, _mark(), 0)
                return True
        except BlockingIOError as error:
            os.close(self._lock)
            raise BagError(f"{self.path}: another process writes there; wait, or choose another output") from error
        except OSError:
            os.close(self._lock)
            raise
        os.close(self._lock)
        return False

    def _make(self) -> None:
        """The folder with its mark in one step: without a mark, it is somebody else's."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f"{self.path.name}.", dir=self.path.parent))
        try:
            (fresh / _LOCK).write_bytes(_mark())
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                fresh.rename(self.path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        finally:
            if fresh.exists():
                shutil.rmtree(fresh)

    def _is_ours(self) -> bool:
        """Nothing but our files, and the mark; or what its last owner is just removing."""
        try:
            names = set(os.listdir(self.path))
            return names <= {_LOCK, _STAGE, *_DATABASE_FILES} and (self.path / _LOCK).read_bytes().startswith(_MARK)
        except FileNotFoundError:
            return not self.path.exists() or not os.listdir(self.path)
        except OSError:
            return False


def _mark() -> bytes:
    return _MARK + f"{os.getpid():<10}\n".encode()


@contextlib.contextmanager
def written_to(place: Path) -> Iterator[None]:
    """Full disks, failing ones and damaged journals become a sentence with a remedy.

    Args:
        place: what is written.

    Raises:
        BagError: instead of what the file system or SQLite says.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if isinstance(error, OSError) or any(words in str(error) for words in _STORAGE_TROUBLE):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise BagError(
                f"{place}: cannot be written ({reason}); make room or choose another disk, and run the same command "
                "again, without --restart: it continues"
            ) from error
        raise _damaged(place, error) from error


def _damaged(place: Path, reason: object) -> BagError:
    return BagError(f"{place}: the journal of unfinished output is damaged ({reason}); begin again with --restart")


class Journal:
    """The rows of one run.

    Args:
        work: where it lies.
        identity: what makes a run the same run: the bag, the model, the settings.

    Raises:
        BagError: what is there is damaged.
        ConfigError: the folder belongs to a run with another identity.
    """

    def __init__(self, work: WorkFolder, identity: Mapping[str, Any]) -> None:
        self._folder = work.path
        self._database = sqlite3.connect(work.path / _DATABASE)
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.executescript(_SCHEMA)
            self._committed_s = time.monotonic()
            (sound,) = self._database.execute("PRAGMA integrity_check(1)").fetchone()
            if sound != "ok":
                raise _damaged(self._folder, sound)
            self._claim(identity)
            numbers = {frame.number for frame in self.frames()}
            if numbers != set(range(len(numbers))):
                raise _damaged(self._folder, "frames are missing in it")
        except BaseException:
            self._database.close()
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
        self._database.execute(f"INSERT INTO frames VALUES ({'?, ' * len(row)}?)", (*row, _checksum(row)))
        if time.monotonic() - self._committed_s > _COMMIT_PERIOD_S:
            self.commit()

    def commit(self) -> None:
        """Make everything safe that was added."""
        self._database.commit()
        self._committed_s = time.monotonic()

    def frames(self) -> Iterator[LabelledFrame]:
        """All frames in order of time.

        Raises:
            BagError: a frame is not what was written.
        """
        for *row, checksum in self._database.execute("SELECT * FROM frames ORDER BY timestamp_ns, number"):
            if _checksum(row) != checksum:
                raise _damaged(self._folder, f"the checksum of frame {row[0]} is wrong")
            stats = json.loads(row[8]) if row[8] is not None else None
            yield LabelledFrame(*(*row[:8], stats, *row[9:]))

    def outcomes(self) -> Iterator[tuple[str, int, str]]:
        """(topic, recording time in ns, problem or nothing) of all frames in order of time."""
        frames = "SELECT topic, timestamp_ns, problem FROM frames ORDER BY timestamp_ns, number"
        yield from self._database.execute(frames)

    def devices(self) -> list[str]:
        """What computed the frames."""
        return [row[0] for row in self._database.execute("SELECT DISTINCT device FROM frames WHERE device != ''")]

    def close(self) -> None:
        """Let go; what was not committed is not kept."""
        self._database.close()

    def _claim(self, identity: Mapping[str, Any]) -> None:
        row = self._database.execute("SELECT identity FROM run").fetchone()
        if row is None:
            self._database.execute("INSERT INTO run VALUES (?)", (json.dumps(identity, sort_keys=True),))
            self._database.commit()
            return
        try:
            found = dict(json.loads(row[0]))
        except (TypeError, ValueError) as error:
            raise _damaged(self._folder, error) from error
        check_identity(self._folder, found, identity)


def _checksum(row: Sequence[Any]) -> int:
    """Of everything in a row: SQLite itself has none, and a decoder may take a garbled PNG for another picture."""
    checksum = 0
    for value in row:
        checksum = zlib.crc32(value if isinstance(value, bytes) else repr(value).encode(), checksum)
    return checksum


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
