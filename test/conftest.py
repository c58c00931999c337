"""Where the tests find their data; what a stranger's clone lacks is skipped, saying so."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} in a folder 'shared' beside the checkout, which is not part of the repository")
    return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Inputs, weights and outputs of the official implementation."""
    return _shared("golden")


@pytest.fixture(scope="session")
def camvid_dir() -> Path:
    """CamVid with folders `train` and `val`."""
    return _shared("data/camvid")
