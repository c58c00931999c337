# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Labelled points: every layout of clouds and depth, and pairs by stamp, without a node around them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from clouds import SECOND_NS, SIZE, cloud, depth_image, header, labelled, positions_of, scene
from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField, RegionOfInterest

from clustvit_ros.demo.camera import camera_info_message
from clustvit_ros.engine.worker import FrameQueue
from clustvit_ros.errors import ImageError
from clustvit_ros.node.camera import Frame
from clustvit_ros.node.messages import image_message
from clustvit_ros.node.points import LabelledPoints, intrinsics, label_points, read_cloud, read_depth
from clustvit_ros.policy.parameter_spec import build
from clustvit_ros.policy.parameters import SegmentationParameters

MOST = 1 << 20


@pytest.fixture
def maps(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, 11, SIZE, dtype=np.uint8), rng.integers(0, 256, SIZE, dtype=np.uint8)


@pytest.mark.parametrize(
    ("kind", "offsets", "step", "padding"),
    [
        ("<f4", (0, 4, 8), 12, 0), ("<f4", (0, 4, 8), 16, 0), ("<f4", (4, 9, 17), 33, 7), (">f4", (0, 4, 8), 20, 0),
        ("<f8", (0, 8, 16), 24, 0), (">f8", (3, 20, 11), 32, 5),
    ],
)  # fmt: skip
def test_positions_come_bit_for_bit_out_of_any_layout(
    kind: str, offsets: tuple[int, ...], step: int, padding: int, rng: np.random.Generator, maps: Any
) -> None:
    positions = scene(rng)
    source = cloud(positions, kind, offsets, step, padding)
    message = label_points(read_cloud(source, MOST), *maps, None, source.header, False)
    found = positions_of(message)
    bits = found.view(np.uint32) if kind.endswith("4") else found
    np.testing.assert_array_equal(bits, positions.view(np.uint32) if kind.endswith("4") else positions)
    np.testing.assert_array_equal(labelled(message)["label"], maps[0])
    np.testing.assert_allclose(labelled(message)["confidence"], maps[1] / 255, atol=1e-7)
    assert (message.header, message.is_dense) == (source.header, False)


@pytest.mark.parametrize(("encoding", "order"), [("16UC1", "<"), ("16UC1", ">"), ("32FC1", "<"), ("32FC1", ">")])
def test_depth_gives_the_same_points_within_a_millimetre(encoding: str, order: str, rng: np.random.Generator) -> None:
    positions = scene(rng)
    info = camera_info_message(SIZE, 40.0, header(1))
    found = read_depth(depth_image(positions[..., 2], encoding, order=order), info, MOST)[..., :3]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(positions))
    assert np.nanmax(np.linalg.norm(found - positions, axis=-1)) < 1e-3


def test_depth_of_another_size_scales_the_intrinsics(rng: np.random.Generator) -> None:
    info = camera_info_message((48, 64), 80.0, header(1))  # of an image of twice the size, of the same view
    found = read_depth(depth_image(scene(rng)[..., 2], "32FC1"), info, MOST)[..., :3]
    assert np.nanmax(np.abs(found - read_depth(
        depth_image(scene(np.random.default_rng(7))[..., 2], "32FC1"), camera_info_message(SIZE, 40.0, header(1)), MOST
    )[..., :3])) < 1e-5  # fmt: skip


def test_what_was_not_measured_is_nan() -> None:
    z = np.array([[0.0, np.inf, np.nan, -1.0, 2.0]] * 2, np.float32)
    found = read_depth(depth_image(z, "32FC1"), camera_info_message((2, 5), 5.0, header(1)), MOST)
    assert np.isnan(found[:, :4, :3]).all() and np.isfinite(found[:, 4, :3]).all()


def test_intrinsics_apply_binning_and_region_and_prefer_the_projection() -> None:
    info = camera_info_message((480, 640), 500.0, header(1))
    info.p[0] = info.p[5] = 450.0
    assert intrinsics(info, (480, 640)) == (450.0, 450.0, 319.5, 239.5)
    info.binning_x = info.binning_y = 2
    info.roi = RegionOfInterest(x_offset=100, y_offset=40, width=400, height=200)
    assert intrinsics(info, (100, 200)) == (225.0, 225.0, 109.5, 99.5)
    info.p[0] = 0.0  # not calibrated for rectification
    assert intrinsics(info, (100, 200))[0] == 250.0


