# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The journal of a finished run as a rosbag2 bag, or as PNG files with a manifest; label maps to messages, without ROS.

What was written is known again, and only that is ever removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from clustvit_ros.bags.journal import LabelledFrame
from clustvit_ros.bags.reading import IMAGE, METADATA_FILE, plain_link, read_metadata, typestore
from clustvit_ros.errors import BagError, ConfigError
from clustvit_ros.images import image_fields

DIAGNOSTIC_ARRAY = "diagnostic_msgs/msg/DiagnosticArray"


def header(sec: int, nanosec: int, frame_id: str) -> Any:
    """A std_msgs/Header."""
    types = typestore().types
    stamp = types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def serialise_image(pixels: np.ndarray, head: Any) -> bytes:
    """Serialise (H, W) uint8 or uint16 as a mono8 or mono16 Image."""
    fields = image_fields(pixels, "mono8" if pixels.dtype == np.uint8 else "mono16")
    message = typestore().types[IMAGE](header=head, **fields)
    return bytes(typestore().serialize_cdr(message, IMAGE))


def serialise_stats(pairs: Mapping[str, str], hardware_id: str, head: Any) -> bytes:
    """Serialise one frame's statistics as a DiagnosticArray of one status."""
    types = typestore().types
    values = [types["diagnostic_msgs/msg/KeyValue"](key=key, value=value) for key, value in pairs.items()]
    status = types["diagnostic_msgs/msg/DiagnosticStatus"](
        level=0, name="label-bag: frame", message="segmented", hardware_id=hardware_id, values=values
    )
    message = types[DIAGNOSTIC_ARRAY](header=head, status=[status])
    return bytes(typestore().serialize_cdr(message, DIAGNOSTIC_ARRAY))


CUSTOM_DATA_KEY = "clustvit_ros"
"""Key of the bag's metadata that holds the run's identity, classes and damage as JSON."""

MANIFEST, RUN_FILE = "manifest.jsonl", "run.json"
_ABOUT = {"identity": dict, "classes": list, "labelled": int, "unlabelled": int, "problems": list, "damage": list}
_TYPES = {"mask": IMAGE, "confidence": IMAGE, "stats": DIAGNOSTIC_ARRAY}
_TOPIC = re.compile(rf"(/\w+)*/segmentation/({'|'.join(_TYPES)})")
# Version 8 is the newest that says its QoS in the way that Humble reads; Jazzy and Kilted read it too.
_BAG_VERSION: Literal[8] = 8


def to_png(pixels: np.ndarray) -> bytes:
    """Encode (H, W) uint8 or uint16, without loss."""
    good, encoded = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not good:
        raise BagError(f"a map of {pixels.shape} {pixels.dtype} cannot be encoded as PNG")
    return encoded.tobytes()


def from_png(encoded: bytes) -> np.ndarray:
    """The inverse of `to_png`."""
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise BagError(
            f"{len(encoded)} bytes of the journal are no PNG; is the disk failing? start again with --restart"
        )
    return pixels


def write_bag(
    folder: Path, frames: Iterable[LabelledFrame], prefixes: Mapping[str, str], about: Mapping[str, Any], storage: str,
    compression: str,
) -> None:  # fmt: skip
    """Write a bag with `<prefix>/mask`, `<prefix>/confidence` and `<prefix>/stats`.

    Args:
        folder: does not exist yet; its name, of letters, digits, spaces and `_-.`, becomes the storage file's.
        frames: labelled frames in order of time; those with a problem are left out.
        prefixes: image topic -> prefix of its labels' topics, e.g. "/segmentation".
        about: goes into the bag's metadata.
        storage: mcap or sqlite3.
        compression: none or zstd.
    """
    from rosbags.rosbag2 import StoragePlugin, Writer

    folder.parent.mkdir(parents=True, exist_ok=True)
    with plain_link(folder.parent) as parent:
        writer = Writer(parent / folder.name, version=_BAG_VERSION, storage_plugin=StoragePlugin[storage.upper()])
        _fill(writer, frames, prefixes, about, storage, compression)
    _sync(folder)


def _fill(
    writer: Any, frames: Iterable[LabelledFrame], prefixes: Mapping[str, str], about: Mapping[str, Any], storage: str,
    compression: str,
) -> None:  # fmt: skip
    from rosbags.rosbag2 import CompressionFormat, CompressionMode

    if compression == "zstd":
        # MCAP compresses its chunks itself; databases get compressed messages.
        mode = CompressionMode.STORAGE if storage == "mcap" else CompressionMode.MESSAGE
        writer.set_compression(mode, CompressionFormat.ZSTD)
    writer.set_custom_data(CUSTOM_DATA_KEY, json.dumps(about, sort_keys=True))
    with writer:
        connections = {
            (topic, name): writer.add_connection(
                f"{prefix}/{name}", msgtype, typestore=typestore(), offered_qos_profiles=[_output_qos()]
            )
            for topic, prefix in prefixes.items()
            for name, msgtype in _TYPES.items()
        }
        for frame in frames:
            if frame.problem or frame.mask is None or frame.confidence is None:
                continue
            head = header(frame.sec, frame.nanosec, frame.frame_id)
            for name, data in (
                ("mask", serialise_image(from_png(frame.mask), head)),
                ("confidence", serialise_image(from_png(frame.confidence), head)),
                ("stats", serialise_stats(frame.stats or {}, frame.device, head)),
            ):
                writer.write(connections[frame.topic, name], frame.timestamp_ns, data)


