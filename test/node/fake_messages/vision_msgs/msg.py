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
