"""How long the threads of an operation wait for each other without sleeping."""

from __future__ import annotations

import os


def bound_spinning() -> None:
    """Let OpenMP threads that wait for each other spin briefly, then sleep, unless the user chose otherwise.

    GNU OpenMP spins for milliseconds, a whole time slice when another process has the core. Frames of 65 ms on two
    cores, one of them taken by another process: 1.5 s at a count of 100,000, 0.28 s at 10,000, 0.16 s at 3,000. On an
    idle machine 3,000 is too short: threads sleep between two operations of a frame, and its 95th percentile rises
    from 78 to 105 ms. Only has an effect before PyTorch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
