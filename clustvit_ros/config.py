# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Strict, typed configuration: a mapping becomes a frozen dataclass, or one clear error says why not.

Unknown keys, missing keys and wrong types are errors that name the key's full path; an integer is accepted where a
float is expected, a list where a tuple is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from clustvit_ros.errors import ConfigError

T = TypeVar("T")

# YAML 1.1 takes 1e-3 for text, since it has no point.
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d{1,3}")
# Configuration is written by hand; a model.yaml has some hundred lines.
_LONGEST_YAML_BYTES = 1 << 20
_MOST_YAML_VALUES = 200_000
_NUMBERS, _LONGEST_NUMBER = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"), 400


def _load_yaml(text: str) -> Any:
    """`yaml.safe_load`, but a few lines of references cannot stand for gigabytes."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MOST_YAML_VALUES:
            raise yaml.YAMLError(f"references multiply it to more than {_MOST_YAML_VALUES} values; write them out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Values below `node`, those behind references counted each time; infinite where it holds itself."""
    if isinstance(node, yaml.ScalarNode):
        # YAML reads 1:59:59 as a number, at a cost that grows with the square of its length.
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number of {len(node.value)} characters; expected at most {_LONGEST_NUMBER}")
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is done: whoever finds this is below it
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node)
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count_values(child, known) for child in children)
    return known[id(node)]


def _refuse_repeated_keys(mapping: yaml.MappingNode) -> None:
    """YAML itself takes the last of several, so that a value that somebody reads in the file does not hold."""
    keys: dict[tuple[str, str], yaml.ScalarNode] = {}
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            first = keys.setdefault((key.tag, key.value), key)
            if first is not key:
                lines = first.start_mark.line + 1, key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value!r} stands in lines {lines[0]} and {lines[1]}; expected it once")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, too large, not YAML, or holds something else than a mapping.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: got a folder or device, expected a YAML file")
        size = path.stat().st_size
        if size > _LONGEST_YAML_BYTES:
            raise ConfigError(
                f"{path}: got {size} bytes, expected at most {_LONGEST_YAML_BYTES}; is it the right file?"
            )
        content = _load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except RecursionError:
        raise ConfigError(f"{path}: not a valid YAML file: nested too deeply") from None
    # ValueError: dates that do not exist, numbers of thousands of digits.
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a valid YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__} at the top level, expected key: value pairs")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); restore it, or pass another") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, expected an object; restore it, or pass another")
    return content


def from_mapping(cls: type[T], mapping: Any, where: str) -> T:
    """Build dataclass `cls` from `mapping`.

    Args:
        cls: a dataclass whose annotations are plain types, tuples, optionals, literals, lists or further dataclasses.
        mapping: what a YAML or JSON file held.
        where: what errors call this mapping, e.g. "models/camvid_tiny/model.yaml: input".

    Raises:
        ConfigError: unknown or missing key, or a value of another type than annotated.
    """
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: got {mapping!r}, expected key: value pairs")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
    types_ = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(types_[name], mapping[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: {name} is missing, expected {_describe(types_[name])}")
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`: plain lists and dicts, every field included."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in args if option is not type(None))
    if origin is tuple and args[-1] is Ellipsis:
        return "a list" if args[0] is Any else f"a list, each {_describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(map(_describe, args))}"
    if dataclasses.is_dataclass(kind) or origin is dict or kind is dict:
        return "key: value pairs"
    return getattr(kind, "__name__", str(kind))


def check_kind(kind: type, value: Any, where: str) -> None:
    """Refuse what is there and of another kind, before anything is made of it.

    Raises:
        ConfigError: what was got, and expected.
    """
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{where}: got {value!r} ({type(value).__name__}), expected {_describe(kind)}")


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        *kinds, last = (arg for arg in args if arg is not type(None))
        for kind in kinds:
            with contextlib.suppress(ConfigError):
                return _convert(kind, value, where)
        return _convert(last, value, where)
    if origin is typing.Literal and value in args:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_mapping(kind, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(args) == len(value):
            return tuple(
                _convert(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True))
            )
    if origin is dict and isinstance(value, dict):
        return {key: _convert(args[1], item, f"{where}: {key}") for key, item in value.items()}
    if kind is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ConfigError(f"{where}: got {value!r} ({type(value).__name__}), expected {_describe(kind)}")
