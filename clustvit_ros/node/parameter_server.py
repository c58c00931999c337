# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Declares a parameter table on a node and keeps one immutable, always consistent set of its values.

rclpy refuses an integer for a double parameter, at declaration by killing the node. So every parameter is declared with
dynamic typing, and the table checks the type itself. A set request is checked whole before anything changes: all of
its values apply, or none.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from clustvit_ros.config import read_yaml
from clustvit_ros.errors import ConfigError
from clustvit_ros.policy.parameter_spec import ParameterSpec, specs_of

T = TypeVar("T")
_QOS = "qos_overrides."


def descriptor_of(spec: ParameterSpec) -> ParameterDescriptor:
    """What `ros2 param describe` and rqt show of a parameter."""
    descriptor = ParameterDescriptor(
        name=spec.name, description=spec.description, additional_constraints=spec.range_text, dynamic_typing=True
    )
    if spec.unit:
        descriptor.description += f" [{spec.unit}]"
    if spec.minimum is not None and spec.maximum is not None:
        if spec.kind is float:
            descriptor.floating_point_range = [FloatingPointRange(from_value=spec.minimum, to_value=spec.maximum)]
        else:
            descriptor.integer_range = [IntegerRange(from_value=int(spec.minimum), to_value=int(spec.maximum), step=1)]
    return descriptor


