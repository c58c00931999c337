# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Storage files of bags whose end or index is gone, read from the front as far as they make sense.

A killed recorder, a full disk or an interrupted copy leaves an MCAP file without its summary, or a database that is
shorter than it says. Ordinary readers start at the index and refuse both.

MCAP: https://mcap.dev/spec; SQLite: https://sqlite.org/fileformat2.html.

The rows of a bag's table of messages, read from the pages of a database file whose tree is broken.

SQLite finds a row by walking down from the table's root. Where a file was cut, a node of that tree can be gone while
thousands of rows before it are whole; they are found here by looking at every page.

Source: https://sqlite.org/fileformat2.html, sections 1.3, 1.5, 1.6 and 2.1.
"""

from __future__ import annotations

import mmap
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

_TABLE_LEAF = 0x0D
_FILE_HEADER_BYTES = 100
_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


class MessageRow(NamedTuple):
    """A row of `messages`.

    Attributes:
        row: its number.
        topic: number of its topic.
        timestamp_ns: nanoseconds when it was recorded.
        data: CDR.
    """

    row: int
    topic: int
    timestamp_ns: int
    data: bytes


def scan_messages(path: Path, after: int) -> Iterator[MessageRow]:
    """The whole rows with numbers above `after`, each once, in order."""
    if path.stat().st_size < _FILE_HEADER_BYTES:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        pages = _Pages(content)
        places = dict(sorted((row, place) for row, place in pages.cells() if row > after))
        for row, place in places.items():
            message = pages.message(row, place)
            if message is not None:
                yield message


class _Pages:
    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        (size,) = struct.unpack_from(">H", content, 16)
        self._size = 65536 if size == 1 else size
        self._usable = self._size - content[20]
        # 512 is the smallest page there is; whatever else a damaged header says ends in no pages at all.
        self._count = len(content) // self._size if self._size >= 512 else 0

    def cells(self) -> Iterator[tuple[int, int]]:
        """(row, offset of its cell) in all leaf pages of tables."""
        for page in range(self._count):
            start = page * self._size
            header = start + (_FILE_HEADER_BYTES if page == 0 else 0)
            if self._content[header] != _TABLE_LEAF:
                continue
            (count,) = struct.unpack_from(">H", self._content, header + 3)
            if header + 8 + 2 * count > start + self._size:
                continue  # the middle of somebody's picture
            for (pointer,) in struct.iter_unpack(">H", self._content[header + 8 : header + 8 + 2 * count]):
                if pointer <= self._usable - 4:
                    _, position = self._varint(start + pointer)
                    row, _ = self._varint(position)
                    yield row, start + pointer

    def message(self, row: int, place: int) -> MessageRow | None:
        """The cell as a row of `messages`; None when it belongs to another table or is not whole."""
        try:
            payload = self._payload(place)
            header_bytes, position = _varint(payload, 0)
            kinds = []
            while position < header_bytes:
                kind, position = _varint(payload, position)
                kinds.append(kind)
            if len(kinds) != 4 or kinds[0] != 0 or kinds[3] < 12 or kinds[3] % 2:
                return None
            topic, position = _integer(payload, header_bytes, kinds[1])
            timestamp_ns, position = _integer(payload, position, kinds[2])
            data = payload[position : position + (kinds[3] - 12) // 2]
        except (IndexError, KeyError, struct.error):
            return None
        return MessageRow(row, topic, timestamp_ns, data) if position + len(data) == len(payload) else None

    def _payload(self, place: int) -> bytes:
        length, position = self._varint(place)
        _, position = self._varint(position)
        largest = self._usable - 35
        if length <= largest:
            return self._content[position : position + length]
        smallest = (self._usable - 12) * 32 // 255 - 23
        local = smallest + (length - smallest) % (self._usable - 4)
        local = local if local <= largest else smallest
        parts = [self._content[position : position + local]]
        (page,) = struct.unpack_from(">I", self._content, position + local)
        missing = length - local
        while missing > 0:
            if not 0 < page <= self._count:
                raise IndexError("a page of this row is gone")
            start = (page - 1) * self._size
            (page,) = struct.unpack_from(">I", self._content, start)
            parts.append(self._content[start + 4 : start + 4 + min(missing, self._usable - 4)])
            missing -= len(parts[-1])
        return b"".join(parts)

    def _varint(self, position: int) -> tuple[int, int]:
        value, length = _varint(self._content[position : position + 9], 0)
        return value, position + length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """SQLite's integer of one to nine bytes, and where it ends."""
    value = 0
    for _ in range(8):
        value = value << 7 | data[position] & 0x7F
        position += 1
        if data[position - 1] < 0x80:
            return value, position
    return value << 8 | data[position], position + 1


