# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Labelling the images of one bag: every frame, under fixed settings, so that a second run gives the same labels.

Results go into a journal beside the output first and become the output in one rename at the end; a run that was cut
short continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clustvit_ros.bags.journal import Journal, LabelledFrame, WorkFolder, check_identity, written_to
from clustvit_ros.bags.reading import (
    COMPRESSED_IMAGE,
    IMAGE,
    PARTIAL_SUFFIX,
    BagReader,
    read_message,
    to_pixels,
    unusable,
)
from clustvit_ros.bags.salvage import Salvaged
from clustvit_ros.bags.writing import read_about, remove_output, to_png, write_bag, write_pngs
from clustvit_ros.engine import Engine, Settings
from clustvit_ros.engine.engine import FrameRecord
from clustvit_ros.errors import BagError, ClustvitError, ConfigError, ImageError
from clustvit_ros.jpeg import KnownEdges

FORMATS = ("bag", "png")
OUTPUT_STORAGES = ("same", "mcap", "sqlite3")
COMPRESSIONS = ("none", "zstd")
_OUTPUT_NAMES = ("mask", "confidence", "overlay", "clusters")
_IDENTITY_BYTES = 1 << 16
_PROBLEMS_TOLD, _DAMAGE_TOLD = 5, 50
# ROS 2 takes names of 255 bytes, file systems as long folders; what is appended needs room.
_LONGEST_NAMESPACE = 200
_LATEST_NS = (1 << 63) - 1

Progress = Callable[[int, int], None]
"""Called with the frames done and the frames in all, as far as known."""


