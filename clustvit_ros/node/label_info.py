"""Class names for whoever reads masks: vision_msgs/LabelInfo, where vision_msgs is installed."""

from __future__ import annotations

from typing import Any

from clustvit_ros.classes import ClassSet

try:
    from vision_msgs.msg import LabelInfo, VisionClass
except ImportError:  # no wheel of it exists; on a robot it comes with apt
    LabelInfo = VisionClass = None

AVAILABLE = LabelInfo is not None
"""vision_msgs is installed."""

UNAVAILABLE = (
    "vision_msgs is not installed: segmentation/label_info is not published, and consumers need the class names from "
    "elsewhere (install ros-$ROS_DISTRO-vision-msgs)"
)
"""What to tell the user once, where it is not."""


def label_info_message(classes: ClassSet, confidence_threshold: float, header: Any) -> Any:
    """Build a vision_msgs/LabelInfo: one VisionClass for each value that the mask may hold, 255 (unlabelled) aside.

    Args:
        classes: of the mask.
        confidence_threshold: below it (0..1) pixels are unlabelled.
        header: of the first frame that it holds for.
    """
    entries = [VisionClass(class_id=index, class_name=name) for index, name in enumerate(classes.names)]
    return LabelInfo(header=header, class_map=entries, threshold=confidence_threshold)
