# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Frames through decode, policy, engine and publishers, without a node around them."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sensor_msgs", reason="needs ROS 2 (sensor_msgs)")

from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from clustvit_ros.engine import Engine, EngineInfo, Prediction, ScriptedEngine, Settings
from clustvit_ros.engine.worker import DeviceLost, FrameSlot
from clustvit_ros.errors import EngineError
from clustvit_ros.images import Intensities
from clustvit_ros.jpeg import KnownEdges
from clustvit_ros.node.camera import Frame, Outputs
from clustvit_ros.node.filling import FrameFiller
from clustvit_ros.node.frame import FrameSession, MaskPublisher
from clustvit_ros.node.messages import image_message
from clustvit_ros.policy import Policy
from clustvit_ros.policy.ledger import Ledger
from clustvit_ros.policy.parameter_spec import build
from clustvit_ros.policy.parameters import SegmentationParameters

SECOND_NS, ALL = 1_000_000_000, ("mask", "confidence", "overlay", "clusters")


class FakePublisher:
    """Stands in for an rclpy publisher."""

    def __init__(self, subscribers: int) -> None:
        self.subscribers, self.messages = subscribers, list[Image]()

    def get_subscription_count(self) -> int:
        return self.subscribers

    def publish(self, message: Image) -> None:
        self.messages.append(message)


class SpyEngine(Engine):
    """The scripted engine, remembering what it was asked, and failing on request."""

    def __init__(self) -> None:
        self._engine = ScriptedEngine()
        self.settings, self.images, self.warmed = list[Settings](), list[np.ndarray](), list[tuple[int, int] | None]()
        self.failure: Exception | None = None
        self.upcoming: Callable[[], np.ndarray | None] = lambda: None

    def look_ahead(self, upcoming: Callable[[], np.ndarray | None]) -> None:
        self.upcoming = upcoming

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        self.warmed.append(image_size)

    def input_size(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, int]:
        return self._engine.input_size(image_size, input_scale)

    def capacities(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, ...]:
        return self._engine.capacities(image_size, input_scale)

    def segment(self, images: Any, settings: Settings = Settings()) -> Prediction:
        self.settings.append(settings)
        self.images.append(images)
        if self.failure is not None:
            raise self.failure
        return self._engine.segment(images, settings)


class FakeLogger:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.errors, self.infos = list[str](), list[str]()

    def error(self, text: str, **_throttle: Any) -> None:
        self.errors.append(text)

    def info(self, text: str, **_throttle: Any) -> None:
        if not text.startswith("calibrating"):
            self.infos.append(text)


class FakeCamera:
    """Stands in for a camera's topics; `subscribed` outputs have a subscriber."""

    def __init__(self, name: str, subscribed: tuple[str, ...], parameters: SegmentationParameters) -> None:
        self.name, self.parameters, self.ledger = name, parameters, Ledger()
        self.published: dict[str, FakePublisher] = {}

        def create(_kind: type, topic: str, *_qos: Any, **_options: Any) -> FakePublisher:
            output = topic.partition("segmentation/")[2]
            return self.published.setdefault(output, FakePublisher(int(output in subscribed)))

        self.outputs = Outputs(create, f"{name}/segmentation" if name else "segmentation")
        self.intensities, self.known_edges = Intensities(), KnownEdges()


class Bench:
    """A session with fake publishers, of which `subscribed` have a subscriber."""

    def __init__(self, *subscribed: str, cameras: tuple[str, ...] = ("",), **values: Any) -> None:
        self.engine, self.logger, self.now_ns = SpyEngine(), FakeLogger(), 100 * SECOND_NS
        parameters = build(SegmentationParameters, {"lazy": False, **values})
        self.cameras = {name: FakeCamera(name, subscribed, parameters) for name in cameras}
        self.camera = self.cameras[cameras[0]]
        self.slot: FrameSlot[Frame] = FrameSlot()
        self.slot.open()
        publisher = MaskPublisher("segmentation", self.logger, lambda: self.now_ns)
        self.filler = FrameFiller(self.cameras, publisher, self.logger, lambda: True)  # type: ignore[arg-type]
        self.session = FrameSession(
            self.engine, Policy(self.engine, self.logger), self.cameras, self.slot,  # type: ignore[arg-type]
            publisher, self.filler, self.logger, lambda: True,
        )  # fmt: skip

    def frame(self, pixels: np.ndarray, stamp_s: int = 99, camera: str = "") -> Frame:
        header = Header(frame_id="camera")
        header.stamp.sec = stamp_s
        return Frame(image_message(pixels, "rgb8", header), self.now_ns - 20_000_000, camera)

    def process(self, pixels: np.ndarray, stamp_s: int = 99) -> Any:
        """Handle one frame; the record of the newest that was segmented."""
        self.session.handle(self.frame(pixels, stamp_s))
        return self.camera.ledger.newest

    @property
    def published(self) -> dict[str, FakePublisher]:
        return self.camera.published

    def images(self) -> list[tuple[str, FakePublisher]]:
        return [(name, self.published[name]) for name in ALL]

    def counts(self) -> dict[str, int]:
        return {name: len(self.published[name].messages) for name in ALL}


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)


