"""How a process that segments uses memory and threads."""

from __future__ import annotations

import contextlib
import ctypes
import os

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


def let_waiting_threads_sleep() -> None:
    """Make OpenMP threads sleep instead of spin while they wait for each other, unless the user chose otherwise.

    Spinning wins microseconds on an idle machine, and loses whole time slices on a robot where other processes want the
    cores: with one of two cores burnt by another process, a network took 416 ms spinning and 226 ms sleeping. Only has
    an effect before PyTorch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
