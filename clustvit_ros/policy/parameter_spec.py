# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Node parameters as frozen dataclasses: one declaration gives type, default, range, unit and sentence.

A table holds each value parsed, so that nothing that reads it parses again. Everything that needs ROS (descriptors,
declaration, the set callback) is in `node.parameter_server`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

from clustvit_ros.errors import ConfigError

T = TypeVar("T")

_TYPE_NAMES = {bool: "bool", int: "integer", float: "double", str: "string"}


@dataclass(frozen=True)
class ParameterSpec:
    """What one parameter accepts, and what it means.

    Args:
        name: the parameter's name.
        kind: bool, int, float or str; an integer is accepted for a float.
        default: value when nobody sets one.
        description: one sentence.
        minimum: lowest accepted number, None for no bound.
        maximum: highest accepted number, None for no bound.
        choices: accepted values, empty for no restriction.
        pattern: regular expression that a string must match in full, empty for no restriction.
        form: what `pattern` accepts, in words.
        separator: what joins the strings of an array, which a string parameter with a separator takes as well.
        parse: makes the table's value of an accepted value; raises ConfigError for one that makes no sense.
        accepts_integer: whether a string parameter takes an integer for its decimal form (`source: 0`).
        unit: physical unit, empty for none.
        live: a change takes effect on the next frame; otherwise the node must be cleaned up first.
        fixed: cannot change while the node runs, in whatever state.
    """

    name: str
    kind: type
    default: Any
    description: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    pattern: str = ""
    form: str = ""
    separator: str = ""
    parse: Callable[[Any], Any] | None = None
    accepts_integer: bool = False
    unit: str = ""
    live: bool = False
    fixed: bool = False

    @property
    def type_name(self) -> str:
        """The type's name in ROS 2: bool, integer, double, string, or string (array)."""
        return _TYPE_NAMES[self.kind] + (" (array)" if self.separator else "")

    @property
    def range_text(self) -> str:
        """The accepted values in words, e.g. "0.0 to 1.0"; empty when every value of the type is accepted."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        if self.form:
            return self.form
        if self.minimum is not None and self.maximum is not None:
            return f"{self.kind(self.minimum)} to {self.kind(self.maximum)}"
        return ""

    def coerce(self, value: Any) -> Any:
        """Check `value` and return it in the parameter's own type.

        Raises:
            ConfigError: wrong type, not finite, or outside the range.
        """
        if self.separator and not isinstance(value, str):
            value = self._joined(value)
        kind = type(value)
        widened = kind is int and (self.kind is float or self.accepts_integer)
        if kind is not self.kind and not widened:
            raise self._refusal(f"{value!r} ({_TYPE_NAMES.get(kind, kind.__name__)})")
        coerced = self.kind(value)
        if not self._in_range(coerced):
            raise self._refusal(repr(value))
        return coerced

    def parsed(self, value: Any) -> Any:
        """The table's value for `value`.

        Raises:
            ConfigError: as `coerce`, or from `parse`.
        """
        coerced = self.coerce(value)
        return self.parse(coerced) if self.parse else coerced

    def _joined(self, value: Any) -> Any:
        # An empty array arrives without its type, as bytes or as nothing at all.
        if value is None or (isinstance(value, Sized) and not len(value)):
            return ""
        if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
            return self.separator.join(value)
        return value

    def _in_range(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.kind is str:
            return bool(re.fullmatch(self.pattern or ".*", value, re.S))
        low = -math.inf if self.minimum is None else self.minimum
        high = math.inf if self.maximum is None else self.maximum
        return math.isfinite(value) and low <= value <= high

    def _refusal(self, got: str) -> ConfigError:
        wanted = f"{'an' if self.kind is int else 'a'} {self.type_name}"
        if self.choices:
            wanted = f"one of {self.range_text}"
        elif self.kind is str and self.range_text:
            wanted = self.range_text
        elif self.range_text:
            wanted += f" from {self.range_text}"
        unit = f" {self.unit}" if self.unit else ""
        return ConfigError(f"{self.name}: got {got}, expected {wanted}{unit}")


def parameter(default: Any, description: str, **limits: Any) -> Any:
    """A dataclass field that is a node parameter; `limits` are the further arguments of `ParameterSpec`."""
    parse = limits.get("parse")
    metadata = {"default": default, "description": description, **limits}
    return dataclasses.field(default=parse(default) if parse else default, metadata=metadata)


def specs_of(table: type, prefix: str = "") -> tuple[ParameterSpec, ...]:
    """The parameters that dataclass `table` declares, in order, `prefix` before their names."""
    return tuple(
        ParameterSpec(name=prefix + field.name, kind=type(field.metadata["default"]), **field.metadata)
        for field in dataclasses.fields(table)
    )


def build(table: type[T], values: Mapping[str, Any]) -> T:
    """Make an instance of `table`; what `values` lacks keeps its default.

    Raises:
        ConfigError: a value that its parameter does not accept.
    """
    specs = {spec.name: spec for spec in specs_of(table)}
    return table(**{name: specs[name].parsed(value) for name, value in values.items()})


def parameter_table(table: type, prefix: str = "") -> str:
    """The parameters of `table` as a Markdown table, one row each, `prefix` before their names."""
    rows = ["| Parameter | Type | Default | Range | Live | Meaning |", "|---|---|---|---|---|---|"]
    for spec in specs_of(table):
        default = str(spec.default).lower() if spec.kind is bool else str(spec.default)
        default = f"`{default}`" if default else "empty"
        unit = f" {spec.unit}" if spec.unit else ""
        live = "yes" if spec.live else "no"
        range_text = f"{spec.range_text}{unit}" if spec.range_text else ""
        name = f"`{prefix}{spec.name}`"
        rows.append(f"| {name} | {spec.type_name} | {default} | {range_text} | {live} | {spec.description} |")
    return "\n".join(rows)
