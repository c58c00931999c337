"""What a camera says besides its pictures: intrinsics and organised point clouds."""

from __future__ import annotations

import numpy as np
from sensor_msgs.msg import CameraInfo, PointCloud2, PointField
from std_msgs.msg import Header


def camera_info_message(size: tuple[int, int], focal_px: float, header: Header) -> CameraInfo:
    """Intrinsics of a pinhole camera without distortion, centred on its picture.

    Args:
        size: (height, width) in pixels.
        focal_px: focal length.
        header: copied as it is.
    """
    height, width = size
    # Pixel centres lie at whole numbers in ROS.
    cx, cy = (width - 1) / 2, (height - 1) / 2
    return CameraInfo(
        header=header, height=height, width=width, distortion_model="plumb_bob", d=[0.0] * 5,
        k=[focal_px, 0.0, cx, 0.0, focal_px, cy, 0.0, 0.0, 1.0],
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[focal_px, 0.0, cx, 0.0, 0.0, focal_px, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
    )  # fmt: skip


def cloud_message(points: np.ndarray, header: Header) -> PointCloud2:
    """An organised cloud: one point per pixel.

    Args:
        points: (H, W, 3) float32 metres, NaN where nothing is.
        header: copied as it is.
    """
    height, width = points.shape[:2]
    fields = [
        PointField(name=name, offset=4 * index, datatype=PointField.FLOAT32, count=1)
        for index, name in enumerate("xyz")
    ]
    message = PointCloud2(
        header=header, height=height, width=width, fields=fields, is_bigendian=False, point_step=12,
        row_step=12 * width, is_dense=bool(np.isfinite(points).all()),
    )  # fmt: skip
    # Filling the message's own array is one memory copy; assigning to `data` checks every byte, or copies twice.
    message.data.frombytes(np.ascontiguousarray(points, "<f4").data.cast("B"))
    return message