def _integer(payload: bytes, position: int, kind: int) -> tuple[int, int]:
    if kind in (8, 9):
        return kind - 8, position
    end = position + _INTEGER_BYTES[kind]
    return int.from_bytes(payload[position:end], "big", signed=True), end


ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
"""Begins what is compressed with Zstandard."""

_MOST_MESSAGE_BYTES = 1 << 30
_BLOCK_BYTES = 1 << 20
_MCAP_MAGIC = b"\x89MCAP0\r\n"
_FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 0x02, 0x03, 0x04, 0x05, 0x06
_LAST_MCAP_OPCODE = 0x0F


class Salvaged(NamedTuple):
    """A message that was read out of a damaged file.

    Attributes:
        topic: its name.
        msgtype: e.g. "sensor_msgs/msg/Image".
        timestamp_ns: nanoseconds when it was recorded.
        data: CDR, or as ROS 1 serialises, compressed or not.
        ros1: as ROS 1 serialises.
    """

    topic: str
    msgtype: str
    timestamp_ns: int
    data: bytes
    ros1: bool = False


class _Channel(NamedTuple):
    topic: str
    msgtype: str
    ros1: bool


class SalvageError(Exception):
    """Reading goes no further; the message says where and why."""


def salvage(path: Path, kind: str, name: str, damage: list[str], reason: str = "") -> Iterator[Salvaged]:
    """The messages of a storage file in the order in which they lie there.

    Args:
        path: the file, not compressed.
        kind: the suffix of what it holds: .mcap or .db3; others are only named.
        name: what the user calls it.
        damage: gets a sentence for each place that cannot be read.
        reason: why it could not be read in an ordinary way.
    """
    try:
        if kind == ".bag":
            raise SalvageError(f"{reason or 'is damaged'}; `rosbag reindex` of ROS 1 repairs it")
        if kind not in _READERS:
            raise SalvageError("is neither MCAP nor SQLite")
        yield from _READERS[kind](path, name, damage)
    except SalvageError as error:
        damage.append(f"{name}: {error}")