@pytest.mark.parametrize("size", [(12, 16), (48, 64), (9, 50)])
def test_a_cloud_of_another_size_is_sampled_by_position(size: tuple[int, int], rng: np.random.Generator) -> None:
    mask = np.kron(np.array([[0, 1], [2, 3]], np.uint8), np.ones((12, 16), np.uint8))
    source = cloud(scene(rng, size))
    found = labelled(label_points(read_cloud(source, MOST), mask, mask, None, source.header, False))["label"]
    assert found.shape == size
    rows, columns = (np.arange(side) + 0.5 >= side / 2 for side in size)
    np.testing.assert_array_equal(found, 2 * rows[:, None] + columns)


def test_a_list_of_points_is_projected_and_what_the_image_does_not_show_is_unlabelled(
    rng: np.random.Generator, maps: Any
) -> None:
    positions = scene(rng)
    order = rng.permutation(SIZE[0] * SIZE[1])
    behind = np.array([[0.0, 0.0, -2.0], [50.0, 0.0, 1.0], [np.inf, 0.0, 1.0]], np.float32)
    source = cloud(np.concatenate([positions.reshape(-1, 3)[order], behind])[None])
    message = label_points(
        read_cloud(source, MOST), *maps, camera_info_message(SIZE, 40.0, header(1)), source.header, False
    )
    points = labelled(message)[0]
    seen = np.isfinite(positions).all(axis=-1).ravel()[order]
    np.testing.assert_array_equal(points["label"][:-3][seen], maps[0].ravel()[order][seen])
    assert set(points["label"][:-3][~seen]) == set(points["label"][-3:]) == {255}
    assert not points["confidence"][-3:].any()
    with pytest.raises(ImageError, match="camera_info: none has come"):
        label_points(read_cloud(source, MOST), *maps, None, source.header, False)


def changed(message: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda c: changed(c, fields=c.fields[:2]), "got the fields x, y, expected x, y and z"),
        (lambda c: changed(c, fields=[]), "expected x, y and z"),
        (lambda c: changed(c, height=0), "got 32x0 points"),
        (lambda c: changed(c, height=2**31, width=2**31), "expected 1 to 1048576"),
        (lambda c: changed(c, row_step=3), "in rows of 3"),
        (lambda c: changed(c, height=25), "bytes in rows of"),
        (lambda c: changed(c, point_step=11, row_step=384), "at byte 8 of 11"),
        (lambda c: changed(c, fields=[changed(f, datatype=PointField.INT16) for f in c.fields]), "of type 3"),
        (lambda c: changed(c, fields=[changed(f, datatype=77) for f in c.fields]), "of type 77"),
        (lambda c: changed(c, fields=[changed(f, count=3) for f in c.fields]), "count 3"),
        (lambda c: changed(c, fields=[changed(f, offset=2**32 - 1) for f in c.fields]), "at byte 4294967295"),
    ],
)
def test_clouds_that_cannot_be_read_say_why(make: Callable[[Any], Any], text: str, rng: np.random.Generator) -> None:
    with pytest.raises(ImageError) as error:
        read_cloud(make(cloud(scene(rng))), MOST)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("make", "info", "text"),
    [
        (lambda d: changed(d, encoding="rgb8"), True, "got encoding 'rgb8', expected 16UC1 (mm) or 32FC1 (m)"),
        (lambda d: changed(d, step=7), True, "step: got 7 bytes for 32x24 32FC1"),
        (lambda d: changed(d, height=2**31), True, "expected at most"),
        (lambda d: d, None, "camera_info: none has come"),
        (lambda d: d, CameraInfo(), "got focal lengths 0 and 0 px"),
    ],
)
def test_depth_that_cannot_be_used_says_why(
    make: Callable[[Any], Any], info: Any, text: str, rng: np.random.Generator
) -> None:
    info = camera_info_message(SIZE, 40.0, header(1)) if info is True else info
    with pytest.raises(ImageError) as error:
        read_depth(make(depth_image(scene(rng)[..., 2], "32FC1")), info, MOST)
    assert text in str(error.value)


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1"])
def test_depth_of_the_simulated_world_gives_its_points_within_a_millimetre(encoding: str) -> None:
    pytest.importorskip("panda3d", reason="needs the renderer of the simulated world")
    from clustvit_ros.sim import SimulatedCamera

    size = (240, 320)
    camera = SimulatedCamera(5, size)
    exact = camera.frame(40, points=True).points
    assert exact is not None
    camera.close()
    exact[exact[..., 2] > 65.0] = np.nan  # farther than 16 bits reach
    info = camera_info_message(size, camera.focal_px, header(1))
    found = read_depth(depth_image(exact[..., 2], encoding), info, MOST)[..., :3]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    assert np.nanmax(np.linalg.norm(found - exact, axis=-1)) < 1e-3
    assert np.isfinite(exact).mean() > 0.3


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_cloud_and_any_depth_gives_its_points_or_an_image_error(data: st.DataObject) -> None:
    number = st.one_of(st.integers(0, 40), st.sampled_from([2**16, 2**31, 2**32 - 1]))
    fields = [
        PointField(name=name, offset=data.draw(number), datatype=data.draw(st.integers(0, 9)), count=data.draw(number))
        for name in data.draw(st.sampled_from(["xyz", "xy", "", "zyxx"]))
    ]
    height, width, bigendian = data.draw(number), data.draw(number), data.draw(st.booleans())
    source = PointCloud2(
        height=height, width=width, point_step=data.draw(number), row_step=data.draw(number), fields=fields,
        is_bigendian=bigendian, data=bytes(data.draw(st.integers(0, 3000))),
    )  # fmt: skip
    depth = Image(
        height=height, width=width, step=source.row_step, is_bigendian=bigendian, data=source.data,
        encoding=data.draw(st.sampled_from(["16UC1", "32FC1", "mono8", ""])),
    )  # fmt: skip
    info = camera_info_message(SIZE, 9.0, header(1))
    for read in (lambda: read_cloud(source, 10_000), lambda: read_depth(depth, info, 10_000)):
        try:
            assert read().shape == (height, width, 5)
        except ImageError:
            continue