@dataclass(frozen=True)
class LabelOptions:
    """How a bag is labelled.

    Args:
        topics: image topics; empty for all that can be segmented.
        merge_threshold: as the node's parameter.
        token_capacity: likewise.
        confidence_threshold: likewise.
        output_size: (height, width), "input" or "model".
        format: bag or png.
        storage: format of the bag that is written: same (as the input's), mcap or sqlite3.
        compression: how that bag is compressed: none or zstd.

    Raises:
        ConfigError: a value that is none of these.
    """

    topics: tuple[str, ...] = ()
    merge_threshold: float = 0.5
    token_capacity: int = 0
    confidence_threshold: float = 0.0
    output_size: tuple[int, int] | str = "input"
    format: str = "bag"
    storage: str = "same"
    compression: str = "none"

    def __post_init__(self) -> None:
        for name, choices in (("format", FORMATS), ("storage", OUTPUT_STORAGES), ("compression", COMPRESSIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if isinstance(self.output_size, str) and self.output_size not in ("input", "model"):
            raise ConfigError(f"output_size: got {self.output_size!r}, expected input, model or (height, width)")
        if self.format == "png" and (self.storage, self.compression) != ("same", "none"):
            raise ConfigError(
                f"format: got 'png' with storage {self.storage!r} and compression {self.compression!r}, which are a "
                "bag's; PNG files are compressed already, leave both out"
            )
        self.settings((1, 1))

    def settings(self, model_size: tuple[int, int]) -> Settings:
        """What every engine call gets; `model_size` is (height, width) that the network works at."""
        size = {"input": None, "model": model_size}[self.output_size] if isinstance(self.output_size, str) else None
        fixed = None if isinstance(self.output_size, str) else self.output_size
        return Settings(self.merge_threshold, self.token_capacity, self.confidence_threshold, fixed or size)


@dataclass
class LabelReport:
    """What became of a bag.

    Args:
        source: the bag.
        target: the output.
        prefixes: output namespace by image topic.
        labelled: frames with a mask.
        continued: frames of them that an earlier run had done.
        unlabelled: frames without a mask, and of the first few, why.
        problems: those reasons.
        damage: what of the bag could not be read.
        skipped: image topics that were not chosen by name and cannot be segmented, with the reason.
        finished_before: nothing was left to do.
        devices: what computed it, in this run and those that it continues.
    """

    source: Path
    target: Path
    prefixes: dict[str, str] = field(default_factory=dict)
    labelled: int = 0
    continued: int = 0
    unlabelled: int = 0
    problems: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    finished_before: bool = False
    devices: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """True when every frame that was recorded has its mask."""
        return not self.damage and not self.unlabelled


def label_bag(
    source: Path, target: Path, engine: Engine, options: LabelOptions = LabelOptions(), restart: bool = False,
    progress: Progress = lambda done, total: None,
) -> LabelReport:  # fmt: skip
    """Label a bag, or what is left of it.

    Args:
        source: what `BagReader` reads; it is only read.
        target: folder to be made; until then, `<target>.partial` beside it holds the work.
        engine: used in this thread.
        options: settings and outputs.
        restart: remove earlier output, finished or not.
        progress: told after each frame.

    Raises:
        BagError: nothing can be read, or there is nothing to label.
        ConfigError: an option that does not fit the bag, or output of another run in the way.
        EngineError: the device failed.
    """
    target = Path(os.path.realpath(target))
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    real_source = Path(os.path.realpath(source))
    if target in (real_source, *real_source.parents):
        raise ConfigError(f"{target}: holds the bag itself; choose another output")
    with BagReader(source) as bag:
        prefixes, skipped = choose_topics(bag, options.topics)
        identity = _identity(bag, engine, options, prefixes)
        report = LabelReport(source, target, prefixes, skipped=skipped)
        if target.exists() and not restart:
            return _finished(report, identity, partial)
        with written_to(partial), WorkFolder(partial) as work:
            if restart:
                remove_output(target)
                work.clear()
            elif target.exists():  # another process has just finished
                return _finished(report, identity, partial)
            with contextlib.closing(Journal(work, identity)) as journal:
                _label(bag, journal, engine, options, report, progress)
                _summarise(journal, report)
                report.damage = bag.damage[:_DAMAGE_TOLD]
                if len(bag.damage) > _DAMAGE_TOLD:
                    report.damage.append(f"and {len(bag.damage) - _DAMAGE_TOLD} places more")
                if report.labelled:
                    _publish(journal, work, report, _about(identity, engine, report), options, bag.storage)
            work.clear()
    if not report.labelled:
        reasons = "; ".join(report.damage + report.problems) or "its image topics hold no messages"
        raise BagError(f"{source}: no image could be labelled ({reasons})")
    return report


def choose_topics(bag: BagReader, chosen: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Which topics are labelled, and where their labels go.

    One topic's labels go where the node publishes them, `/segmentation/...`; those of several to
    `<image topic>/segmentation/...`.

    Args:
        bag: with its topics.
        chosen: topics that the user named; empty for all that can be segmented.

    Returns:
        Output namespace by image topic; and for what was left out, the reason.

    Raises:
        BagError: no image topic.
        ConfigError: a chosen topic that is not there, or holds no images.
    """
    images = list(dict.fromkeys(topic.name for topic in bag.topics if topic.msgtype in (IMAGE, COMPRESSED_IMAGE)))
    types = {topic.name: topic.msgtype for topic in bag.topics}
    skipped: dict[str, str] = {}
    if not images:
        names = ", ".join(sorted(f"{shown(name)} ({shown(kind)})" for name, kind in types.items())) or "none at all"
        raise BagError(f"{bag.path}: no topic of {IMAGE} or {COMPRESSED_IMAGE}; its topics are: {names}")
    for name in chosen:
        if name not in images:
            kind = f"of type {types[name]}" if name in types else "not in this bag"
            known = ", ".join(sorted(map(shown, images)))
            raise ConfigError(f"topic {shown(name)}: is {kind}, expected one of {known}")
    for name in images if not chosen else ():
        reason = _why_not(bag, name)
        if reason:
            skipped[name] = reason
    topics = list(dict.fromkeys(chosen)) or [name for name in images if name not in skipped]
    if not topics:
        reasons = "; ".join(f"{shown(name)} {reason}" for name, reason in skipped.items())
        raise BagError(f"{bag.path}: no image topic that can be segmented ({reasons}); choose one with --topic")
    if len(topics) == 1:
        return {topics[0]: "/segmentation"}, skipped
    prefixes: dict[str, str] = {}
    # Names that are as they should be come first: what others become must not take theirs.
    for name in sorted(topics, key=lambda name: name != _ros_name(name)):
        plain = free = _ros_name(name)
        number = 1
        while free in prefixes:
            number += 1
            free = f"{plain}_{number}"
        prefixes[free] = name
    namespaces = {name: f"{free}/segmentation" for free, name in prefixes.items()}
    return {name: namespaces[name] for name in topics}, skipped


def shown(topic: str) -> str:
    """A topic's name for people: one line of a terminal, whatever a bag calls a topic."""
    text = topic if topic.isprintable() else repr(topic)
    return text if len(text) <= _LONGEST_NAMESPACE else f"{text[:_LONGEST_NAMESPACE]}... ({len(topic)} characters)"


def _ros_name(topic: str) -> str:
    """The name that ROS 2 accepts and a folder can have, next to what a bag calls a topic."""
    parts = [re.sub(r"[^A-Za-z0-9_]", "_", part) for part in topic.split("/") if part]
    name = "".join(f"/_{part}" if part[0].isdigit() else f"/{part}" for part in parts)
    return name[:_LONGEST_NAMESPACE].rstrip("/") or "/_"


def _why_not(bag: BagReader, topic: str) -> str:
    *_, group, name = ("", *topic.split("/"))
    if group == "segmentation" and name in _OUTPUT_NAMES:
        return "is output of a segmentation node"
    unreadable, problem = 0, ""
    for message in _image_messages(bag, [topic]):
        try:
            reason = unusable(read_message(message.msgtype, message.data))
        except ImageError as error:  # one damaged message says nothing about the topic
            unreadable, problem = unreadable + 1, problem or str(error)
            continue
        count = sum(entry.message_count for entry in bag.topics if entry.name == topic)
        return reason and f"{reason}: {count} messages"
    if unreadable:
        return f"holds {unreadable} messages of which none can be read ({problem})"
    return f"holds no messages that can be read ({'; '.join(bag.damage)})" if bag.damage else "holds no messages"


def _image_messages(bag: BagReader, topics: Iterable[str]) -> Iterator[Salvaged]:
    """In order; a topic may have messages of other types beside."""
    return (message for message in bag.messages(topics) if message.msgtype in (IMAGE, COMPRESSED_IMAGE))


def _label(
    bag: BagReader, journal: Journal, engine: Engine, options: LabelOptions, report: LabelReport, progress: Progress
) -> None:
    settings = options.settings(engine.info.input_size)
    total = sum(
        topic.message_count for topic in bag.topics
        if topic.name in report.prefixes and topic.msgtype in (IMAGE, COMPRESSED_IMAGE)
    )  # fmt: skip
    done = journal.next_number
    progress(done, total)
    report.continued = done
    edges: defaultdict[str, KnownEdges] = defaultdict(KnownEdges)
    try:
        for number, message in enumerate(_image_messages(bag, report.prefixes)):
            if number >= done:
                journal.add(_labelled(number, message, engine, settings, edges[message.topic]))
                progress(number + 1, total)
    finally:
        journal.commit()


def _labelled(
    number: int, message: Salvaged, engine: Engine, settings: Settings, edges: KnownEdges
) -> LabelledFrame:  # fmt: skip
    place = (number, message.topic, min(max(message.timestamp_ns, 0), _LATEST_NS))
    if place[2] != message.timestamp_ns:
        return LabelledFrame(*place, problem=f"recorded at {message.timestamp_ns} ns, which is no time of ROS 2")
    try:
        image = read_message(message.msgtype, message.data)
        head = image.header
        stamped = (*place, head.stamp.sec, head.stamp.nanosec, head.frame_id)
        prediction = engine.segment(to_pixels(image, edges), settings)
    except ImageError as error:
        return LabelledFrame(*place, problem=str(error))
    assert prediction.confidence is not None  # `settings` asks for it
    mask = prediction.mask[0]
    record = FrameRecord(
        mask_size=(mask.shape[0], mask.shape[1]), stats=prediction.stats,
        confidence_threshold=settings.confidence_threshold,
    )  # fmt: skip
    # No times: those of this machine say nothing about the robot, and two runs give the same bag without them.
    pairs = {**record.label_pairs(), "model": engine.info.model}
    return LabelledFrame(*stamped, to_png(mask), to_png(prediction.confidence[0]), pairs, engine.info.device)


def _summarise(journal: Journal, report: LabelReport) -> None:
    report.labelled = report.unlabelled = 0
    report.devices = journal.devices()
    for topic, timestamp_ns, problem in journal.outcomes():
        if not problem:
            report.labelled += 1
            continue
        report.unlabelled += 1
        if len(report.problems) < _PROBLEMS_TOLD:
            report.problems.append(f"{shown(topic)}, image of {timestamp_ns} ns: {problem}")


def _about(identity: Mapping[str, Any], engine: Engine, report: LabelReport) -> dict[str, Any]:
    """What the output says of its run; `read_about` knows it again."""
    classes = engine.info.classes
    return {
        "identity": identity,
        "classes": [
            {"name": name, "colour": list(colour)}
            for name, colour in zip(classes.names, classes.colours, strict=True)
        ],
        "labelled": report.labelled, "unlabelled": report.unlabelled, "problems": report.problems,
        "damage": report.damage,
    }  # fmt: skip


def _publish(
    journal: Journal, work: WorkFolder, report: LabelReport, about: Mapping[str, Any], options: LabelOptions,
    source_storage: str,
) -> None:  # fmt: skip
    """Write the output beside the journal and give it its name in one step."""
    work.clear_stage()  # of a run that was killed while it wrote
    # A bag's name is in its files as well, and rosbags puts it into SQLite's URIs as it is.
    finished = work.stage / re.sub(r"[^\w. -]", "_", report.target.name)
    try:
        if options.format == "png":
            write_pngs(finished, journal.frames(), report.prefixes, about)
        else:
            storage = source_storage if options.storage == "same" else options.storage
            write_bag(finished, journal.frames(), report.prefixes, about, storage, options.compression)
        os.replace(finished, report.target)
    except BaseException:
        work.clear_stage()  # a full disk is not to stay full
        raise


def _finished(report: LabelReport, identity: Mapping[str, Any], partial: Path) -> LabelReport:
    about = read_about(report.target)
    if about is None:
        raise ConfigError(f"{report.target}: exists and is no output of label-bag; choose another output")
    check_identity(report.target, about["identity"], identity)
    if partial.exists():  # a run was killed after its output had got its name
        with contextlib.suppress(ClustvitError, OSError), WorkFolder(partial) as work:
            work.clear()
    report.labelled = report.continued = about["labelled"]
    report.unlabelled, report.problems = about["unlabelled"], about["problems"]
    report.damage, report.finished_before = about["damage"], True
    return report


def _identity(bag: BagReader, engine: Engine, options: LabelOptions, prefixes: Mapping[str, str]) -> dict[str, Any]:
    """What must be equal for a run to continue another; the device may differ."""
    return {
        **asdict(options), "topics": sorted(prefixes), "bag": [_file_identity(file) for file in bag.files],
        "model": engine.info.model, "weights_sha256": engine.info.weights_sha256, "engine": engine.info.engine,
    }  # fmt: skip


def _file_identity(file: Path) -> list[Any]:
    """Name, size and a digest of both ends: a copy is the same bag, a new recording is not."""
    size = file.stat().st_size
    with file.open("rb") as content:
        ends = content.read(_IDENTITY_BYTES)
        content.seek(max(0, size - _IDENTITY_BYTES))
        ends += content.read(_IDENTITY_BYTES)
    return [file.name, size, hashlib.sha256(ends).hexdigest()]
