#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Writes docs/reference.md from the code: parameters from their declarations, topics from a running node.

Needs rclpy; where vision_msgs is not installed, the tests' stand-in takes its place. What a topic means stands in the
README's table of topics, which must name every one of them. A test holds the file against this script.

scripts/write_reference.py [--output docs/reference.md]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from clustvit_ros.dds import claim_domain

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs" / "reference.md"

# Every node of rclpy has these; they are ROS 2's own.
_OF_EVERY_NODE = {"/rosout", "/parameter_events", "/clock"}
# What the tests put in the place of vision_msgs.
_STAND_IN = ROOT / "test" / "node" / "fake_messages"
_MOST_LOOKS, _BETWEEN_LOOKS_S = 40, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    os.environ["ROS_DOMAIN_ID"] = str(claim_domain())
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    if importlib.util.find_spec("vision_msgs") is None:
        sys.path.insert(0, str(_STAND_IN))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(reference(), encoding="utf-8")
    print(args.output)


def reference() -> str:
    """The whole document."""
    from clustvit_ros.demo.camera import CameraNodeParameters
    from clustvit_ros.demo.recorder import RecorderParameters
    from clustvit_ros.policy.parameter_spec import parameter_table
    from clustvit_ros.policy.parameters import SegmentationParameters

    return f"""# Reference

Written by `scripts/write_reference.py` from the code; change it there.

## Topics of the segmentation node

As they resolve by default; every name is relative to the node's namespace, but `/diagnostics`. QoS is what the node
asks for and offers; `qos_overrides` parameters change it.

{topics()}

## Services of the segmentation node

{services()}

## Parameters of the segmentation node

"Live" parameters take effect on the next frame; the others need the node unconfigured, or a restart.

{parameter_table(SegmentationParameters)}

## Parameters of the camera node

{parameter_table(CameraNodeParameters)}

## Parameters of the recorder node

{parameter_table(RecorderParameters)}
"""


def topics() -> str:
    """A table of the topics that an active node has, with their QoS."""
    rows = {}
    for transport in ("raw", "compressed"):
        for name, direction, kind, qos in _endpoints(transport):
            rows[name] = f"| `{name}` | `{kind}` | {direction} | {qos} | {_meaning(name)} |"
    head = ["| Topic | Type | Direction | QoS | Meaning |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(rows[name] for name in sorted(rows))])


def services() -> str:
    """A table of the node's services that not every rclpy node has."""
    import rclpy
    from rclpy.node import Node

    context = rclpy.Context()
    rclpy.init(context=context)
    try:
        plain, node = Node("plain", context=context), _node(context, "raw")
        everybody = {name.split("/")[-1] for name, _ in _served(plain, plain)}
        rows = sorted(f"| `{name}` | `{_short(kinds[0])}` |" for name, kinds in _served(node, node)
                      if name.split("/")[-1] not in everybody)  # fmt: skip
        _close(node)
        plain.destroy_node()
    finally:
        rclpy.shutdown(context=context)
    return "\n".join(["| Service | Type |", "|---|---|", *rows])


def _served(node: Any, asked: Any) -> list[tuple[str, list[str]]]:
    """A node's services, once they have all been discovered: a loaded machine takes its time even with a node's own."""
    found: list[tuple[str, list[str]]] = []
    for _ in range(_MOST_LOOKS):
        time.sleep(_BETWEEN_LOOKS_S)
        before, found = found, node.get_service_names_and_types_by_node(asked.get_name(), asked.get_namespace())
        if found and found == before:
            return found
    raise SystemExit(f"the services of {asked.get_name()} were not discovered")


def _endpoints(transport: str) -> list[tuple[str, str, str, str]]:
    """(topic, direction, type, QoS) of an active node."""
    import rclpy
    from rclpy.node import Node
    from sensor_msgs.msg import Image, PointCloud2
    from vision_msgs.msg import LabelInfo

    context = rclpy.Context()
    rclpy.init(context=context)
    try:
        node = _node(context, transport)
        # Clouds, and depth where there are none, are listened to while somebody wants labelled points.
        consumer = Node("consumer", context=context)
        consumer.create_subscription(PointCloud2, "segmentation/points", lambda message: None, 5)
        if transport == "compressed":
            consumer.create_publisher(Image, "depth", 5)
        time.sleep(_BETWEEN_LOOKS_S)
        if not node.autostart():
            raise SystemExit("the node did not start")
        # The node's own endpoints: discovery would mix in what it still remembers of another node of this name.
        found = []
        for direction, endpoints in (("in", node.subscriptions), ("out", node.publishers)):
            for endpoint in endpoints:
                name, kind = endpoint.topic_name, endpoint.msg_type
                if name in _OF_EVERY_NODE or name.startswith("/segmentation/transition_event"):
                    continue
                package = kind.__module__.split(".")[0]
                # Its stand-in travels as another type.
                full = "vision_msgs/LabelInfo" if kind is LabelInfo else f"{package}/{kind.__name__}"
                found.append((name, direction, full, _qos(endpoint.qos_profile)))
        _close(node)
        consumer.destroy_node()
        return found
    finally:
        rclpy.shutdown(context=context)


def _node(context: Any, transport: str) -> Any:
    from rclpy.parameter import Parameter

    from clustvit_ros.node.node import SegmentationNode

    overrides = {"engine": "scripted", "image_transport": transport, "autostart": False}
    return SegmentationNode(
        context=context,
        parameter_overrides=[Parameter(name, value=value) for name, value in overrides.items()],
    )


def _close(node: Any) -> None:
    node.close()
    node.destroy_node()


def _qos(profile: Any) -> str:
    words = (profile.reliability.name, profile.durability.name)
    return ", ".join(word.lower().replace("_", " ") for word in words)


def _short(kind: str) -> str:
    return kind.replace("/msg/", "/").replace("/srv/", "/")


def _meaning(topic: str) -> str:
    """What the README's table says of a topic."""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) >= 4 and re.fullmatch(rf"`{re.escape(topic)}`", cells[0]):
            return cells[-1]
    raise SystemExit(f"{topic}: the README's table of topics does not say what it is; add a row")


if __name__ == "__main__":
    main()
