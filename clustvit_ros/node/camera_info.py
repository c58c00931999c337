"""Intrinsics of a mask whose size is not the camera's."""

from __future__ import annotations

from typing import Any

from sensor_msgs.msg import CameraInfo, RegionOfInterest


def scaled_camera_info(info: CameraInfo, size: tuple[int, int], header: Any) -> CameraInfo:
    """What the camera's calibration is for its image resized to `size`.

    Focal lengths, principal point and the baseline term of P scale with the image, as image_proc's resize node scales
    them; distortion (D) and rotation (R) are independent of size. `binning` stays: width, height and region of interest
    are those of a larger or smaller sensor with the same binning, so that consumers who apply binning and region of
    interest get the mask's size.

    Args:
        info: as the camera driver publishes it.
        size: (height, width) of the mask.
        header: of the frame.
    """
    roi = info.roi
    image_height = (roi.height or info.height) // max(info.binning_y, 1)
    image_width = (roi.width or info.width) // max(info.binning_x, 1)
    result = CameraInfo(
        header=header, height=info.height, width=info.width, distortion_model=info.distortion_model, d=info.d, k=info.k,
        r=info.r, p=info.p, binning_x=info.binning_x, binning_y=info.binning_y, roi=roi,
    )  # fmt: skip
    if size == (image_height, image_width) or not image_height or not image_width:
        return result
    down, across = size[0] / image_height, size[1] / image_width
    rows = (across, down, 1.0)
    result.height, result.width = round(info.height * down), round(info.width * across)
    result.k = [value * rows[index // 3] for index, value in enumerate(info.k)]
    result.p = [value * rows[index // 4] for index, value in enumerate(info.p)]
    result.roi = RegionOfInterest(
        x_offset=round(roi.x_offset * across), y_offset=round(roi.y_offset * down),
        width=round(roi.width * across), height=round(roi.height * down), do_rectify=roi.do_rectify,
    )  # fmt: skip
    return result