def test_mask_is_the_engines_with_the_frames_header(pixels: np.ndarray) -> None:
    bench = Bench("mask")
    record = bench.process(pixels)
    message = bench.published["mask"].messages[0]
    assert message.header == bench.frame(pixels).message.header
    assert (message.encoding, message.step, message.height, message.width) == ("mono8", 48, 32, 48)
    np.testing.assert_array_equal(np.frombuffer(message.data, np.uint8).reshape(32, 48), pixels[..., 1] >> 6)
    assert record.stamped
    assert record.age_ms == pytest.approx(1000.0)
    assert bench.logger.infos[0].startswith("first mask: 48x32, 1000.0 ms after the image's stamp")


def test_an_engine_looks_ahead_to_the_picture_that_waits(pixels: np.ndarray) -> None:
    bench = Bench("mask")
    assert bench.engine.upcoming() is None
    for shown in (pixels, pixels[::-1]):  # the newer one takes the other's place
        frame = bench.frame(shown)
        bench.slot.put(frame)
        ahead = bench.engine.upcoming()
        np.testing.assert_array_equal(ahead, shown)
        assert bench.slot.peek() is frame
    bench.session.handle(frame)
    assert bench.engine.images[-1] is ahead, "the very array that the engine was shown"


def test_an_engine_is_shown_nothing_that_takes_time_or_will_be_another_picture(pixels: np.ndarray) -> None:
    message = Bench("mask").frame(pixels).message
    broken = Image(header=message.header, height=32, width=48, encoding="rgb8", step=3, data=b"short")
    for shown, values in (
        (CompressedImage(header=message.header, format="png"), {}), (broken, {}), (message, {"rotate": 180}),
        (message, {"batching": True}), (message, {"lazy": True}),
    ):  # fmt: skip
        bench = Bench(**values)
        bench.slot.put(Frame(shown, 0))
        assert bench.engine.upcoming() is None
    assert not bench.logger.errors


def test_what_looks_damaged_in_frame_after_frame_at_one_place_is_the_scene(
    stair_jpeg: Callable[[int, int], bytes],
) -> None:
    bench = Bench("mask", image_transport="compressed")
    for row, column in ((4, 7), (4, 8), (9, 13), (9, 13), (4, 7)):
        data = array("B", stair_jpeg(row, column))
        bench.session.handle(Frame(CompressedImage(format="jpeg", data=data), bench.now_ns))
    # The first at each place may be damaged; after another place, so may the old one.
    assert (bench.counts()["mask"], bench.camera.ledger.count("rejected")) == (2, 3)
    assert "from some block on all are brighter, darker" in bench.logger.errors[0]


def test_only_the_mask_is_computed_for_nobody(pixels: np.ndarray) -> None:
    bench = Bench()
    bench.process(pixels)
    assert bench.counts() == {"mask": 1, "confidence": 0, "overlay": 0, "clusters": 0}
    assert (bench.engine.settings[0].confidence, bench.engine.settings[0].clusters) == (False, False)


def test_everything_is_published_when_subscribed(pixels: np.ndarray) -> None:
    bench = Bench(*ALL, "stats", "mask/compressed", output_size="20x10")
    bench.process(pixels)
    sizes = {name: (p.messages[0].height, p.messages[0].width) for name, p in bench.images()}
    assert sizes == {"mask": (20, 10), "confidence": (20, 10), "clusters": (20, 10), "overlay": (32, 48)}
    encodings = {name: publisher.messages[0].encoding for name, publisher in bench.images()}
    assert encodings == {"mask": "mono8", "confidence": "mono8", "clusters": "mono8", "overlay": "rgb8"}
    (status,) = bench.published["stats"].messages[0].status
    pairs = {pair.key: pair.value for pair in status.values}
    assert (status.name, status.level, pairs["frames_segmented"], pairs["mask_size"]) == (
        "segmentation: frame", b"\0", "1", "20x10",
    )  # fmt: skip
    assert bench.published["mask/compressed"].messages[0].format == "mono8; png compressed mono8"


