# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Intrinsics follow the mask's size."""

from __future__ import annotations

import pytest

pytest.importorskip("sensor_msgs", reason="needs ROS 2 (sensor_msgs)")

from sensor_msgs.msg import CameraInfo, RegionOfInterest
from std_msgs.msg import Header

from clustvit_ros.node.messages import calibrated_size, scaled_camera_info

HEADER = Header(frame_id="frame")


def calibration(**fields: object) -> CameraInfo:
    return CameraInfo(
        header=Header(frame_id="driver"), height=480, width=640, distortion_model="plumb_bob",
        d=[0.1, -0.2, 0.0, 0.0, 0.3],
        k=[500.0, 1.5, 320.0, 0.0, 510.0, 240.0, 0.0, 0.0, 1.0],
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[490.0, 0.0, 321.0, -35.0, 0.0, 495.0, 241.0, 7.0, 0.0, 0.0, 1.0, 0.0], **fields,
    )  # fmt: skip


def test_of_the_same_size_is_the_drivers_with_the_frames_header() -> None:
    info = calibration(binning_x=2, binning_y=2)
    result = scaled_camera_info(info, (240, 320), (240, 320), HEADER)
    assert result.header == HEADER
    result.header = info.header
    assert result == info


def test_scales_rows_and_columns_by_their_own_factors() -> None:
    result = scaled_camera_info(calibration(), (480, 640), (120, 1280), HEADER)
    assert (result.height, result.width) == (120, 1280)
    assert list(result.k) == [1000.0, 3.0, 640.0, 0.0, 127.5, 60.0, 0.0, 0.0, 1.0]
    assert list(result.p) == [980.0, 0.0, 642.0, -70.0, 0.0, 123.75, 60.25, 1.75, 0.0, 0.0, 1.0, 0.0]
    assert list(result.d) == list(calibration().d)
    assert list(result.r) == list(calibration().r)
    assert result.distortion_model == "plumb_bob"


@pytest.mark.parametrize("size", [(200, 400), (60, 80), (480, 640)])
@pytest.mark.parametrize("binning", [0, 2])
@pytest.mark.parametrize("roi", [(0, 0, 0, 0), (100, 40, 400, 200)])
def test_a_point_falls_on_the_same_part_of_the_mask(
    size: tuple[int, int], binning: int, roi: tuple[int, int, int, int]
) -> None:
    x, y, width, height = roi
    info = calibration(
        binning_x=binning, binning_y=binning, roi=RegionOfInterest(x_offset=x, y_offset=y, width=width, height=height)
    )
    image = ((height or 480) // max(binning, 1), (width or 640) // max(binning, 1))
    result = scaled_camera_info(info, image, size, HEADER)

    def pixel(of: CameraInfo) -> tuple[float, float]:
        # As image_geometry applies region of interest and binning, for a point at (0.1, -0.05, 1).
        u, v = of.p[0] * 0.1 + of.p[2], of.p[5] * -0.05 + of.p[6]
        return (u - of.roi.x_offset) / max(of.binning_x, 1), (v - of.roi.y_offset) / max(of.binning_y, 1)

    (u, v), (mask_u, mask_v) = pixel(info), pixel(result)
    assert mask_u / size[1] == pytest.approx(u / image[1], abs=1.0 / size[1])
    assert mask_v / size[0] == pytest.approx(v / image[0], abs=1.0 / size[0])
    assert (result.roi.width or result.width) // max(binning, 1) == size[1]
    assert (result.roi.height or result.height) // max(binning, 1) == size[0]


def test_an_empty_calibration_stays_empty() -> None:
    result = scaled_camera_info(CameraInfo(), (10, 20), (5, 10), HEADER)
    assert (result.height, result.width) == (0, 0)


def test_a_calibration_at_another_size_scales_with_the_image_not_with_itself() -> None:
    info = calibration()  # for 640x480, and the images have half of that
    assert calibrated_size(info) == (480, 640)
    assert list(scaled_camera_info(info, (240, 320), (240, 320), HEADER).k) == list(info.k)
    assert list(scaled_camera_info(info, (240, 320), (120, 160), HEADER).k)[:3] == [250.0, 0.75, 160.0]


def test_numbers_that_no_image_has_do_not_overflow_the_message() -> None:
    most = 2**32 - 1
    info = calibration(roi=RegionOfInterest(x_offset=most, y_offset=most, width=most, height=most))
    info.height = info.width = most
    result = scaled_camera_info(info, (10, 10), (20, 20), HEADER)
    assert (result.height, result.roi.x_offset, result.roi.width) == (most, most, most)
