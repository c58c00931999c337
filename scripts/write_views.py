#!/usr/bin/env python3
# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Writes config/rviz/segmentation.rviz and config/foxglove/segmentation.json; a test compares them with this script.

scripts/write_views.py [--model NAME] [--image-topic /camera/image_raw] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from clustvit_ros.classes import IGNORE_INDEX, ClassSet
from clustvit_ros.dds import CAMERA_TOPIC
from clustvit_ros.networks import load_config
from clustvit_ros.paths import share_dir

MODEL, IMAGE_TOPIC = "camvid_tiny", f"/{CAMERA_TOPIC}"
_SERIES = ("tokens_kept", "token_capacity")
_TIMES = ("engine_ms", "age_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"whose classes the legend shows (default: {MODEL})")
    parser.add_argument("--image-topic", default=IMAGE_TOPIC, help=f"the camera's (default: {IMAGE_TOPIC})")
    parser.add_argument("--output", type=Path, default=share_dir() / "config", help="folder for rviz/ and foxglove/")
    args = parser.parse_args()
    classes = load_config(args.model).classes
    for path, text in (
        (args.output / "rviz" / "segmentation.rviz", rviz(args.image_topic)),
        (args.output / "foxglove" / "segmentation.json", foxglove(args.image_topic, args.model, classes)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


def rviz(image_topic: str) -> str:
    """A configuration for RViz 2: camera, overlay, confidence, clusters, the mask, which looks black, and points."""
    displays = [
        _rviz_image("Camera", image_topic, "Best Effort"),
        _rviz_image("Overlay (class colours)", "/segmentation/overlay", "Reliable"),
        _rviz_image("Confidence", "/segmentation/confidence", "Reliable"),
        _rviz_image("Clusters (0 = kept)", "/segmentation/clusters", "Reliable", enabled=False),
        # Class ids are small numbers: only for reading values, the overlay is for looking.
        _rviz_image("Mask (class ids, dark)", "/segmentation/mask", "Reliable", enabled=False),
        # Its rainbow is RViz's own, over the ids; the fixed frame must be the camera's, or one that tf knows it in.
        {
            "Class": "rviz_default_plugins/PointCloud2", "Enabled": False, "Name": "Labelled points",
            "Color Transformer": "Intensity", "Channel Name": "label", "Use rainbow": True, "Style": "Points",
            "Size (Pixels)": 2, "Topic": _rviz_topic("/segmentation/points", "Reliable"), "Value": False,
        },
    ]  # fmt: skip
    content = {
        "Panels": [
            {"Class": "rviz_common/Displays", "Name": "Displays", "Help Height": 0, "Tree Height": 400},
            {"Class": "rviz_common/Time", "Name": "Time", "Experimental": False, "SyncMode": 0, "SyncSource": ""},
        ],
        "Visualization Manager": {
            "Class": "",
            "Displays": displays,
            "Enabled": True,
            # Images alone need no transform; RViz wants the name of some frame all the same.
            "Global Options": {
                "Background Color": "48; 48; 48",
                "Fixed Frame": "camera_optical_frame",
                "Frame Rate": 30,
            },
            "Name": "root",
            "Tools": [{"Class": "rviz_default_plugins/MoveCamera"}],
            "Value": True,
            "Views": {"Current": {"Class": "rviz_default_plugins/Orbit", "Name": "Current View"}, "Saved": None},
        },
        "Window Geometry": {"Height": 900, "Width": 1400, "Hide Left Dock": False, "Hide Right Dock": True},
    }
    return yaml.safe_dump(content, sort_keys=False)


def _rviz_image(name: str, topic: str, reliability: str, enabled: bool = True) -> dict[str, Any]:
    return {
        "Class": "rviz_default_plugins/Image",
        "Enabled": enabled,
        "Name": name,
        "Normalize Range": False,
        "Topic": _rviz_topic(topic, reliability),
        "Value": enabled,
    }


def _rviz_topic(topic: str, reliability: str) -> dict[str, Any]:
    return {
        "Depth": 5,
        "Durability Policy": "Volatile",
        "History Policy": "Keep Last",
        "Reliability Policy": reliability,
        "Value": topic,
    }


def foxglove(image_topic: str, model: str, classes: ClassSet) -> str:
    """A layout for Foxglove: pictures, legend, statistics over time, diagnostics, and the parameters to turn."""
    panels: dict[str, dict[str, Any]] = {
        "Image!camera": _foxglove_image("Camera", image_topic),
        "Image!overlay": _foxglove_image("Overlay", "/segmentation/overlay"),
        "Image!confidence": _foxglove_image("Confidence", "/segmentation/confidence"),
        "Markdown!legend": {"foxglovePanelTitle": "Classes", "markdown": legend(model, classes), "fontSize": 12},
        "Plot!tokens": _foxglove_plot("Tokens", _SERIES),
        "Plot!latency": _foxglove_plot("Latency (ms)", _TIMES),
        "DiagnosticSummary!all": {
            "topicToRender": "/diagnostics", "minLevel": 0, "pinnedIds": [], "hardwareIdFilter": "",
            "sortByLevel": True,
        },
        "Parameters!all": {"title": "Parameters: merge_threshold, latency_budget_ms"},
    }  # fmt: skip
    pictures = _split("row", "Image!camera", "Image!overlay", 50)
    below = _split("row", "Image!confidence", _split("column", "Plot!tokens", "Plot!latency", 50), 35)
    side = _split("column", "Markdown!legend", _split("column", "Parameters!all", "DiagnosticSummary!all", 55), 45)
    content = {
        "configById": panels,
        "globalVariables": {},
        "userNodes": {},
        "playbackConfig": {"speed": 1},
        "layout": _split("row", _split("column", pictures, below, 60), side, 74),
    }
    return json.dumps(content, indent=2) + "\n"


def legend(model: str, classes: ClassSet) -> str:
    """The classes with their ids and colours, as Markdown."""
    rows = [
        f"| {index} | {name} | `#{red:02x}{green:02x}{blue:02x}` |"
        for index, (name, (red, green, blue)) in enumerate(zip(classes.names, classes.colours, strict=True))
    ]
    head = [f"**{model}**", "", "| id | class | colour |", "|---|---|---|"]
    return "\n".join([*head, *rows, f"| {IGNORE_INDEX} | unlabelled | the image |"])


def _foxglove_image(title: str, topic: str) -> dict[str, Any]:
    return {"foxglovePanelTitle": title, "imageMode": {"imageTopic": topic}}


def _foxglove_plot(title: str, keys: tuple[str, ...]) -> dict[str, Any]:
    paths = [
        {
            "value": f'/segmentation/stats.status[0].values[:]{{key=="{key}"}}.value',
            "label": key,
            "enabled": True,
            "timestampMethod": "receiveTime",
        }
        for key in keys
    ]
    return {
        "foxglovePanelTitle": title, "paths": paths, "showXAxisLabels": True, "showYAxisLabels": True,
        "showLegend": True, "legendDisplay": "floating", "showPlotValuesInLegend": True, "isSynced": True,
        "xAxisVal": "timestamp", "minYValue": 0, "followingViewWidth": 30,
    }  # fmt: skip


def _split(direction: str, first: Any, second: Any, percentage: int) -> dict[str, Any]:
    return {"direction": direction, "first": first, "second": second, "splitPercentage": percentage}


if __name__ == "__main__":
    main()
