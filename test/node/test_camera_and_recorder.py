# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Camera, node and recorder as three processes over DDS: the chain that the demo is made of."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image, PointCloud2

pytestmark = pytest.mark.ros


@pytest.fixture
def pictures(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A folder of five pictures; the first pixel tells which one it is."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        picture = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture[0, 0] = 50 * number
        cv2.imwrite(str(folder / f"picture_{number}.png"), picture)
    return folder


def test_camera_publishes_in_order_and_ends(
    ros_client: Any, start_node: Callable[..., Any], pictures: Path, tmp_path: Path
) -> None:
    frames: list[Image] = []
    subscription = ros_client.node.create_subscription(Image, "/shop/image_raw", frames.append, qos_profile_sensor_data)
    manifest = tmp_path / "manifest.jsonl"
    camera = start_node(
        "demo.camera", "-r", "__ns:=/shop", "-p", f"source:={pictures}", "-p", "rate_hz:=50", "-p", "count:=7",
        "-p", "wait_for_subscribers:=1", "-p", "start_delay_s:=0.3", "-p", "frame_id:=left",
        "-p", f"manifest:={manifest}",
    )  # fmt: skip
    ros_client.spin_until(lambda: len(frames) == 7, "seven frames")
    assert camera.wait() == 0
    assert "sent 7 frames" in camera.output
    entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    stamps = [frame.header.stamp.sec * 1_000_000_000 + frame.header.stamp.nanosec for frame in frames]
    assert [entry["stamp_ns"] for entry in entries] == stamps
    assert stamps == sorted(set(stamps))
    assert [entry["name"] for entry in entries] == [f"picture_{number % 5}.png" for number in range(7)]
    assert [frame.data[0] for frame in frames] == [50 * (number % 5) for number in range(7)]
    assert {(frame.encoding, frame.header.frame_id) for frame in frames} == {("bgr8", "left")}
    assert {(frame.height, frame.width, frame.step) for frame in frames} == {(24, 32, 96)}
    ros_client.node.destroy_subscription(subscription)


def test_camera_goes_on_without_a_file_that_cannot_be_read(
    ros_client: Any, start_node: Callable[..., Any], pictures: Path
) -> None:
    (pictures / "picture_1.png").write_bytes(b"")
    frames: list[Image] = []
    subscription = ros_client.node.create_subscription(Image, "/shop/image_raw", frames.append, qos_profile_sensor_data)
    camera = start_node(
        "demo.camera", "-r", "__ns:=/shop", "-p", f"source:={pictures}", "-p", "rate_hz:=50", "-p", "count:=9",
        "-p", "wait_for_subscribers:=1", "-p", "start_delay_s:=0.3",
    )  # fmt: skip
    ros_client.spin_until(lambda: len(frames) == 9, "nine frames")
    assert camera.wait() == 0
    assert [frame.data[0] for frame in frames] == [0, 100, 150, 200, 0, 100, 150, 200, 0]
    assert camera.output.count("picture_1.png: cannot be read as an image") == 1
    assert "1 files could not be read" in camera.output
    ros_client.node.destroy_subscription(subscription)


def test_camera_ends_where_nothing_can_be_read(start_node: Callable[..., Any], pictures: Path) -> None:
    for file in pictures.iterdir():
        file.write_bytes(b"")
    camera = start_node("demo.camera", "-p", f"source:={pictures}")
    assert camera.wait() == 1
    assert "nothing of 5 pictures of" in camera.output and "can be read" in camera.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-p", "source:=''"], "source: got nothing"),
        (["-p", "source:=/nowhere"], "source: got '/nowhere', which is not there; expected a folder of pictures"),
        (["-p", "source:=987"], "/dev/video987 does not exist"),
    ],
)
def test_camera_says_what_is_wrong_with_its_source(
    start_node: Callable[..., Any], arguments: list[str], text: str
) -> None:
    camera = start_node("demo.camera", *arguments)
    assert camera.wait() == 1
    assert text in camera.output
    assert "Traceback" not in camera.output