class ParameterServer(Generic[T]):
    """The parameters of one node: one table, and further ones whose parameters have a prefix.

    Args:
        node: node to declare them on.
        table: dataclass of `parameter_spec.parameter` fields.
        locked: says why parameters that are not live cannot change now, or None when they can.
        check: gets the values in force and those that are to replace them; raises ConfigError to refuse the change.
        changed: called once the new values are in force, with those that were and those that are.

    Raises:
        ConfigError: a start value from file or command line that its parameter does not accept.
    """

    def __init__(
        self, node: Node, table: type[T], locked: Callable[[], str | None] = lambda: None,
        check: Callable[[T, T], None] = lambda old, new: None, changed: Callable[[T, T], None] = lambda old, new: None,
    ) -> None:  # fmt: skip
        self._node = node
        self._locked = locked
        self._check, self._changed = check, changed
        self._specs: dict[str, tuple[str, ParameterSpec]] = {}
        # Replaced as a whole: whoever reads it sees one consistent set of all tables.
        self._values: dict[str, Any] = {}
        self.add("", table)
        node.add_on_set_parameters_callback(self._on_set)

    @property
    def current(self) -> T:
        """The values in force. Any thread may read this; what it returned never changes."""
        return self._values[""]

    @property
    def tables(self) -> Mapping[str, Any]:
        """Prefix -> the values in force, all of one moment; the first table has the empty prefix."""
        return self._values

    def add(self, prefix: str, table: type) -> None:
        """Declare a further table, its names after `prefix`.

        Raises:
            ConfigError: a start value that its parameter does not accept.
        """
        values: dict[str, Any] = {}
        specs = specs_of(table, prefix)
        for spec in specs:
            # Declared without its range, so that a bad start value is refused in this table's words.
            untyped = ParameterDescriptor(dynamic_typing=True)
            item = self._node.declare_parameter(spec.name, spec.default, untyped)
            values[spec.name] = spec.parsed(item.value)
            _widen(item, spec)
        self._values = {
            **self._values, prefix: table(**{name.removeprefix(prefix): value for name, value in values.items()})
        }  # fmt: skip
        for spec in specs:
            self._node.set_descriptor(spec.name, descriptor_of(spec))
            self._specs[spec.name] = (prefix, spec)

    def warn_of_unknown(self, gone: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
        """Log a warning for every value from file or command line that no parameter takes.

        Args:
            gone: ending of a name that used to be one -> what holds now.
            arguments: the process's own, which name the parameter files.
        """
        known = {name.removeprefix(".") for name in self._node._parameters}
        for name in sorted(set(self._node._parameter_overrides) - known):
            if not name.startswith(_QOS):  # taken when its topic is made
                reason = next((text for ending, text in gone.items() if name.endswith(ending)), "")
                self._warn_of(name, known, reason)
        own = self._node.get_fully_qualified_name()
        for source, names in _addressees(arguments):
            if not any(re.fullmatch(_pattern_of(name), own) for name in names):
                self._node.get_logger().warning(
                    f"{source}: has no effect, it is for {', '.join(names[:5]) or 'no node'} and this node is {own}; "
                    "name that, or `/**` for every node"
                )

    def warn_of_unknown_qos(self) -> None:
        """Log a warning for every override of a topic's QoS that no topic took; once the topics are there."""
        known = {name for name in self._node._parameters if name.startswith(_QOS)}
        for name in sorted(set(self._node._parameter_overrides) - known):
            if name.startswith(_QOS):
                self._warn_of(name, known, "")

    def _warn_of(self, name: str, known: Collection[str], reason: str) -> None:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = reason or (f"did you mean {nearest[0]}?" if nearest else "`ros2 param list` shows all")
        self._node.get_logger().warning(f"parameter {name}: has no effect, there is none of that name; {hint}")

    def keep_types(self, parameters: Sequence[Parameter]) -> None:
        """Describe parameters by the types that they have; rclpy has noted those of a request that was refused."""
        for item in parameters:
            if item.name in self._specs:
                self._node.describe_parameter(item.name).type = self._node.get_parameter(item.name).type_.value

    def _on_set(self, parameters: list[Parameter]) -> SetParametersResult:
        result = self._answer(parameters)
        if not result.successful:
            self.keep_types(parameters)
        return result

    def _answer(self, parameters: list[Parameter]) -> SetParametersResult:
        changes: dict[str, dict[str, Any]] = {}
        for item in parameters:
            # The clock's own callback runs after this one: what it would refuse must not be half applied.
            if item.name == "use_sim_time" and not isinstance(item.value, bool):
                return _refused(f"use_sim_time: got {item.value!r}, expected a bool")
            if item.name not in self._specs:
                continue
            prefix, spec = self._specs[item.name]
            if item.type_ == Parameter.Type.NOT_SET:
                default = f"{spec.default!r}" if spec.default != "" else "empty"
                return _refused(f"{item.name}: cannot be deleted; set it to its default, {default}, instead")
            field = item.name.removeprefix(prefix)
            try:
                value = spec.parsed(item.value)
            except ConfigError as error:
                return _refused(str(error))
            if value != getattr(self._values[prefix], field):
                reason = None if spec.live else self._locked()
                if spec.fixed:
                    reason = "cannot change while the node runs; restart it with the new value"
                if reason:
                    return _refused(f"{item.name}: {reason}")
            changes.setdefault(prefix, {})[field] = value
        old = self._values
        try:
            new = {**old, **{prefix: dataclasses.replace(old[prefix], **values) for prefix, values in changes.items()}}
            self._check(old[""], new[""])
        except ConfigError as error:
            return _refused(str(error))
        self._values = new
        for item in parameters:
            if item.name in self._specs:
                _widen(item, self._specs[item.name][1])
                self._node.describe_parameter(item.name).type = item.type_.value
        self._changed(old[""], new[""])
        return SetParametersResult(successful=True)


def _widen(item: Parameter, spec: ParameterSpec) -> None:
    """Give an integer the type of its parameter, for whoever asks for type or value; rclpy stores what was sent."""
    if spec.kind is float and item.type_ == Parameter.Type.INTEGER:
        item._type_, item._value = Parameter.Type.DOUBLE, float(item.value)


def _addressees(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """What the command line gives to nodes by name: a parameter file or a single value, and the names."""
    for flag, after in pairwise(arguments):
        if flag == "--params-file":
            yield after, _nodes_in(Path(after))
        elif flag in ("-p", "--param") and ":" in (addressee := after.partition(":=")[0]):
            yield after, [addressee.rpartition(":")[0]]


def _nodes_in(file: Path) -> list[str]:
    """Names of the nodes that a parameter file has values for, wildcards included."""

    def walk(level: Any, path: str) -> Iterator[str]:
        for key, value in level.items() if isinstance(level, dict) else ():
            if key == "ros__parameters":
                yield path or "/**"
            else:
                yield from walk(value, f"{path}/{str(key).strip('/')}")

    try:
        return list(walk(read_yaml(file), ""))
    except ConfigError:  # rcl has read it, and knows better
        return ["/**"]


def _pattern_of(name: str) -> str:
    """A node's name in a parameter file, where `*` is one part and `**` any number of them, as a regular expression."""
    parts = {"*": r"/\w+", "**": r"(/\w+)*"}
    return "".join(parts.get(part, f"/{re.escape(part)}") for part in name.strip("/").split("/"))


def _refused(reason: str) -> SetParametersResult:
    return SetParametersResult(successful=False, reason=reason)
