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
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from clustvit_ros.errors import ConfigError
from clustvit_ros.policy.parameter_spec import ParameterSpec, specs_of

T = TypeVar("T")


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
            values[spec.name] = spec.parsed(self._node.declare_parameter(spec.name, spec.default, untyped).value)
        self._values = {
            **self._values, prefix: table(**{name.removeprefix(prefix): value for name, value in values.items()})
        }  # fmt: skip
        for spec in specs:
            self._node.set_descriptor(spec.name, descriptor_of(spec))
            self._specs[spec.name] = (prefix, spec)

    def warn_of_unknown(self, gone: Mapping[str, str]) -> None:
        """Log a warning for every value from file or command line that no parameter takes.

        Args:
            gone: ending of a name that used to be one -> what holds now.
        """
        known = {name.removeprefix(".") for name in self._node._parameters}
        for name in sorted(set(self._node._parameter_overrides) - known):
            if name.startswith("qos_overrides."):
                continue  # taken when its topic is made
            reason = next((text for ending, text in gone.items() if name.endswith(ending)), "")
            hint = reason or "is its name spelt right? `ros2 param list` shows all"
            self._node.get_logger().warning(f"parameter {name}: has no effect, there is none of that name; {hint}")

    def _on_set(self, parameters: list[Parameter]) -> SetParametersResult:
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
        self._changed(old[""], new[""])
        return SetParametersResult(successful=True)


def _refused(reason: str) -> SetParametersResult:
    return SetParametersResult(successful=False, reason=reason)
