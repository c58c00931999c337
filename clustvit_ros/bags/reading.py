# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Recorded bags of ROS 2 and ROS 1, whole or damaged, by rosbags: their topics, and their messages in order of time."""

from __future__ import annotations

import collections
import contextlib
import functools
import glob
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clustvit_ros.bags.salvage import ZSTD_MAGIC, Salvaged, decompress_file, decompress_message, salvage, text
from clustvit_ros.compressed_images import decode_compressed, holds_depth
from clustvit_ros.config import read_yaml
from clustvit_ros.errors import BagError, ConfigError, ImageError
from clustvit_ros.images import SUPPORTED_ENCODINGS, decode_image
from clustvit_ros.jpeg import KnownEdges

STORAGES = {".mcap": "mcap", ".db3": "sqlite3", ".bag": "ros1"}
"""Storage plugins of rosbag2, and ROS 1, by the suffix of their files."""

_MAGIC = {b"\x89MCAP0\r\n": ".mcap", b"SQLite format 3\0": ".db3", b"#ROSBAG V": ".bag", ZSTD_MAGIC: ".zstd"}
_EXPECTED = "expected a rosbag2 folder, or an .mcap, .db3 or (ROS 1) .bag file, which may be compressed to .zstd"

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a folder with unfinished output."""

METADATA_FILE = "metadata.yaml"
IMAGE, COMPRESSED_IMAGE = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
_DEPTH_ENCODINGS = ("16UC1", "32FC1", "64FC1")
# A recording is no stranger's network traffic, but a damaged length field must not take all memory either.
_MAX_PIXELS = 1 << 28


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
        path: folder with metadata.yaml, folder with storage files alone, or a storage file, of ROS 2 or ROS 1; files
            may be compressed, and called otherwise than when they were recorded.

    Raises:
        BagError: no bag, or one of which nothing can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage: list[str] = []
        """What could not be read, in words; complete once `messages` has been read to its end."""
        self._files = _storage_files(path)
        self._stack = contextlib.ExitStack()
        self._decompressed: dict[Path, Path] = {}
        try:
            self._reader, reason = _open(path if path.is_dir() else self._readable(path), self._stack)
            self.topics = self._declared() if self._reader is not None else self._survey()
            """The topics that have messages or are declared."""
            if not self.topics:
                raise BagError(
                    f"{path}: nothing of this bag can be read ({'; '.join(self.damage) or reason}); check that it was "
                    "copied whole, or record it again"
                )
        except BaseException:
            self.close()
            raise

    @property
    def storage(self) -> str:
        """The storage plugin: mcap, for ROS 1 as well, or sqlite3."""
        kind = _kind(self._files[0])
        return STORAGES[kind if kind in STORAGES else _kind(self._readable(self._files[0]))].replace("ros1", "mcap")

    @property
    def files(self) -> list[Path]:
        """The storage files, in order."""
        return self._files

    def messages(self, topics: Iterable[str]) -> Iterator[Salvaged]:
        """The messages of `topics`; in order of time, in damaged bags in order of recording."""
        wanted = frozenset(topics)
        if self._reader is None:
            yield from self._file_by_file(wanted, [])
            return
        damage: list[str] = []
        yield from self._read(self._reader, self._files, self.path.name, wanted, damage)
        self.damage += [sentence for sentence in damage if sentence not in self.damage]  # met by an earlier reading

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def __enter__(self) -> BagReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _declared(self) -> list[Topic]:
        return [Topic(text(c.topic), text(c.msgtype), c.msgcount) for c in self._reader.connections]

    def _survey(self) -> list[Topic]:
        counts = collections.Counter(
            (message.topic, message.msgtype) for message in self._file_by_file(None, self.damage)
        )
        self.damage[:0] = _missing_files(self.path, self._files, sum(counts.values()))
        return [Topic(name, msgtype, count) for (name, msgtype), count in counts.items()]

    def _file_by_file(self, topics: frozenset[str] | None, damage: list[str]) -> Iterator[Salvaged]:
        for file in self._files:
            with contextlib.ExitStack() as stack:
                reader, reason = _open(self._readable(file), stack)
                if reader is not None:
                    yield from self._read(reader, [file], file.name, topics, damage)
                else:
                    yield from self._salvage(file, topics, damage, reason)

    def _read(
        self, reader: Any, files: list[Path], name: str, topics: frozenset[str] | None, damage: list[str]
    ) -> Iterator[Salvaged]:
        """What rosbags reads of `files`, and behind the place where it stops, what else there is."""
        connections = [c for c in reader.connections if topics is None or text(c.topic) in topics]
        last_ns: dict[str, int] = {}
        missing = sum(connection.msgcount for connection in connections)
        try:
            for connection, timestamp_ns, data in reader.messages(connections) if connections else ():
                ros1 = not hasattr(connection.ext, "serialization_format")
                place = (text(connection.topic), text(connection.msgtype), int(timestamp_ns))
                message = _decoded(Salvaged(*place, bytes(memoryview(data)), ros1))
                last_ns[message.topic] = message.timestamp_ns
                missing -= 1
                yield message
        except GeneratorExit:
            raise
        except Exception as error:  # rosbags lets through whatever its parsers meet in damaged data
            reason = _sentence(error)
        else:
            if missing <= 0:
                return
            reason = f"{missing} messages of its index are not there"
        where = f"after the message of {max(last_ns.values())} ns" if last_ns else "from the start"
        found = [f"{name}: damaged {where} ({reason})"]
        # rosbags reads a chunk as a whole or not at all; a look from the front may find more of it.
        for file in files:
            for message in self._salvage(file, topics, found):
                if message.timestamp_ns > last_ns.get(message.topic, -1):
                    missing -= 1
                    yield message
        if missing > 0 or len(found) > 1:
            damage += found

    def _salvage(
        self, file: Path, topics: frozenset[str] | None, damage: list[str], reason: str = ""
    ) -> Iterator[Salvaged]:
        readable = self._readable(file)
        for message in salvage(readable, _kind(readable), file.name, damage, reason):
            if topics is None or message.topic in topics:
                yield _decoded(message)

    def _readable(self, file: Path) -> Path:
        """The file, or what is compressed in it."""
        if _kind(file) != ".zstd":
            return file
        if file not in self._decompressed:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="clustvit_ros_"))
            plain = self._decompressed[file] = Path(folder) / f"plain{_plain_suffix(file)}"
            try:
                self.damage += decompress_file(file, plain)
            except OSError as error:
                raise BagError(
                    f"{file}: cannot be decompressed into {folder} ({error.strerror}); set TMPDIR to a folder with "
                    "room, or decompress it yourself with `zstd -d`"
                ) from error
        return self._decompressed[file]


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
            elif _plain_suffix(path) in STORAGES and path.is_file():
                folder = path.parent
                found.add(folder if (folder / "metadata.yaml").is_file() else path)
    return sorted(path for path in found if not _is_output(path))


def _is_output(path: Path) -> bool:
    if any(part.endswith(PARTIAL_SUFFIX) for part in path.parts):
        return True
    metadata = path / METADATA_FILE
    return metadata.is_file() and "clustvit_ros:" in metadata.read_text(encoding="utf-8", errors="replace")


def read_metadata(folder: Path) -> dict[str, Any]:
    """What a bag's metadata.yaml says of it; nothing where it cannot be read."""
    with contextlib.suppress(ConfigError, LookupError, TypeError, ValueError):
        return dict(read_yaml(folder / METADATA_FILE)["rosbag2_bagfile_information"])
    return {}