class Desk:
    """Labelled points without a node; `fates` counts, `problems` says, `published` keeps."""

    def __init__(self, **values: Any) -> None:
        self.published: list[PointCloud2] = []
        self.fates: Counter[str] = Counter()
        self.problems: list[str] = []
        parameters = build(SegmentationParameters, values)
        self.points = LabelledPoints("/points", lambda: parameters, self.published.append, self._report)

    def _report(self, fate: str, problem: str) -> None:
        self.fates[fate] += 1
        if problem:
            self.problems.append(problem)

    def wait(self, fate: str, count: int) -> None:
        deadline_s = time.monotonic() + 20.0
        while self.fates[fate] < count:
            assert time.monotonic() < deadline_s, (fate, self.fates, self.problems)
            time.sleep(0.005)

    def stamps(self) -> list[int]:
        return [each.header.stamp.sec * SECOND_NS + each.header.stamp.nanosec for each in self.published]


def constant(label: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(SIZE, label, np.uint8), np.full(SIZE, 200, np.uint8)


@pytest.mark.parametrize("first", ["cloud", "frame", "mask"])
def test_a_cloud_may_come_before_its_frame_before_its_mask_or_after_it(first: str, rng: np.random.Generator) -> None:
    desk = Desk()
    for number in range(1, 6):
        stamp = number * SECOND_NS // 30
        source = cloud(scene(rng), stamp_ns=stamp)
        if first == "cloud":
            desk.points.add_cloud(source)
        order = desk.points.order(header(stamp), None)
        assert order is not None
        if first == "frame":
            desk.points.add_cloud(source)
        order.fulfil(*constant(number))
        if first == "mask":
            desk.points.add_cloud(source)
        desk.wait("published", number)
        assert labelled(desk.published[-1])["label"].max() == labelled(desk.published[-1])["label"].min() == number
        np.testing.assert_array_equal(positions_of(desk.published[-1]), read_cloud(source, MOST)[..., :3])
    assert desk.fates == {"published": 5}
    desk.points.close()


def test_frames_that_are_dropped_leave_nothing_behind(rng: np.random.Generator) -> None:
    desk, positions = Desk(), scene(rng)
    for number in range(1, 200):
        order = desk.points.order(header(number * SECOND_NS // 30), None)
        if number % 10 == 0 and order is not None:
            order.fulfil(*constant(1))
        del order  # a newer frame took its place
        desk.points.add_cloud(cloud(positions, stamp_ns=number * SECOND_NS // 30))
        if number % 10 == 0:
            desk.wait("published", number // 10)
    assert desk.fates == {"published": 19}
    assert not desk.points._clouds and not desk.points._masks and not len(desk.points._frames)
    desk.points.close()


def test_only_equal_stamps_match_unless_a_slop_is_given(rng: np.random.Generator) -> None:
    strict, loose = Desk(), Desk(points_slop_ms=8.0)
    for desk in (strict, loose):
        for number in range(1, 41):
            stamp = number * SECOND_NS // 30
            order = desk.points.order(header(stamp), None)
            assert order is not None
            desk.points.add_cloud(cloud(scene(rng), stamp_ns=stamp + 5_000_000))
            order.fulfil(*constant(1))
            if desk is loose:
                loose.wait("published", number)
    assert loose.stamps() == [number * SECOND_NS // 30 for number in range(1, 41)], "the image's stamps"
    assert strict.fates == {"unmatched": 10}, "the others may still get theirs"
    assert strict.problems[0].startswith(
        "/points has nothing of the image's stamp 0.033333333 (the newest ones are +5.0 ms apart)"
    )
    assert "points_slop_ms" in strict.problems[0]
    strict.points.close()
    loose.points.close()


def test_a_slop_longer_than_a_period_still_prefers_the_nearest(rng: np.random.Generator) -> None:
    desk, period = Desk(points_slop_ms=40.0), SECOND_NS // 30
    for number in range(1, 8):
        order = desk.points.order(header(number * period), None)
        assert order is not None
        if number > 1:  # the image before has its mask by now, this one does not
            desk.points.add_cloud(cloud(scene(rng), stamp_ns=(number - 1) * period))
            desk.wait("published", number - 1)
        order.fulfil(*constant(number))
    assert [labelled(each)["label"].max() for each in desk.published] == list(range(1, 7))
    assert desk.stamps() == [number * period for number in range(1, 7)]
    desk.points.close()


def test_a_replays_frames_wait_with_their_clouds_within_its_limit(rng: np.random.Generator) -> None:
    desk, pixels, dropped = Desk(processing="every_frame"), constant(0)[0], list[Frame]()
    clouds = [cloud(scene(rng), stamp_ns=number * SECOND_NS // 30) for number in range(1, 41)]
    limit = 10 * (pixels.nbytes + len(clouds[0].data))
    queue: FrameQueue[Frame] = FrameQueue(lambda frame, _: dropped.append(frame), limit, lambda frame: frame.held_bytes)
    queue.open()
    for source in clouds:  # each comes after its image
        order = desk.points.order(source.header, None)
        queue.put(Frame(image_message(pixels, "mono8", source.header), 1, points=order))
        desk.points.add_cloud(source)
    assert len(dropped) == 30, "of the first one nobody knew how large its cloud would be"
    queue.close(0.0)
    assert len(dropped) == 40
    desk.points.close()


def test_clouds_that_do_not_come_are_missed_by_name() -> None:
    desk = Desk()
    for number in range(1, 41):
        order = desk.points.order(header(number * SECOND_NS // 30), None)
        assert order is not None
        order.fulfil(*constant(1))
    assert desk.fates == {"unmatched": 10}
    assert desk.problems[0].startswith("nothing arrives on /points; remap `points`")
    desk.points.close()


def test_stamps_that_repeat_jump_or_lack_mix_nothing_up(rng: np.random.Generator) -> None:
    desk, positions = Desk(), scene(rng)

    def frame(stamp: int, label: int) -> None:
        order = desk.points.order(header(stamp), None)
        if order is not None:
            order.fulfil(*constant(label))

    late = 100 * SECOND_NS
    frame(late, 1)
    frame(late, 2)
    desk.points.add_cloud(cloud(positions, stamp_ns=late))
    desk.points.add_cloud(cloud(positions, stamp_ns=late))
    desk.wait("published", 1)
    assert labelled(desk.published[0])["label"].max() == 1
    assert "two images have the stamp 100.000000000" in desk.problems[0]
    assert "comes again with the stamp 100.000000000" in desk.problems[1]
    frame(0, 3)
    desk.points.add_cloud(cloud(positions, stamp_ns=0))
    assert "without a time stamp" in desk.problems[2] and "without a time stamp" in desk.problems[3]
    frame(late + SECOND_NS, 4)  # its cloud never comes, for the bag starts over
    desk.points.add_cloud(cloud(positions, stamp_ns=SECOND_NS))
    frame(SECOND_NS, 5)
    desk.wait("published", 2)
    assert labelled(desk.published[1])["label"].max() == 5
    assert desk.fates == {"published": 2, "refused": 4, "time_jumps": 1, "unmatched": 1}
    desk.points.close()


def test_a_cloud_of_another_frame_is_refused(rng: np.random.Generator) -> None:
    desk = Desk()
    order = desk.points.order(header(SECOND_NS), None)
    assert order is not None
    order.fulfil(*constant(1))
    desk.points.add_cloud(cloud(scene(rng), frame_id="lidar"))
    desk.wait("refused", 1)
    assert "frame_id: got 'lidar', expected the image's, 'camera'" in desk.problems[0]
    desk.points.close()


def test_a_replay_waits_for_every_cloud_and_drops_none(rng: np.random.Generator) -> None:
    desk, positions = Desk(processing="every_frame"), scene(rng)
    orders = [desk.points.order(header(number * SECOND_NS), None) for number in range(1, 31)]
    for number in range(1, 31):
        desk.points.add_cloud(cloud(positions, stamp_ns=number * SECOND_NS))
    for number, order in enumerate(orders, 1):
        assert order is not None
        order.fulfil(*constant(number))
    desk.wait("published", 30)
    assert [int(labelled(each)["label"].max()) for each in desk.published] == list(range(1, 31))
    assert desk.fates == {"published": 30}
    desk.points.close()