def text(value: Any) -> str:
    """A name of a bag, which should be text and may be anything."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def decompress_message(data: bytes) -> bytes:
    """A message that was compressed with Zstandard; as it is where that fails."""
    zstd = _zstd()
    decompressor = zstd.ZstdDecompressor()
    try:
        plain = decompressor.decompress(data, _MOST_MESSAGE_BYTES)
    except zstd.ZstdError:
        return data
    return plain if decompressor.eof else data


def decompress_file(path: Path, target: Path) -> list[str]:
    """Write as much of a file as can be decompressed.

    Args:
        path: compressed with Zstandard.
        target: the file to make.

    Returns:
        What is wrong with it, in a sentence; empty for nothing.

    Raises:
        OSError: the disk is full.
    """
    zstd = _zstd()
    decompressor = zstd.ZstdDecompressor()
    with path.open("rb") as file, target.open("wb") as plain:
        while block := file.read(_BLOCK_BYTES):
            while block:
                if decompressor.eof:
                    decompressor = zstd.ZstdDecompressor()
                try:
                    plain.write(decompressor.decompress(block))
                except zstd.ZstdError as error:
                    return [f"{path.name}: cannot be decompressed to its end ({error})"]
                block = decompressor.unused_data
    return [] if decompressor.eof else [f"{path.name}: ends before its compressed content does"]


def _zstd() -> Any:
    try:
        from compression import zstd
    except ModuleNotFoundError:  # before Python 3.14
        from backports import zstd
    return zstd


def _read_mcap(path: Path, name: str, damage: list[str]) -> Iterator[Salvaged]:
    schemas: dict[int, str] = {}
    channels: dict[int, _Channel] = {}
    with path.open("rb") as file:
        if file.read(len(_MCAP_MAGIC)) != _MCAP_MAGIC:
            raise SalvageError("does not begin as an MCAP file does")
        while True:
            offset = file.tell()
            opcode, content, whole = _next_mcap_record(file)
            if opcode == _FOOTER:
                return
            if opcode == _CHUNK:
                records, problem = _open_chunk(content, whole)
                if problem:
                    damage.append(f"{name}: chunk at byte {offset}: {problem}")
            else:
                records = [(opcode, content)] if whole else []
            for kind, record in records:
                message = _interpret(kind, record, schemas, channels)
                if message is not None:
                    yield message
            if not whole:
                raise SalvageError(f"ends inside the record at byte {offset}: it was truncated, or its recorder killed")


def _next_mcap_record(file: BinaryIO) -> tuple[int, bytes, bool]:
    """(opcode, content, False when the file ends before the content does)."""
    offset = file.tell()
    head = file.read(9)
    if len(head) < 9:
        raise SalvageError(f"ends at byte {offset} without a footer: it was truncated, or its recorder killed")
    opcode, size = struct.unpack("<BQ", head)
    if not 0 < opcode <= _LAST_MCAP_OPCODE:
        raise SalvageError(f"no MCAP record begins at byte {offset}")
    content = file.read(min(size, os.fstat(file.fileno()).st_size))
    return opcode, content, len(content) == size


def _open_chunk(content: bytes, whole: bool) -> tuple[list[tuple[int, bytes]], str]:
    """The whole records of a chunk, and what is wrong with it (empty for nothing)."""
    try:
        _, _, size, crc, name_length = struct.unpack_from("<QQQII", content)
        compression = content[32 : 32 + name_length].decode()
        stored = content[40 + name_length :]
        plain = _decompress(stored, compression)
    except (struct.error, ValueError, OSError, RuntimeError, EOFError) as error:
        return [], f"cannot be opened ({error})" if whole else ""
    if whole and (len(plain) != size or (crc and zlib.crc32(plain) != crc)):
        return [], "its checksum is wrong"
    records, position = [], 0
    while position + 9 <= len(plain):
        opcode, length = struct.unpack_from("<BQ", plain, position)
        if position + 9 + length > len(plain):
            break
        records.append((opcode, plain[position + 9 : position + 9 + length]))
        position += 9 + length
    return records, f"holds no record at its byte {position}" if whole and position != len(plain) else ""


def _decompress(stored: bytes, compression: str) -> bytes:
    """As much of a stream as its stored bytes hold."""
    if compression == "":
        return stored
    if compression == "lz4":
        from lz4.frame import LZ4FrameDecompressor

        return LZ4FrameDecompressor().decompress(stored)
    if compression == "zstd":
        return _zstd().ZstdDecompressor().decompress(stored)
    raise ValueError(f"compression {compression!r} is unknown")


def _interpret(opcode: int, record: bytes, schemas: dict[int, str], channels: dict[int, _Channel]) -> Salvaged | None:
    try:
        if opcode == _SCHEMA:
            (key,) = struct.unpack_from("<H", record)
            schemas[key] = _text(record, 2)[0]
        elif opcode == _CHANNEL:
            key, schema = struct.unpack_from("<HH", record)
            topic, end = _text(record, 4)
            ros1, msgtype = _text(record, end)[0] == "ros1", schemas.get(schema, "")
            channels[key] = _Channel(topic, msgtype.replace("/", "/msg/", 1) if ros1 else msgtype, ros1)
        elif opcode == _MESSAGE:
            key, _, log_time, _ = struct.unpack_from("<HIQQ", record)
            if key in channels:
                channel = channels[key]
                return Salvaged(channel.topic, channel.msgtype, log_time, record[22:], channel.ros1)
    except struct.error:
        pass  # a record that makes no sense carries no message
    return None


def _text(record: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", record, position)
    end = position + 4 + length
    return text(record[position + 4 : end]), end


def _read_sqlite(path: Path, name: str, damage: list[str]) -> Iterator[Salvaged]:
    # A write-ahead log that its recorder left behind holds the newest messages; without one, nothing is to be locked.
    log = path.with_name(path.name + "-wal")
    mode = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
    connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?{mode}", uri=True)
    connection.text_factory = text
    topics: dict[int, tuple[str, str]] = {}
    last_row = read = 0
    try:
        # Else SQLite refuses to open a file that is shorter than its header says.
        connection.execute("PRAGMA writable_schema=ON")
        topics = {
            key: (text(name), text(kind)) for key, name, kind in connection.execute("SELECT id, name, type FROM topics")
        }
        # Not by time: the rows lie in the file as they came, an index may not.
        for row, topic, timestamp_ns, data in connection.execute("SELECT id, topic_id, timestamp, data FROM messages"):
            # Rows ascend; a page that reads as zeros gives a row 0 before SQLite notices.
            if row > last_row and topic in topics and isinstance(data, bytes) and isinstance(timestamp_ns, int):
                last_row, read = row, read + 1
                yield Salvaged(*topics[topic], timestamp_ns, data)
    except sqlite3.DatabaseError as error:
        for message in scan_messages(path, last_row) if topics else ():
            if message.topic in topics:
                read += 1
                yield Salvaged(*topics[message.topic], message.timestamp_ns, message.data)
        raise SalvageError(f"{read} messages are readable ({error})") from error
    finally:
        connection.close()


_READERS = {".mcap": _read_mcap, ".db3": _read_sqlite}