def write_pngs(
    folder: Path, frames: Iterable[LabelledFrame], prefixes: Mapping[str, str], about: Mapping[str, Any]
) -> None:
    """Write `<prefix>/{mask,confidence}/<number>_<stamp in ns>.png`, `manifest.jsonl` and `run.json`.

    Args:
        folder: does not exist yet.
        frames: labelled frames in order of time; those with a problem have a line in the manifest, and no files.
        prefixes: image topic -> prefix of its labels' topics, e.g. "/segmentation".
        about: goes into run.json.
    """
    for prefix in prefixes.values():
        for name in ("mask", "confidence"):
            (folder / prefix.lstrip("/") / name).mkdir(parents=True, exist_ok=True)
    with (folder / MANIFEST).open("w", encoding="utf-8") as manifest:
        for frame in frames:
            stamp_ns = frame.sec * 1_000_000_000 + frame.nanosec
            line: dict[str, Any] = {
                "number": frame.number, "topic": frame.topic, "timestamp_ns": frame.timestamp_ns,
                "stamp_ns": stamp_ns, "frame_id": frame.frame_id,
            }  # fmt: skip
            if frame.problem:
                line["problem"] = frame.problem
            else:
                for name, encoded in (("mask", frame.mask), ("confidence", frame.confidence)):
                    line[name] = f"{prefixes[frame.topic].lstrip('/')}/{name}/{frame.number:08d}_{stamp_ns}.png"
                    (folder / line[name]).write_bytes(encoded or b"")
                line["stats"] = frame.stats
            manifest.write(json.dumps(line) + "\n")
    (folder / RUN_FILE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(folder)


def read_about(output: Path) -> dict[str, Any] | None:
    """What finished output says about its run; None for anything else."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if (output / RUN_FILE).is_file():
            about = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
        else:
            about = json.loads(read_metadata(output)["custom_data"][CUSTOM_DATA_KEY])
        # Trainings and others have a run.json as well.
        if all(isinstance(about[key], kind) for key, kind in _ABOUT.items()):
            return about
    return None


def remove_output(output: Path) -> None:
    """Delete finished output, if there is any, and nothing else.

    Raises:
        ConfigError: it is something else, or somebody put files there.
    """
    if not os.path.lexists(output):
        return
    if read_about(output) is None:
        raise ConfigError(f"{output}: exists and is no output of label-bag, so it stays; choose another output")
    found = [
        os.path.relpath(os.path.join(folder, name), output)
        for folder, folders, names in os.walk(output)
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]
    ]
    try:
        written = _written(output)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{output}: is damaged ({error}), so it stays; remove it, or choose another output"
        ) from error
    foreign = sorted(name for name in found if name not in written)
    if foreign:
        raise ConfigError(
            f"{output}: holds {len(foreign)} files that label-bag did not write, e.g. {foreign[0]!r}, so it stays; "
            "move them away, or choose another output"
        )
    # Last what tells whose it is: a removal that was cut short can be repeated.
    for name in sorted(found, key=lambda name: (name in (MANIFEST, METADATA_FILE, RUN_FILE), name == RUN_FILE)):
        (output / name).unlink()
    for folder, _, _ in os.walk(output, topdown=False):
        os.rmdir(folder)


def _written(output: Path) -> set[str]:
    """The files of finished output, by what it says of itself."""
    if (output / RUN_FILE).is_file():
        manifest = output / MANIFEST  # which an earlier removal may have removed
        lines = manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else []
        listed = [json.loads(line) for line in lines]
        return {RUN_FILE, MANIFEST} | {
            str(line[name]) for line in listed for name in ("mask", "confidence") if name in line
        }
    metadata = read_metadata(output)
    topics = [str(topic["topic_metadata"]["name"]) for topic in metadata["topics_with_message_count"]]
    if not all(_TOPIC.fullmatch(topic) for topic in topics):
        return set()  # somebody has put something into the bag
    # SQLite leaves two files where somebody looks into a database.
    files = {str(name) + end for name in metadata["relative_file_paths"] for end in ("", "-wal", "-shm")}
    return {METADATA_FILE} | files


def _output_qos() -> Any:
    """As the node offers its masks: reliable, volatile, keep last 5."""
    from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime

    forever = QosTime(2147483647, 4294967295)
    return Qos(
        QosHistory.KEEP_LAST, 5, QosReliability.RELIABLE, QosDurability.VOLATILE, forever, forever,
        QosLiveliness.AUTOMATIC, forever, False,
    )  # fmt: skip


def _sync(folder: Path) -> None:
    """Bring everything in a folder to the disk before it gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
