# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Where the package's files lie, installed or in a checkout, and how files are hashed and replaced."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import logging
import os
import stat
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clustvit_ros.errors import ConfigError, DataError, ModelError

MODEL_FILE = "model.yaml"
_LOG = logging.getLogger(__name__)


def share_dir() -> Path:
    """The folder that holds `config/`, `launch/` and `models/`.

    A checkout (or editable install) comes first, then the prefixes that `colcon build` and `pip install` fill.
    """
    package = Path(__file__).resolve().parent
    if (package.parent / "package.xml").is_file():
        return package.parent
    # <prefix>/lib/python3.X/site-packages/clustvit_ros, or on Debian <prefix>/local/lib/python3.X/dist-packages/...
    prefixes = [*package.parents[2:6], Path(sysconfig.get_path("data"))]
    for prefix in prefixes:
        share = prefix / "share" / "clustvit_ros"
        if (share / "package.xml").is_file():
            return share
    raise ModelError(
        f"share/clustvit_ros was not found in {', '.join(map(str, prefixes))}; install the package with "
        "'pip install .' or 'colcon build', or pass full paths"
    )


def user_cache_dir() -> Path:
    """Where measurements and generated files are kept between runs.

    Returns:
        `$XDG_CACHE_HOME/clustvit_ros` or `~/.cache/clustvit_ros`, made if need be; `temporary_cache_dir()` for a user
        whose home is missing, read-only or full.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return _usable((Path(given) if given else Path.home() / ".cache") / "clustvit_ros")
    except RuntimeError:  # a container's user without a home
        return temporary_cache_dir()


def user_models_dir() -> Path:
    """Where models go that a user gets: `clustvit_ros/models` in `$XDG_DATA_HOME` or `~/.local/share`."""
    given = os.environ.get("XDG_DATA_HOME")
    try:
        return (Path(given) if given else Path.home() / ".local" / "share") / "clustvit_ros" / "models"
    except RuntimeError:  # a container's user without a home
        return temporary_cache_dir() / "models"


def temporary_cache_dir() -> Path:
    """A folder of this user alone where temporary files go (`TMPDIR`), for what the home has no room for."""
    with contextlib.suppress(OSError):
        # Not another user's, who might have put files there for this one to load.
        folder = Path(tempfile.gettempdir()) / f"clustvit_ros-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    with contextlib.suppress(OSError):
        return Path(tempfile.mkdtemp(prefix="clustvit_ros-"))
    return Path(tempfile.tempdir or "/tmp") / "clustvit_ros"  # nothing can be written anywhere, which each writer tells


@functools.lru_cache
def _usable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        problem = "it cannot be written"
    except OSError as error:
        problem = error.strerror or str(error)
    other = temporary_cache_dir()
    _LOG.warning("%s: %s; calibrations and exported files are kept in %s, until it is emptied", folder, problem, other)
    return other


def find_model(name_or_path: str | Path) -> Path:
    """The folder of a shipped model, or of one that the user got, by its name, or any model folder by its path.

    Raises:
        ModelError: there is no such model.
    """
    given = Path(name_or_path).expanduser()
    if (given / MODEL_FILE).is_file():
        return given
    if given.name == str(name_or_path):
        for models in (share_dir() / "models", user_models_dir()):
            if (models / given / MODEL_FILE).is_file():
                return models / given
        shipped = [folder.name for folder in shipped_models()]
        meant = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(str(name_or_path), shipped, 1))
        raise ModelError(
            f"model {str(name_or_path)!r} is not shipped{meant} (shipped: {', '.join(shipped) or 'none'}) and no "
            "folder of that name holds a model.yaml; pass one of these names or the path of a model folder (models/ of "
            "a checkout has those that are too large for a wheel), or get it first (`clustvit-ros models --released`)"
        )
    raise ModelError(
        f"model folder {given} holds no {MODEL_FILE}; pass a shipped model's name or a model folder's path"
    )


def model_name(folder: Path) -> str:
    """What a model is called: as its folder; run folders all call theirs "model", so that it is the run's name."""
    folder = folder.resolve()
    return (folder.parent.name if folder.name == "model" else "") or folder.name


def shipped_models() -> list[Path]:
    """Folders of the models that come with the package."""
    return _models_in(share_dir() / "models")


def user_models() -> list[Path]:
    """Folders of the models that the user got."""
    return _models_in(user_models_dir())


def _models_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"*/{MODEL_FILE}"))


def shipped_recipes() -> dict[str, Path]:
    """Training recipes that come with the package, by name."""
    return {path.stem: path for path in sorted((share_dir() / "config" / "train").glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """A training recipe that comes with the package by its name, or any by its path.

    Raises:
        ConfigError: there is no such recipe.
    """
    given = Path(name_or_path).expanduser()
    if given.is_file():
        return given
    shipped = shipped_recipes()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    raise ConfigError(
        f"recipe {str(name_or_path)!r}: there is no such file, and none of that name is shipped "
        f"({', '.join(shipped)}); pass one of these names or the path of a recipe"
    )


def new_run_folder(parent: Path) -> Path:
    """Make `<parent>/<n>`, with the first number above all that are there; of two processes each gets its own."""
    number = max((int(path.name) for path in parent.glob("*") if path.name.isdecimal()), default=0) + 1
    while True:
        with contextlib.suppress(FileExistsError):
            (parent / str(number)).mkdir(parents=True)
            return parent / str(number)
        number += 1


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A file beside `path` to be written, which takes its place at the end: readers see the old one or the new one.

    Args:
        path: file to replace or make; its folder exists.
        shared: several processes may write it at once.

    Raises:
        ConfigError: it is a folder.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, expected the name of a file to write")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def video_path(path: str | Path) -> str:
    """A path for OpenCV's videos, which end the process where a name is not UTF-8.

    Raises:
        DataError: it is such a one.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: got a name that is not UTF-8, which OpenCV cannot open; rename the file") from error
    return str(path)