@contextlib.contextmanager
def plain_link(path: Path, suffix: str = "") -> Iterator[Path]:
    """The path, or a link to it: rosbags puts paths into SQLite's URIs as they are, and goes by suffixes."""
    if re.fullmatch(r"[\w./ -]+", str(path)) and (not suffix or path.suffix == suffix):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="clustvit_ros_") as folder:
        link = Path(folder) / f"bag{suffix}"
        link.symlink_to(path.absolute())
        yield link


def _storage_files(path: Path) -> list[Path]:
    if not path.exists():
        raise BagError(f"{path}: there is no such bag; {_EXPECTED}")
    if path.is_file():
        files = [path] if _kind(path) else []
    else:
        inside = [file for file in path.iterdir() if file.is_file()]
        files = [file for file in inside if _plain_suffix(file) in STORAGES] or [
            file for file in inside if _magic(file)
        ]
    if not files:
        raise BagError(f"{path}: no bag, {_EXPECTED}")
    return sorted(files, key=lambda file: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", file.name)])


def _missing_files(path: Path, files: list[Path], messages: int) -> list[str]:
    """What metadata.yaml lists and is not there, unless files of other names hold all that it counts."""
    metadata = read_metadata(path)
    listed = metadata.get("relative_file_paths")
    names = {Path(str(name)).name for name in listed} if isinstance(listed, list) else set()
    missing = sorted(name for name in names if not (path / name).exists())
    renamed = sum(file.name not in names for file in files) >= len(missing)
    if renamed and messages and metadata.get("message_count") == messages:
        return []
    return [f"{name}: is missing" for name in missing]


def _kind(file: Path) -> str:
    """The suffix that a storage file should have: by its content, which no new name changes, or else its name."""
    return _magic(file) or (file.suffix if file.suffix in STORAGES else "")


def _magic(file: Path) -> str:
    try:
        with file.open("rb") as content:
            start = content.read(16)
    except OSError:
        return ""
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")


def _plain_suffix(file: Path) -> str:
    # rosbag2's file compression appends its own suffix.
    return Path(file.stem).suffix if file.suffix in (".zstd", ".zst") else file.suffix


def _open(path: Path, stack: contextlib.ExitStack) -> tuple[Any, str]:
    """A rosbags reader, which `stack` closes, or None and the reason."""
    try:
        from rosbags.rosbag1 import Reader as Ros1Reader
        from rosbags.rosbag2 import Reader
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"bags need the Python package {error.name!r}; install it, or this package with its 'bags' extra"
        ) from error
    logs = path.glob("*-wal") if path.is_dir() else [path.with_name(path.name + "-wal")]
    if any(log.exists() and log.stat().st_size for log in logs):
        return None, "its recorder left a write-ahead log behind"
    kind = "" if path.is_dir() else _kind(path)
    try:
        link = stack.enter_context(plain_link(path, kind))
        reader: Any = Ros1Reader(link) if kind == ".bag" else Reader(link)
        reader.open()
        if path.is_dir() and {(c.topic, c.msgtype) for c in reader.connections if c.msgcount} - {
            (c.topic, c.msgtype) for storage in reader.storage.storages for c in storage.connections
        }:
            reader.close()
            return None, "its metadata names topics that are not there"
    except Exception as error:  # rosbags lets through whatever its parsers meet in damaged data
        return None, _sentence(error)
    stack.callback(reader.close)
    return reader, ""