def test_unstamped_frames_are_aged_from_their_arrival(pixels: np.ndarray) -> None:
    record = Bench().process(pixels, stamp_s=0)
    assert not record.stamped
    assert record.age_ms == pytest.approx(20.0)


def test_engine_is_warmed_once_for_each_size(pixels: np.ndarray) -> None:
    bench = Bench()
    for image in (pixels, pixels, pixels[:16], pixels):
        bench.process(image)
    assert bench.engine.warmed == [(32, 48), (16, 48)]


@pytest.mark.parametrize(("policy", "masks"), [("publish_late", 1), ("drop", 0)])
def test_a_late_frame_is_counted_and_published_as_the_policy_says(policy: str, masks: int, pixels: np.ndarray) -> None:
    bench = Bench(*ALL, latency_budget_ms=500, budget_reference="stamp", deadline_policy=policy)
    record = bench.process(pixels)  # stamped a second ago
    outcome = "segmented" if masks else "late"
    assert (record.deadline_missed, record.outcome, record.deadline_misses) == (True, outcome, 1)
    assert record.age_ms == pytest.approx(1000.0)
    assert record.arrival_age_ms == pytest.approx(980.0)
    assert (bench.camera.ledger.count("segmented"), bench.camera.ledger.count("late")) == (masks, 1 - masks)
    assert set(bench.counts().values()) == {masks}


def test_bad_frames_and_engine_failures_are_counted_and_survived(pixels: np.ndarray) -> None:
    bench = Bench()
    good, bad = bench.frame(pixels), bench.frame(pixels)
    bad.message.encoding = "32FC1"
    for frame, failure in ((bad, None), (good, EngineError("device lost")), (good, ValueError("bug")), (good, None)):
        bench.engine.failure = failure
        bench.session.handle(frame)
    ledger, errors = bench.camera.ledger, bench.logger.errors
    assert [ledger.count(outcome) for outcome in ("rejected", "failed", "segmented")] == [1, 2, 1]
    assert "32FC1" in ledger.last_rejection
    assert ledger.last_failure == "bug"
    assert errors[0].startswith("image not segmented (1 so far): encoding: got '32FC1'")
    assert errors[1] == "engine failed (1 frames so far): device lost"
    assert "Traceback" in errors[2]
    assert len(bench.engine.settings) == 3, "a bad frame does not reach the engine"
    assert bench.counts()["mask"] == 1


def test_frames_that_wait_share_a_call_where_that_is_asked_for(pixels: np.ndarray) -> None:
    bench = Bench("stats", cameras=("front", "rear", "side"), batching=True)
    for camera, image in (("rear", pixels), ("side", pixels[:16])):
        bench.slot.put(bench.frame(image, camera=camera), camera)
    bench.session.handle(bench.frame(pixels, camera="front"))
    assert len(bench.engine.settings) == 2, "two of one size, one of another"
    records = {name: camera.ledger.newest for name, camera in bench.cameras.items()}
    assert {name: (record.camera, record.batch) for name, record in records.items()} == {
        "front": ("front", 2), "rear": ("rear", 2), "side": ("side", 1),
    }  # fmt: skip
    values = {"batching": True, "latency_budget_ms": 5, "lazy": False}
    bench.cameras["front"].parameters = build(SegmentationParameters, values)
    bench.slot.put(bench.frame(pixels, camera="rear"), "rear")
    bench.session.handle(bench.frame(pixels, camera="front"))
    assert not bench.slot.empty, "a budget bounds each frame alone"


def test_what_a_lost_device_leaves_undone_waits_for_the_next_engine(pixels: np.ndarray) -> None:
    bench = Bench(cameras=("front", "rear"), batching=True)
    bench.slot.put(bench.frame(pixels[:16], camera="rear"), "rear")
    bench.engine.failure = DeviceLost("gone")
    with pytest.raises(DeviceLost):
        bench.session.handle(bench.frame(pixels, camera="front"))
    bench.slot.hand_over("next")
    assert [bench.slot.take("next").camera for _ in range(2) if not bench.slot.done()] == ["front", "rear"]
    assert not any(camera.ledger.counts()["failed"] for camera in bench.cameras.values())


