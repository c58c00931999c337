# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""rosbag2 bags, whole or damaged, by rosbags: which topics there are, and their messages in order of time."""

from __future__ import annotations

import collections
import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from clustvit_ros.bags.salvage import Salvaged, salvage
from clustvit_ros.errors import BagError, ConfigError

STORAGES = {".mcap": "mcap", ".db3": "sqlite3"}
"""Storage plugins of rosbag2 by the suffix of their files."""

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a folder with unfinished output."""


class Topic(NamedTuple):
    """A topic of a bag.

    Attributes:
        name: as recorded.
        msgtype: e.g. "sensor_msgs/msg/Image".
        message_count: how many it holds.
    """

    name: str
    msgtype: str
    message_count: int


class BagReader:
    """Reads one bag: a rosbag2 folder, or a single storage file.

    What rosbags refuses is read from the front by `salvage`; `damage` says what is missing.

    Args:
        path: folder with metadata.yaml, folder with storage files alone, .mcap or .db3 file.

    Raises:
        BagError: no bag, or one of which nothing can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage: list[str] = []
        """What could not be read, in words; complete once `messages` has been read to its end."""
        self._files = _storage_files(path)
        self._reader, reason = _open(path)
        self._salvaged: list[tuple[int, Salvaged]] = []
        self.topics: list[Topic] = []
        """The topics that have messages or are declared."""
        if self._reader is not None:
            self.topics = [Topic(c.topic, c.msgtype, c.msgcount) for c in self._reader.connections]
        else:
            self.damage += _missing_files(path)
            self.topics = self._survey()
            if not self.topics:
                raise BagError(
                    f"{path}: nothing of this bag can be read ({'; '.join(self.damage) or reason}); check that it was "
                    "copied whole, or record it again"
                )

    @property
    def storage(self) -> str:
        """The storage plugin: mcap or sqlite3."""
        return STORAGES[_plain_suffix(self._files[0])]

    @property
    def files(self) -> list[Path]:
        """The storage files, in order."""
        return self._files

    def messages(self, topics: Iterable[str]) -> Iterator[Salvaged]:
        """The messages of `topics`; in order of time, in damaged bags in order of recording."""
        wanted = set(topics)
        if self._reader is None:
            yield from (message for message in self._salvage([]) if message.topic in wanted)
            return
        connections = [c for c in self._reader.connections if c.topic in wanted]
        if not connections:
            return
        last_ns: dict[str, int] = {}
        missing = sum(connection.msgcount for connection in connections)
        try:
            for connection, timestamp_ns, data in self._reader.messages(connections):
                last_ns[connection.topic] = timestamp_ns
                missing -= 1
                yield Salvaged(connection.topic, connection.msgtype, timestamp_ns, bytes(data))
        except GeneratorExit:
            raise
        except Exception as error:  # rosbags lets through whatever its parsers meet in damaged data
            reason = _sentence(error)
        else:
            if missing <= 0:
                return
            reason = f"{missing} messages of its index are not there"
        place = f"after the message of {max(last_ns.values())} ns" if last_ns else "from the start"
        damage = [f"{self.path.name}: damaged {place} ({reason})"]
        if self._reader.compression_mode != "message":
            # rosbags reads a chunk as a whole or not at all; a look from the front may find more of it.
            for file in self._files:
                for message in salvage(file, damage):
                    if message.topic in wanted and message.timestamp_ns > last_ns.get(message.topic, -1):
                        yield message
        self.damage += [sentence for sentence in damage if sentence not in self.damage]  # met by an earlier reading

    def close(self) -> None:
        """Close the files."""
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> BagReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _survey(self) -> list[Topic]:
        counts = collections.Counter((message.topic, message.msgtype) for message in self._salvage(self.damage))
        return [Topic(name, msgtype, count) for (name, msgtype), count in counts.items()]

    def _salvage(self, damage: list[str]) -> Iterator[Salvaged]:
        for file in self._files:
            reader, _ = _open(file)
            if reader is None:
                yield from salvage(file, damage)
                continue
            try:
                for connection, timestamp_ns, data in reader.messages():
                    yield Salvaged(connection.topic, connection.msgtype, timestamp_ns, bytes(data))
            except GeneratorExit:
                raise
            except Exception as error:  # as in `messages`
                damage.append(f"{file.name}: {_sentence(error)}")
            finally:
                reader.close()


def find_bags(pattern: str) -> list[Path]:
    """The bags that a path or pattern names, sorted; output of this package and unfinished output are left out.

    Args:
        pattern: a bag, a folder, or a glob pattern such as "recordings/**".

    Returns:
        Folders with a metadata.yaml, and storage files that lie in no such folder.
    """
    found: set[Path] = set()
    for match in (Path(name) for name in glob.glob(str(Path(pattern).expanduser()), recursive=True)):
        candidates = [match]
        if match.is_dir() and not glob.has_magic(pattern):
            candidates += match.rglob("*")
        for path in candidates:
            if path.is_dir() and (path / "metadata.yaml").is_file():
                found.add(path)
            elif path.suffix in STORAGES and path.is_file():
                folder = path.parent
                found.add(folder if (folder / "metadata.yaml").is_file() else path)
    return sorted(path for path in found if not _is_output(path))


def _is_output(path: Path) -> bool:
    if any(part.endswith(PARTIAL_SUFFIX) for part in path.parts):
        return True
    metadata = path / "metadata.yaml"
    return metadata.is_file() and "clustvit_ros:" in metadata.read_text(encoding="utf-8", errors="replace")


def _storage_files(path: Path) -> list[Path]:
    if not path.exists():
        raise BagError(f"{path}: there is no such bag; expected a rosbag2 folder, an .mcap or a .db3 file")
    if path.is_file():
        files = [path] if path.suffix in STORAGES else []
    else:
        files = [file for file in path.iterdir() if _plain_suffix(file) in STORAGES and file.is_file()]
    if not files:
        raise BagError(f"{path}: no bag, expected a rosbag2 folder, an .mcap or a .db3 file")
    return sorted(files, key=lambda file: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", file.name)])


def _missing_files(path: Path) -> list[str]:
    """What metadata.yaml lists and is not there."""
    try:
        content = yaml.safe_load((path / "metadata.yaml").read_text(encoding="utf-8"))
        listed = content["rosbag2_bagfile_information"]["relative_file_paths"]
        return [f"{Path(name).name}: is missing" for name in listed if not (path / Path(name).name).exists()]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError):
        return []  # without usable metadata, the files speak for themselves


def _plain_suffix(file: Path) -> str:
    # rosbag2's file compression appends its own suffix.
    return Path(file.stem).suffix if file.suffix == ".zstd" else file.suffix


def _open(path: Path) -> tuple[Any, str]:
    """A rosbags reader, or None and the reason."""
    try:
        from rosbags.rosbag2 import Reader
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"bags need the Python package {error.name!r}; install it, or this package with its 'bags' extra"
        ) from error
    log = path.with_name(path.name + "-wal")
    if path.is_file() and log.exists() and log.stat().st_size:
        return None, "its recorder left a write-ahead log behind"
    try:
        reader = Reader(path)
        reader.open()
    except Exception as error:  # rosbags lets through whatever its parsers meet in damaged data
        return None, _sentence(error)
    return reader, ""


def _sentence(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")
