# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Asks a running node for its parameters and sets them, by the services that `ros2 param` uses.

`python -m clustvit_ros.demo.parameter_client NODE TIMEOUT_S list|get|set|describe [NAME [VALUE]]`;
`clustvit-ros param` starts it.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import rclpy
import yaml
from rcl_interfaces.msg import ParameterDescriptor
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParametersAtomically
from rclpy.executors import Executor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter, parameter_value_to_python

from clustvit_ros.errors import ClustvitError, ConfigError

_TYPES = {kind.value: kind.name.lower().replace("_", " ") for kind in Parameter.Type}


class ParameterClient:
    """The parameters of one running node.

    Args:
        node: who asks.
        executor: spins that node while an answer is awaited.
        name: of the node that is asked, e.g. "/segmentation"; relative names are in the asking node's namespace.
        timeout_s: how long to wait for each answer.
    """

    def __init__(self, node: Node, executor: Executor, name: str, timeout_s: float) -> None:
        self._node, self._executor = node, executor
        self._name, self._timeout_s = name.rstrip("/"), timeout_s

    def names(self) -> list[str]:
        """Names of all parameters, sorted."""
        return sorted(self._call(ListParameters, "list_parameters", ListParameters.Request()).result.names)

    def get(self, name: str) -> Any:
        """A parameter's value; None where it is not set.

        Raises:
            ConfigError: the node has none of that name.
        """
        self._check(name)
        (value,) = self._call(GetParameters, "get_parameters", GetParameters.Request(names=[name])).values
        return parameter_value_to_python(value)

    def describe(self, name: str) -> ParameterDescriptor:
        """Type, sentence and range.

        Raises:
            ConfigError: the node has none of that name.
        """
        self._check(name)
        request = DescribeParameters.Request(names=[name])
        return self._call(DescribeParameters, "describe_parameters", request).descriptors[0]

    def assign(self, **values: Any) -> None:
        """Set parameters together: all of them, or none.

        Raises:
            ConfigError: the node has none of a name, or refuses one, for the reason that it gives.
        """
        for name in values:
            self._check(name)
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        request = SetParametersAtomically.Request(parameters=parameters)
        result = self._call(SetParametersAtomically, "set_parameters_atomically", request).result
        if not result.successful:
            raise ConfigError(result.reason)

    def _check(self, name: str) -> None:
        if name not in self.names():
            raise ConfigError(f"{self._name} has no parameter {name!r}; `clustvit-ros param list` names those it has")

    def _call(self, kind: Any, service: str, request: Any) -> Any:
        client = self._node.create_client(kind, f"{self._name}/{service}")
        try:
            if not client.wait_for_service(self._timeout_s):
                names = ", ".join(sorted(self._others())) or "none"
                raise ClustvitError(
                    f"no node {self._name} within {self._timeout_s:g} s; nodes that are here: {names}; name one with "
                    "--node, and check that ROS_DOMAIN_ID is the same on both sides"
                )
            future = client.call_async(request)
            self._executor.spin_until_future_complete(future, self._timeout_s)
            if not future.done():
                raise ClustvitError(f"{self._name} did not answer within {self._timeout_s:g} s")
            return future.result()
        finally:
            self._node.destroy_client(client)

    def _others(self) -> set[str]:
        found = self._node.get_node_names_and_namespaces()
        return {f"{space.rstrip('/')}/{name}" for name, space in found if name != self._node.get_name()}


def _value(text: str) -> Any:
    """A value as YAML has it; what is no value of a parameter there, such as "a: b; c: d", is the text itself."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, int, float, str, list)) else text


def _run(client: ParameterClient, verb: str, words: list[str]) -> str:
    if verb == "list":
        return "\n".join(client.names())
    if verb == "get":
        return yaml.safe_dump(client.get(words[0]), default_flow_style=True).removesuffix("\n...\n").strip()
    if verb == "set":
        client.assign(**{name: _value(text) for name, text in zip(words[::2], words[1::2], strict=True)})
        return "\n".join(f"{name} is {client.get(name)} now" for name in words[::2])
    found = client.describe(words[0])
    lines = [f"{found.name}: {_TYPES.get(found.type, found.type)}", f"  {found.description}"]
    if found.additional_constraints:
        lines.append(f"  {found.additional_constraints}")
    return "\n".join([*lines, *(["  read only"] if found.read_only else [])])


def main() -> int:
    """Do what the command line says.

    Returns:
        0; 1 when the node refuses, 2 when it does not answer, 141 when nobody reads.
    """
    name, timeout, verb, *words = sys.argv[1:]
    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    node = rclpy.create_node("clustvit_parameter_client", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        print(_run(ParameterClient(node, executor, "/" + name.strip("/"), float(timeout)), verb, words), flush=True)
        return 0
    except BrokenPipeError:  # whoever read the output has had enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ClustvitError, yaml.YAMLError, TypeError) as error:  # the last: a value of no parameter type
        print(f"clustvit-ros: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ConfigError) else 2
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


if __name__ == "__main__":
    sys.exit(main())