def test_frames_that_nobody_watches_are_counted_and_the_engine_is_ready_for_whoever_comes(pixels: np.ndarray) -> None:
    bench = Bench(lazy=True)
    for _ in range(3):
        bench.process(pixels)
    assert (bench.camera.ledger.count("unwatched"), bench.camera.ledger.segmented) == (3, 0)
    assert not bench.engine.settings and not any(bench.counts().values())
    assert bench.engine.warmed == [(32, 48)], "the first mask waits for no warm-up"
    bench.process(pixels[:16])
    assert bench.engine.warmed == [(32, 48), (16, 48)]
    bench.published["overlay"].subscribers = 1
    bench.process(pixels)
    assert (len(bench.engine.settings), bench.counts()["overlay"]) == (1, 1)
    bench.published["overlay"].subscribers = 0
    bench.process(pixels)
    assert len(bench.engine.settings) == 1


@pytest.mark.parametrize("output", [*ALL, "mask/compressed", "camera_info", "stats"])
def test_a_subscriber_of_any_output_is_reason_enough(output: str, pixels: np.ndarray) -> None:
    bench = Bench(output, lazy=True)
    bench.process(pixels)
    assert bench.camera.ledger.segmented == 1


def test_a_replay_and_a_node_that_is_not_lazy_segment_for_nobody(pixels: np.ndarray) -> None:
    for values in ({"lazy": True, "processing": "every_frame"}, {"lazy": False}):
        bench = Bench(**values)
        bench.process(pixels)
        assert bench.camera.ledger.segmented == 1


def test_a_bad_camera_is_told_though_nobody_subscribes(pixels: np.ndarray) -> None:
    bench = Bench(lazy=True)
    bad = bench.frame(pixels)
    bad.message.encoding = "32FC1"
    for frame in (bad, bench.frame(pixels), bad):
        bench.session.handle(frame)
    counts = bench.camera.ledger.counts()
    assert (counts["rejected"], counts["unwatched"]) == (2, 1)


def test_a_budget_is_calibrated_before_anybody_subscribes(pixels: np.ndarray) -> None:
    bench = Bench(lazy=True, latency_budget_ms=500)
    bench.process(pixels)
    bench.session.use_idle_time(lambda: True)
    assert bench.session.policy.status.table is not None
    assert bench.camera.ledger.segmented == 0


def test_a_camera_upside_down_is_seen_upright_and_answered_in_its_own_orientation(pixels: np.ndarray) -> None:
    pixels[:16] = 0  # something to tell up from down by
    outputs = (*ALL, "mask/compressed")
    plain = Bench(*outputs, merge_exempt_region="0 0 0.25 1")
    hanging = Bench(*outputs, merge_exempt_region="0 0 0.25 1", rotate=180)
    for bench in (plain, hanging):
        bench.session.handle(replace(bench.frame(pixels), points=(order := Order())))  # type: ignore[arg-type]
        np.testing.assert_array_equal(order.maps[0], pixels[..., 1] >> 6)
    np.testing.assert_array_equal(hanging.engine.images[0], pixels[::-1, ::-1])
    np.testing.assert_array_equal(plain.engine.images[0], pixels)
    assert hanging.engine.settings[0].merge_exempt_region == ((0.75, 0.0, 1.0, 1.0),), "the same rows of the scene"
    for name in outputs:
        assert plain.published[name].messages[0] == hanging.published[name].messages[0], name


class Order:
    """Stands in for an order of labelled points."""

    def fulfil(self, mask: np.ndarray, confidence: np.ndarray) -> None:
        self.maps = mask, confidence


def test_intensities_of_a_thermal_camera_follow_the_parameter() -> None:
    values = np.linspace(29_000, 30_000, 32 * 48).reshape(32, 48).astype(np.uint16)
    for text, levels in (("0 65535", {1}), ("auto", {0, 1, 2, 3}), ("29000 29500", {0, 1, 2, 3})):
        bench = Bench("mask", intensity_range=text)
        frame = Frame(image_message(values, "mono16", Header()), bench.now_ns)
        bench.session.handle(frame)
        mask = np.frombuffer(bench.published["mask"].messages[0].data, np.uint8)
        assert set(mask) == levels


def test_a_frame_that_the_engines_mask_of_a_later_one_overtakes_is_counted_as_dropped(pixels: np.ndarray) -> None:
    bench = Bench("mask", fill_frames=True)
    bench.filler.open()
    try:
        first, older, newer = (bench.frame(pixels, stamp_s) for stamp_s in (90, 91, 92))
        bench.filler.offer(first)
        bench.session.handle(first)  # something to be carried
        with bench.filler.turn(newer) as is_next:
            assert is_next
        bench.filler.offer(older)
        bench.filler.give_up(older)
        deadline_s = time.monotonic() + 10
        while not bench.camera.ledger.dropped and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert bench.camera.ledger.dropped == 1 and bench.camera.ledger.count("filled") == 0
    finally:
        bench.filler.close()
