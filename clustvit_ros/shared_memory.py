"""What Fast DDS leaves in shared memory when a process is killed, and how to get rid of it.

Fast DDS holds an exclusive lock on `<segment>_el` for as long as the owner of `<segment>` lives, and deletes both when
the owner ends. After `kill -9` they stay, 32 MB for each participant with this package's profile: two kills fill the
64 MB that Docker gives a container, and the next process cannot create its own. What nobody locks belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_LOCK_OF_SEGMENT = re.compile(r"(?:fastrtps|fastdds)_[0-9a-f]{16}_el")
# A lock file exists for a moment before it is locked.
_SETTLED_S = 2.0


@dataclass(frozen=True)
class Leftover:
    """A segment whose owner is gone.

    Args:
        segment: its file.
        bytes_used: memory that it takes.
    """

    segment: Path
    bytes_used: int


def find_leftovers(folder: Path = SHARED_MEMORY) -> list[Leftover]:
    """Segments of this user that no living process owns."""
    return [leftover for lock in _locks(folder) if (leftover := _examine(lock, remove=False)) is not None]


def remove_leftovers(folder: Path = SHARED_MEMORY) -> list[Leftover]:
    """Delete them.

    Returns:
        What was deleted.
    """
    return [leftover for lock in _locks(folder) if (leftover := _examine(lock, remove=True)) is not None]


def _locks(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder) if _LOCK_OF_SEGMENT.fullmatch(name))
    except OSError:
        return []


def _examine(lock: Path, remove: bool) -> Leftover | None:
    segment = lock.with_name(lock.name.removesuffix("_el"))
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone by now, or another user's
        return None
    try:
        status = os.fstat(handle)
        if status.st_uid != os.getuid() or time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED_S:
            return None
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the handle is closed
        bytes_used = 0
        with contextlib.suppress(OSError):
            bytes_used = segment.stat().st_blocks * 512
        if remove:
            segment.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        return Leftover(segment, bytes_used)
    except OSError:  # locked: its owner lives
        return None
    finally:
        os.close(handle)
