# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Every exception that this package raises on purpose.

ClustvitError
├── ConfigError        a configuration or parameter value that cannot be used
├── ModelError         a model folder or checkpoint that cannot be loaded
├── ImageError         an image or image message that cannot be segmented
├── DataError          a data set that cannot be trained or evaluated on
├── BagError           a recorded bag that cannot be read or labelled
└── EngineError        a device or execution provider that cannot run the model

Messages say what was wrong, what was got, what was expected, and what to do about it.
"""

from __future__ import annotations

import sys


class ClustvitError(Exception):
    """Base of all errors of this package."""


class ConfigError(ClustvitError, ValueError):
    """A configuration or parameter value that cannot be used."""


class ModelError(ClustvitError):
    """A model folder or checkpoint that cannot be loaded."""


class ImageError(ClustvitError, ValueError):
    """An image or image message that cannot be segmented."""


class DataError(ClustvitError):
    """A data set that cannot be trained or evaluated on."""


class BagError(ClustvitError):
    """A recorded bag that cannot be read or labelled."""


class EngineError(ClustvitError, RuntimeError):
    """A device or execution provider that cannot run the model."""


def missing_package(error: ImportError, user: str) -> str:
    """What to say where a Python package is not there, or does not work: often it is there for another interpreter.

    Args:
        error: from the import.
        user: what needs it.
    """
    problem = "does not find" if isinstance(error, ModuleNotFoundError) else f"cannot import ({error})"
    return (
        f"{user} needs the Python package {error.name!r}, which {sys.executable} {problem}; install it there, or "
        "activate the virtual environment that has it"
    )


def printable(problem: object) -> str:
    """What to say of a problem on a terminal: names of files, classes and topics may hold escape codes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(problem))
