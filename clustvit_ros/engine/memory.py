"""How a process that segments uses memory."""

from __future__ import annotations

import contextlib
import ctypes

# glibc's <malloc.h>; 32 MB is the largest threshold that it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 * 1024 * 1024


def keep_freed_memory() -> None:
    """Let malloc reuse the memory of one image for the next.

    By default glibc gives buffers of an image's size back to the system and gets them anew, page by page, for every
    message, copy and activation: ten times the cost of copying an image. Does nothing where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 4 * _KEPT_BYTES)


def return_freed_memory() -> None:
    """Give the system what loading left behind: as much as the weights took, which `keep_freed_memory` would keep.

    Does nothing where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
