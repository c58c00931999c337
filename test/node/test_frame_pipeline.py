"""One frame through decode, engine and publishers, without a node around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sensor_msgs", reason="needs ROS 2 (sensor_msgs)")

from sensor_msgs.msg import Image
from std_msgs.msg import Header

from clustvit_ros.engine import Engine, EngineInfo, Prediction, ScriptedEngine, Settings
from clustvit_ros.errors import EngineError, ImageError
from clustvit_ros.node.camera_outputs import CameraOutputs
from clustvit_ros.node.conversions import image_message
from clustvit_ros.node.diagnostics import FrameCounts, frame_pairs
from clustvit_ros.node.frame_pipeline import Frame, FramePipeline
from clustvit_ros.node.frame_runner import FrameRunner
from clustvit_ros.node.latency_control import LatencyControl
from clustvit_ros.node.parameter_spec import build
from clustvit_ros.node.parameters import SegmentationParameters

SECOND_NS = 1_000_000_000
ALL = ("mask", "confidence", "overlay", "clusters")


class FakePublisher:
    """Stands in for an rclpy publisher."""

    def __init__(self, subscribers: int) -> None:
        self.subscribers = subscribers
        self.messages: list[Image] = []

    def get_subscription_count(self) -> int:
        return self.subscribers

    def publish(self, message: Image) -> None:
        self.messages.append(message)


class SpyEngine(Engine):
    """The scripted engine, remembering what it was asked, and failing on request."""

    def __init__(self) -> None:
        self._engine = ScriptedEngine()
        self.settings: list[Settings] = []
        self.warmed: list[tuple[int, int] | None] = []
        self.failure: Exception | None = None

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        self.warmed.append(image_size)

    def capacities(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        return self._engine.capacities(image_size)

    def segment(self, images: Any, settings: Settings = Settings()) -> Prediction:
        self.settings.append(settings)
        if self.failure is not None:
            raise self.failure
        return self._engine.segment(images, settings)


class FakeLogger:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, text: str, **_throttle: Any) -> None:
        self.errors.append(text)

    def info(self, text: str, **_throttle: Any) -> None:
        pass


class Bench:
    """A pipeline with fake publishers, of which `subscribed` have a subscriber."""

    def __init__(self, *subscribed: str) -> None:
        self.engine = SpyEngine()
        self.published: dict[str, FakePublisher] = {}
        self.now_ns = 100 * SECOND_NS

        def create(_kind: type, topic: str, *_qos: Any, **_options: Any) -> FakePublisher:
            name = topic.removeprefix("segmentation/")
            return self.published.setdefault(name, FakePublisher(int(name in subscribed)))

        latency = LatencyControl(self.engine, FakeLogger())
        self.pipeline = FramePipeline(self.engine, {"": CameraOutputs(create)}, lambda: self.now_ns, latency)

    def frame(self, pixels: np.ndarray, stamp_s: int = 99) -> Frame:
        header = Header(frame_id="camera")
        header.stamp.sec = stamp_s
        return Frame(image_message(pixels, "rgb8", header), arrival_ns=self.now_ns - 20_000_000)

    def images(self) -> list[tuple[str, FakePublisher]]:
        return [(name, self.published[name]) for name in ALL]

    def counts(self) -> dict[str, int]:
        return {name: len(self.published[name].messages) for name in ALL}


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)


def test_mask_is_the_engines_with_the_frames_header(pixels: np.ndarray) -> None:
    bench = Bench("mask")
    frame = bench.frame(pixels)
    report = bench.pipeline.process(frame, SegmentationParameters())
    message = bench.published["mask"].messages[0]
    assert message.header == frame.message.header
    assert (message.encoding, message.step, message.height, message.width) == ("mono8", 48, 32, 48)
    np.testing.assert_array_equal(np.frombuffer(message.data, np.uint8).reshape(32, 48), pixels[..., 1] >> 6)
    assert report.stamped
    assert report.age_ms == pytest.approx(1000.0)


def test_only_the_mask_is_computed_for_nobody(pixels: np.ndarray) -> None:
    bench = Bench()
    bench.pipeline.process(bench.frame(pixels), SegmentationParameters())
    assert bench.counts() == {"mask": 1, "confidence": 0, "overlay": 0, "clusters": 0}
    assert (bench.engine.settings[0].confidence, bench.engine.settings[0].clusters) == (False, False)


def test_everything_is_published_when_subscribed(pixels: np.ndarray) -> None:
    bench = Bench(*ALL)
    bench.pipeline.process(bench.frame(pixels), build(SegmentationParameters, {"output_size": "20x10"}))
    sizes = {name: (p.messages[0].height, p.messages[0].width) for name, p in bench.images()}
    assert sizes == {"mask": (20, 10), "confidence": (20, 10), "clusters": (20, 10), "overlay": (32, 48)}
    encodings = {name: publisher.messages[0].encoding for name, publisher in bench.images()}
    assert encodings == {"mask": "mono8", "confidence": "mono8", "clusters": "mono8", "overlay": "rgb8"}


def test_unstamped_frames_are_aged_from_their_arrival(pixels: np.ndarray) -> None:
    bench = Bench()
    report = bench.pipeline.process(bench.frame(pixels, stamp_s=0), SegmentationParameters())
    assert not report.stamped
    assert report.age_ms == pytest.approx(20.0)


def test_engine_is_warmed_once_for_each_size(pixels: np.ndarray) -> None:
    bench = Bench()
    for image in (pixels, pixels, pixels[:16], pixels):
        bench.pipeline.process(bench.frame(image), SegmentationParameters())
    assert bench.engine.warmed == [(32, 48), (16, 48)]


@pytest.mark.parametrize(("policy", "masks"), [("publish_late", 1), ("drop", 0)])
def test_a_late_frame_is_counted_and_published_as_the_policy_says(policy: str, masks: int, pixels: np.ndarray) -> None:
    bench, reports = Bench(*ALL), []
    parameters = build(
        SegmentationParameters,
        {"latency_budget_ms": 500, "budget_reference": "stamp", "deadline_policy": policy},
    )
    runner = FrameRunner(
        lambda: bench.pipeline,
        lambda camera: parameters,
        lambda *report: reports.append(report),
        FakeLogger(),
        lambda: True,
    )
    runner._handle(bench.frame(pixels))  # stamped a second ago
    _, report, counts = reports[0]
    assert (report.deadline_missed, report.published, report.misses.total) == (True, bool(masks), 1)
    assert report.age_ms == pytest.approx(1000.0)
    assert report.arrival_age_ms == pytest.approx(980.0)
    assert (counts.segmented, counts.late) == (masks, 1 - masks)
    assert set(bench.counts().values()) == {masks}


def test_every_frame_says_under_which_latency_settings_it_was_made(pixels: np.ndarray) -> None:
    bench = Bench()
    values = {"latency_budget_ms": 9, "deadline_policy": "drop", "min_tokens": 2, "token_capacity": 5}
    report = bench.pipeline.process(bench.frame(pixels), build(SegmentationParameters, values))
    pairs = frame_pairs(report, FrameCounts())
    expected = {
        "latency_budget_ms": "9", "budget_reference": "inference", "deadline_policy": "drop", "min_tokens": "2",
        "token_ceiling": "2", "budget_state": "calibrating", "deadline_missed": "false", "deadline_misses": "0",
        "published": "true", "frames_late": "0",
    }  # fmt: skip
    assert expected.items() <= pairs.items()


def test_bad_frames_and_engine_failures_are_counted_and_survived(pixels: np.ndarray) -> None:
    bench, logger, reports = Bench(), FakeLogger(), []
    runner = FrameRunner(
        lambda: bench.pipeline,
        lambda camera: SegmentationParameters(),
        lambda *report: reports.append(report),
        logger,
        lambda: True,
    )
    good, bad = bench.frame(pixels), bench.frame(pixels)
    bad.message.encoding = "32FC1"
    for frame, failure in ((bad, None), (good, EngineError("device lost")), (good, ValueError("bug")), (good, None)):
        bench.engine.failure = failure
        runner._handle(frame)  # the worker's way, without its thread
    account = runner.account()
    assert (account.counts.rejected, account.counts.failed, account.counts.segmented) == (1, 2, 1)
    assert "32FC1" in account.last_rejection
    assert account.last_failure == "bug"
    assert logger.errors[0].startswith("image not segmented (1 so far): encoding: got '32FC1'")
    assert logger.errors[1] == "engine failed (1 frames so far): device lost"
    assert "Traceback" in logger.errors[2]
    assert len(reports) == 1


def test_a_bad_frame_reaches_neither_engine_nor_topics(pixels: np.ndarray) -> None:
    bench = Bench(*ALL)
    frame = bench.frame(pixels)
    frame.message.step += 1
    with pytest.raises(ImageError):
        bench.pipeline.process(frame, SegmentationParameters())
    assert not bench.engine.settings
    assert set(bench.counts().values()) == {0}