def _sentence(error: Exception) -> str:
    said = str(error) or type(error).__name__
    return said.splitlines()[0].rstrip(".")


@functools.cache
def typestore() -> Any:
    """The message definitions; those of images have not changed since the first ROS 2."""
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_JAZZY)


def read_message(msgtype: str, data: bytes) -> Any:
    """Deserialise an Image or CompressedImage.

    Raises:
        ImageError: not one.
    """
    try:
        return typestore().deserialize_cdr(data, msgtype)
    except Exception as error:  # whatever the generated code meets in damaged bytes
        reason = str(error) or type(error).__name__
        raise ImageError(f"message: got {len(data)} damaged bytes of {msgtype} ({reason})") from error


def _decoded(message: Salvaged) -> Salvaged:
    """The message as ROS 2 serialises it: rosbag2 may have compressed it, ROS 1 writes images in its own way.

    What cannot be decoded stays as it is: `read_message` says so of an image.
    """
    data = message.data
    if data.startswith(ZSTD_MAGIC):  # no CDR begins so, whatever metadata says or does not
        data = decompress_message(data)
    if message.ros1 and message.msgtype in (IMAGE, COMPRESSED_IMAGE):
        with contextlib.suppress(Exception):  # as in `read_message`
            data = bytes(typestore().ros1_to_cdr(data, message.msgtype))
    return message._replace(data=data)


def unusable(message: Any) -> str:
    """Why no message like this one can be segmented; empty when it can.

    Args:
        message: what `read_message` gave.
    """
    if hasattr(message, "format"):
        return _depth(message.format[:40]) if holds_depth(message.format) else ""
    if message.encoding in _DEPTH_ENCODINGS:
        return _depth(message.encoding)
    return "" if message.encoding in SUPPORTED_ENCODINGS else f"has encoding {str(message.encoding)[:40]!r}"


def _depth(encoding: str) -> str:
    return f"holds depth ({encoding}), which is no picture to segment"


def to_pixels(message: Any, edges: KnownEdges) -> np.ndarray:
    """Decode a message of `read_message` to (H, W, 3) uint8 RGB; `edges` are of its topic.

    Raises:
        ImageError: unsupported or damaged.
    """
    reason = unusable(message)
    if reason:
        raise ImageError(f"{reason}; choose the colour camera's topic with --topic")
    if hasattr(message, "format"):
        pixels = decode_compressed(message, _MAX_PIXELS, is_scene=edges.is_scene)
    else:
        pixels = decode_image(message, _MAX_PIXELS)
    # Bags are read only, and PyTorch wants arrays that could be written to.
    return np.require(pixels, requirements="W")
