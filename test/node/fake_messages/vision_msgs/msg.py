# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""LabelInfo and VisionClass with the fields of vision_msgs 4, travelling over real DDS inside a string.

A Python process cannot make type support for a message; std_msgs/String has it. rclpy reads the field `data` when it
publishes, so LabelInfo computes that from the fields that vision_msgs defines.
"""

import json

from std_msgs.msg import Header, String


class VisionClass:
    """uint16 class_id, string class_name."""

    def __init__(self, *, class_id: int = 0, class_name: str = "") -> None:
        assert type(class_id) is int and 0 <= class_id < 2**16
        assert type(class_name) is str
        self.class_id, self.class_name = class_id, class_name


class LabelInfo(String):
    """std_msgs/Header header, VisionClass[] class_map, float32 threshold."""

    def __init__(self, *, header: Header, class_map: list, threshold: float) -> None:
        assert isinstance(header, Header)
        assert all(isinstance(entry, VisionClass) for entry in class_map)
        assert type(threshold) is float
        self.header, self.class_map, self.threshold = header, class_map, threshold

    @property
    def data(self) -> str:
        """Everything as JSON."""
        return json.dumps(
            {
                "stamp": [self.header.stamp.sec, self.header.stamp.nanosec],
                "class_map": {entry.class_id: entry.class_name for entry in self.class_map},
                "threshold": self.threshold,
            }
        )


# rclpy's converter compares the names.
LabelInfo.__name__, LabelInfo.__module__ = String.__name__, String.__module__
