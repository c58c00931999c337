"""What engines under test run."""

from __future__ import annotations

import pytest

from clustvit_ros.classes import ClassSet


@pytest.fixture(scope="session")
def toy_model(make_toy_model):
    """Folder of a small untrained model with seven classes."""
    return make_toy_model(ClassSet.numbered(7))


@pytest.fixture(scope="session")
def onnx_cache(tmp_path_factory):
    """The user's cache for exported files, empty at first and shared by the tests."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield cache / "clustvit_ros" / "onnx"
