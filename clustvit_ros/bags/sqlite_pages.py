"""The rows of a bag's table of messages, read from the pages of a database file whose tree is broken.

SQLite finds a row by walking down from the table's root. Where a file was cut, a node of that tree can be gone while
thousands of rows before it are whole; they are found here by looking at every page.

Source: https://sqlite.org/fileformat2.html, sections 1.3, 1.5, 1.6 and 2.1.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_TABLE_LEAF = 0x0D
_FILE_HEADER_BYTES = 100
_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


class MessageRow(NamedTuple):
    """A row of `messages`.

    Attributes:
        row: its number.
        topic: number of its topic.
        timestamp_ns: when it was recorded.
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
