# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Strict configuration: what becomes a dataclass, and what one clear error says of the rest."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

import pytest

from clustvit_ros.config import from_mapping, read_yaml, to_mapping
from clustvit_ros.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    rate: float = 1.0
    mode: Literal["a", "b"] = "a"
    note: str | None = None
    items: tuple[Inner, ...] = ()
    extra: dict[str, int] = field(default_factory=dict)


GOOD = {"name": "x", "inner": {"size": [1, 2]}}


def test_round_trip():
    config = from_mapping(Outer, {**GOOD, "rate": 3, "items": [{"size": [3, 4]}], "note": None}, "f")
    assert config == Outer("x", Inner((1, 2)), 3.0, items=(Inner((3, 4)),))
    assert from_mapping(Outer, to_mapping(config), "f") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"naem": 1}, "f: unknown key 'naem'; did you mean 'name'?"),
        ({"name": 5}, "f: name: got 5 (int), expected str"),
        ({"rate": True}, "f: rate: got True (bool), expected float"),
        ({"rate": float("nan")}, "f: rate: got nan"),
        ({"mode": "c"}, "f: mode: got 'c' (str), expected one of 'a', 'b'"),
        ({"inner": {"size": [1]}}, "f: inner: size: got [1]"),
        ({"inner": {"size": [1, "2"]}}, "f: inner: size[1]: got '2' (str), expected int"),
        ({"inner": 7}, "f: inner: got 7, expected key: value pairs"),
        ({"items": [{"size": [1, 2]}, {}]}, "f: items[1]: size is missing"),
    ],
)
def test_errors_name_the_path_and_what_was_expected(change, message):
    with pytest.raises(ConfigError) as error:
        from_mapping(Outer, {**GOOD, **change}, "f")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00", None])
def test_files_that_are_no_mappings(tmp_path, text):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_yaml(path)


BILLION_LAUGHS = "a: &a [x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}]\n" for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 2,\n  d: 3, c: 4}", r"'c' stands in lines 2 and 3; expected it once"),
        ("a: 1\n'a': 2", r"'a' stands in lines 1 and 2"),
        (BILLION_LAUGHS, "references multiply it"),
        ("a: &a [*a]", "references multiply it"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: " + "1" * 10_000, "not a valid YAML file"),
        ("a: 2026-99-99", "not a valid YAML file"),
        ("a: !!python/object/apply:os.mkdir [/tmp/pwned]", "not a valid YAML file"),
        ("# " + "x" * (1 << 20), "expected at most 1048576"),
    ],
)
def test_files_that_were_made_to_do_harm(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert message in str(error.value)
    assert not os.path.exists("/tmp/pwned")


def test_pipes_and_folders_are_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="expected a YAML file"):
            read_yaml(path)


def test_references_that_stand_for_little_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &size [1, 2]\nb: *size\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": [1, 2], "b": [1, 2]}
    (tmp_path / "c.yaml").write_text("a: &size {x: 1}\nb: {<<: *size, y: 2}\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize("value", [":".join(["1"] + ["59"] * 200_000), "9" * 5000, "1" + "_0" * 3000 + ".5"])
def test_numbers_that_take_long_to_read_are_refused(tmp_path, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"value: {value}\n")
    with pytest.raises(ConfigError, match=r"a number of .* characters"):
        read_yaml(path)


def test_names_that_a_terminal_would_obey_are_refused_and_thousands_are_counted_once():
    from clustvit_ros.classes import ClassSet

    names = tuple(f"class {index}" for index in range(10_000))
    assert len(ClassSet(names, ((0, 0, 0),) * len(names))) == 10_000
    with pytest.raises(ConfigError, match=r"repeated or empty .'class 3'"):
        ClassSet((*names, "class 3"), ((0, 0, 0),) * 10_001)
    for name in ("\x1b[31mroad", "a\nb", "a\u202eb"):
        with pytest.raises(ConfigError, match="names must be printable") as error:
            ClassSet((name,), ((0, 0, 0),))
        assert str(error.value).isprintable()
