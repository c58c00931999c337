"""Storage files of bags whose end or index is gone, read from the front as far as they make sense.

A killed recorder, a full disk or an interrupted copy leaves an MCAP file without its summary, or a database that is
shorter than it says. Ordinary readers start at the index and refuse both.

MCAP: https://mcap.dev/spec; SQLite: https://sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import sqlite3
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from clustvit_ros.bags.sqlite_pages import scan_messages

_MCAP_MAGIC = b"\x89MCAP0\r\n"
_FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 0x02, 0x03, 0x04, 0x05, 0x06
_LAST_MCAP_OPCODE = 0x0F


class Salvaged(NamedTuple):
    """A message that was read out of a damaged file.

    Attributes:
        topic: its name.
        msgtype: e.g. "sensor_msgs/msg/Image".
        timestamp_ns: when it was recorded.
        data: CDR.
    """

    topic: str
    msgtype: str
    timestamp_ns: int
    data: bytes


class SalvageError(Exception):
    """Reading goes no further; the message says where and why."""


def salvage(path: Path, damage: list[str]) -> Iterator[Salvaged]:
    """The messages of a storage file in the order in which they lie there.

    Args:
        path: an .mcap or .db3 file.
        damage: gets a sentence for each place that cannot be read.
    """
    try:
        if path.suffix not in _READERS:
            raise SalvageError("is compressed as a whole; decompress it with `zstd -d` and label what comes out")
        yield from _READERS[path.suffix](path, damage)
    except SalvageError as error:
        damage.append(f"{path.name}: {error}")


def _read_mcap(path: Path, damage: list[str]) -> Iterator[Salvaged]:
    schemas: dict[int, str] = {}
    channels: dict[int, tuple[str, str]] = {}
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
                    damage.append(f"{path.name}: chunk at byte {offset}: {problem}")
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
    content = file.read(min(size, 1 << 40))
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
        try:
            from compression.zstd import ZstdDecompressor
        except ModuleNotFoundError:  # before Python 3.14
            from backports.zstd import ZstdDecompressor
        return ZstdDecompressor().decompress(stored)
    raise ValueError(f"compression {compression!r} is unknown")


def _interpret(
    opcode: int, record: bytes, schemas: dict[int, str], channels: dict[int, tuple[str, str]]
) -> Salvaged | None:
    try:
        if opcode == _SCHEMA:
            (key,) = struct.unpack_from("<H", record)
            schemas[key] = _text(record, 2)[0]
        elif opcode == _CHANNEL:
            key, schema = struct.unpack_from("<HH", record)
            channels[key] = _text(record, 4)[0], schemas.get(schema, "")
        elif opcode == _MESSAGE:
            key, _, log_time, _ = struct.unpack_from("<HIQQ", record)
            if key in channels:
                return Salvaged(*channels[key], log_time, record[22:])
    except (struct.error, UnicodeDecodeError):
        pass  # a record that makes no sense carries no message
    return None


def _text(record: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", record, position)
    end = position + 4 + length
    return record[position + 4 : end].decode(), end


def _read_sqlite(path: Path, damage: list[str]) -> Iterator[Salvaged]:
    # A write-ahead log that its recorder left behind holds the newest messages; without one, nothing is to be locked.
    log = path.with_name(path.name + "-wal")
    mode = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
    connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?{mode}", uri=True)
    topics: dict[int, tuple[str, str]] = {}
    last_row = read = 0
    try:
        # Else SQLite refuses to open a file that is shorter than its header says.
        connection.execute("PRAGMA writable_schema=ON")
        topics = {key: (name, kind) for key, name, kind in connection.execute("SELECT id, name, type FROM topics")}
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