def test_recorder_keeps_masks_overlays_and_latencies(
    start_node: Callable[..., Any], pictures: Path, tmp_path: Path
) -> None:
    output, manifest = tmp_path / "output", tmp_path / "manifest.jsonl"
    namespace = ("-r", "__ns:=/chain")
    start_node("node.node", *namespace, "-r", "image:=image_raw", "-p", "engine:=scripted")
    recorder = start_node(
        "demo.recorder", *namespace, "-p", f"output_folder:={output}", "-p", f"manifest:={manifest}",
        "-p", "expected_masks:=5", "-p", "overlay_every:=2", "-p", "idle_timeout_s:=5.0",
    )  # fmt: skip
    camera = start_node(
        "demo.camera", *namespace, "-p", f"source:={pictures}", "-p", "rate_hz:=10", "-p", "loop:=false",
        "-p", "wait_for_subscribers:=2", "-p", "start_delay_s:=0.5", "-p", f"manifest:={manifest}",
    )  # fmt: skip
    assert camera.wait() == 0
    assert recorder.wait() == 0
    summary = json.loads((output / "recording.json").read_text())
    assert summary["ended_by"] == "expected_masks"
    assert summary["frames_sent"] == summary["images_received"] == summary["masks_received"] == 5
    assert summary["node"]["frames_received"] == 5
    assert summary["node"]["frames_dropped"] == 0
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p95"] <= summary["latency_ms"]["p99"]
    assert [frame["name"] for frame in summary["frames"]] == [f"picture_{number}.png" for number in range(5)]
    for frame in summary["frames"]:
        picture = cv2.imread(str(pictures / frame["name"]))
        mask = cv2.imread(str(output / frame["mask"]), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(mask, picture[..., 1] >> 6)
        assert frame["stats"]["tokens_total"]
    overlays = [frame["overlay"] for frame in summary["frames"] if frame["overlay"]]
    assert overlays == [f"overlays/{number:06d}_picture_{number}.jpg" for number in (0, 2, 4)]
    assert cv2.imread(str(output / overlays[0])).shape == (24, 32, 3)


def test_recorder_writes_its_summary_when_interrupted(start_node: Callable[..., Any], tmp_path: Path) -> None:
    recorder = start_node("demo.recorder", "-r", "__ns:=/alone", "-p", f"output_folder:={tmp_path}")
    recorder.wait_for_output("recording /alone/segmentation/mask")
    assert recorder.stop(signal.SIGINT) == 1  # nothing was recorded
    assert json.loads((tmp_path / "recording.json").read_text())["ended_by"] == "signal"


def test_simulated_camera_publishes_truth_with_the_stamp_of_its_image(
    ros_client: Any, start_node: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("panda3d", reason="needs panda3d (the 'sim' extra)")
    from clustvit_ros.sim import SimulatedCamera

    kinds = {"image_raw": Image, "camera_info": CameraInfo, "ground_truth": Image, "points": PointCloud2}
    heard: dict[str, dict[tuple[int, int], Any]] = {name: {} for name in kinds}

    def keep(name: str) -> Callable[[Any], None]:
        return lambda message: heard[name].setdefault((message.header.stamp.sec, message.header.stamp.nanosec), message)

    subscriptions = [
        ros_client.node.create_subscription(kind, f"/sim/{name}", keep(name), qos_profile_sensor_data)
        for name, kind in kinds.items()
    ]
    manifest = tmp_path / "manifest.jsonl"
    camera = start_node(
        "demo.camera", "-r", "__ns:=/sim", "-p", "source:=sim:4", "-p", "rate_hz:=5.0", "-p", "width:=160",
        "-p", "height:=120", "-p", "publish_points:=true", "-p", "wait_for_subscribers:=1",
        "-p", "start_delay_s:=1.0", "-p", f"manifest:={manifest}",
    )  # fmt: skip
    common: set[tuple[int, int]] = set()

    def complete() -> bool:
        common.update(set.intersection(*(set(messages) for messages in heard.values())))
        return len(common) >= 2

    ros_client.spin_until(complete, "two frames with image, intrinsics, truth and points of one stamp")
    assert camera.stop(signal.SIGINT) == 0
    stamp = min(common)
    image, info, truth, cloud = (heard[name][stamp] for name in kinds)
    entries = {entry["stamp_ns"]: entry for entry in map(json.loads, manifest.read_text().splitlines())}
    index = entries[stamp[0] * 1_000_000_000 + stamp[1]]["index"]
    simulated = SimulatedCamera(4, (120, 160), 5.0)
    expected = simulated.frame(index, points=True)
    assert bytes(image.data) == expected.image.tobytes()
    assert (truth.encoding, truth.height, truth.width, truth.step) == ("mono8", 120, 160, 160)
    assert bytes(truth.data) == expected.labels.tobytes()
    assert (cloud.height, cloud.width, cloud.point_step, cloud.row_step) == (120, 160, 12, 1920)
    assert [(field.name, field.offset, field.datatype) for field in cloud.fields] == [
        ("x", 0, 7), ("y", 4, 7), ("z", 8, 7),
    ]  # fmt: skip
    assert bytes(cloud.data) == expected.points.astype("<f4").tobytes() and not cloud.is_dense
    assert (info.width, info.height) == (160, 120)
    np.testing.assert_allclose(
        np.reshape(info.k, (3, 3)), [[simulated.focal_px, 0, 79.5], [0, simulated.focal_px, 59.5], [0, 0, 1]]
    )
    assert {message.header.frame_id for message in (image, info, truth, cloud)} == {"camera_optical_frame"}
    for subscription in subscriptions:
        ros_client.node.destroy_subscription(subscription)
