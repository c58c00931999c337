# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros demo`: camera, node and recorder as separate processes over DDS, and what came of it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustvit_ros.dds import claim_domain, node_environment
from clustvit_ros.demo.film import write_film
from clustvit_ros.demo.frame_source import VideoSource, sim_seed
from clustvit_ros.demo.processes import NodeProcess
from clustvit_ros.demo.sim_demo import DEFAULT_SEED, SIM_RATE_HZ, Phase, run_sim
from clustvit_ros.errors import ClustvitError, ConfigError, DataError
from clustvit_ros.images import list_images, read_stored, write_image
from clustvit_ros.measure.metrics import ConfusionMatrix
from clustvit_ros.measure.pictures import contact_sheet, window_problem
from clustvit_ros.networks.model_folder import load_config
from clustvit_ros.training.dataset import LabelledImages, find_images, find_pairs, read_labels

_MODEL, _SIM_MODEL = "camvid_tiny", "sim_tiny"
_MIN_FRAMES, _MAX_FRAMES = 60, 300
_RATE_HZ = 10.0


@dataclass(frozen=True)
class DemoSource:
    """What the camera publishes.

    Args:
        location: for the camera node: folder of images, video file or device.
        labels: folder of labels with the images' stems, or None.
        frames: how many frames to send; a folder starts over when it has fewer.
        available: how many it has; 0 where that is not known.
    """

    location: str
    labels: Path | None
    frames: int
    available: int = 0

    @property
    def left_out(self) -> bool:
        """Whether it has more frames than are sent."""
        return self.available > self.frames


def make_run_folder(output: Path, source: str) -> Path:
    """A new folder of `output` for one run, and `latest` beside it, which leads there.

    Args:
        output: folder of all runs.
        source: what the run is of; its name becomes part of the folder's.
    """
    name = re.sub(r"[^\w.-]+", "-", source.rstrip("/").rpartition("/")[2] or source)
    started = f"{datetime.datetime.now():%Y%m%d-%H%M%S}_{name}"
    for candidate in itertools.chain([started], (f"{started}_{number}" for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (output / candidate).mkdir(parents=True)
            break
    with contextlib.suppress(OSError):  # a file system without links
        link = output / f".latest.{os.getpid()}"
        link.symlink_to(candidate)
        link.replace(output / "latest")
    return output / candidate


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="see frames segmented through real ROS 2 topics")
    parser.add_argument(
        "--source",
        default="sim",
        help="sim or sim:SEED: a simulated drive, scored, under several latency budgets (default); "
        "folder of images (labels/ in or beside it are scored), video file or /dev/videoN",
    )
    parser.add_argument(
        "--model", help=f"a shipped model's name or a model folder (default: {_SIM_MODEL} for sim, else {_MODEL})"
    )
    parser.add_argument("--merge-threshold", type=float, default=0.5, help="0..1, 1 merges nothing (default: 0.5)")
    parser.add_argument(
        "--rate", type=float, help=f"frames per second of the camera (default: {_RATE_HZ:g}; sim: {SIM_RATE_HZ:g})"
    )
    parser.add_argument(
        "--frames", type=int, default=0,
        help="frames to send (default: all of folder or video, 60 to 300; sim: 50 for each setting)",
    )  # fmt: skip
    parser.add_argument("--view", action="store_true", help="show the overlay in a window while it runs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"),
        help="folder that gets a folder for each run, and latest, which leads to the newest",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("rclpy") is None:
        raise ConfigError(
            "the demo needs ROS 2's rclpy: source a ROS 2 installation, or install this package with its 'ros' extra"
        )
    seed = sim_seed(args.source or "", DEFAULT_SEED)
    simulated = seed is not None
    if args.rate is None:
        args.rate = SIM_RATE_HZ if simulated else _RATE_HZ
    if args.rate <= 0 or args.frames < 0:
        raise ConfigError(f"--rate {args.rate:g} --frames {args.frames}: expected a rate above 0 and 0 or more frames")
    environ = _environment()
    if args.view and (problem := window_problem(environ)):
        print(f"no window: {problem}; film and pictures in {args.output} show the same")
        args.view = False
    args.model = args.model or (_SIM_MODEL if simulated else _MODEL)
    if seed is not None:
        args.output = make_run_folder(args.output, args.source)
        return run_sim(args, seed, environ)
    classes = load_config(args.model).classes
    source = find_source(args.source, args.frames)
    labels = find_labels(source, len(classes))
    if source.labels is not None and not labels:
        print(f"not scored: no file in {source.labels} is called <stem of an image>.png")
        source = dataclasses.replace(source, labels=None)
    args.output = make_run_folder(args.output, source.location)
    (args.output / "logs").mkdir()
    recording = _record(args, source, environ)
    report = {key: value for key, value in recording.items() if key != "frames"}
    report["model"] = args.model
    matrix, scored = score(recording["frames"], args.output, labels, len(classes))
    if matrix.counts.any():
        report |= {"miou": round(100 * matrix.miou(), 3), "images_scored": scored}
    (args.output / "summary.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    complete = ("image", "mask", "clusters", "stats")
    frames = [frame for frame in recording["frames"] if all(frame[key] for key in complete)]
    facts = {"merge_threshold": args.merge_threshold, "after_ns": 0, "until_ns": sys.maxsize}
    phases = [Phase("default", facts, frames, report.get("miou"))]
    film = write_film(args.output / "demo.mp4", phases, frames, args.output, classes, args.rate)
    overlays = [args.output / frame["overlay"] for frame in recording["frames"] if frame["overlay"]]
    if overlays:
        write_image(args.output / "summary.png", contact_sheet(overlays))
    _print(report, source)
    print(f"  film {film}, pictures in {args.output}/overlays")
    print(f"  the whole in {args.output}/summary.png and {args.output}/summary.json")
    return 0


def find_source(text: str | None, frames: int = 0) -> DemoSource:
    """Resolve what the user passed.

    Raises:
        ConfigError: nothing was passed.
        DataError: a folder without images, or no such file.
    """
    if not text:
        raise ConfigError(
            "no source: pass sim, a folder of images, a video or a camera, e.g. make demo SOURCE=/dev/video0"
        )
    path = Path(text).expanduser()
    if not path.is_dir():
        if not path.exists() and not text.isdecimal():
            raise DataError(
                f"source {text!r} does not exist; expected sim, sim:SEED, a folder of images, a video or /dev/videoN"
            )
        if text.isdecimal() or not path.is_file():
            return DemoSource(text if text.isdecimal() else str(path.absolute()), None, frames or _MIN_FRAMES)
        count = VideoSource(str(path.absolute())).length
        return DemoSource(str(path.absolute()), None, frames or min(count or _MIN_FRAMES, _MAX_FRAMES), count)
    images = path / "images" if (path / "images").is_dir() else path
    count = len(find_images(images))
    labels = next((folder for folder in (path / "labels", images.parent / "labels") if folder.is_dir()), None)
    return DemoSource(str(images.absolute()), labels, frames or min(max(count, _MIN_FRAMES), _MAX_FRAMES), count)


def find_labels(source: DemoSource, num_classes: int) -> dict[str, Path]:
    """Files of labels by the stem of their image, of the images that are sent; each is read once.

    Raises:
        DataError: one cannot be used, which is better known before a run than after it.
    """
    if source.labels is None:
        return {}
    folder = Path(source.location)
    sent = set(list_images(folder)[: source.frames])
    pairs = [pair for pair in find_pairs(folder, source.labels) if pair.image in sent and pair.label.is_file()]
    if pairs:
        data = LabelledImages.of_pairs(
            pairs, num_classes, lambda pair: read_labels(pair.label, num_classes), str(source.labels)
        )
        for index in range(len(data)):
            data[index]
    return {pair.stem: pair.label for pair in pairs}


def score(
    frames: Sequence[dict[str, Any]], folder: Path, labels: Mapping[str, Path], num_classes: int
) -> tuple[ConfusionMatrix, int]:
    """Compare recorded masks with the labels of the pictures they were made from.

    Args:
        frames: entries of the recording; those without a mask or without a label do not count.
        folder: what their file names are relative to.
        labels: as `find_labels` gives them.

    Returns:
        Pixels counted, and of how many masks.
    """
    matrix, scored = ConfusionMatrix(num_classes), 0
    for frame in frames:
        label = labels.get(Path(frame.get("name", "")).stem)
        if frame["mask"] and label is not None:
            matrix.add(read_labels(label, num_classes), read_stored(folder / frame["mask"]))
            scored += 1
    return matrix, scored


def _record(args: argparse.Namespace, source: DemoSource, environ: dict[str, str]) -> dict[str, Any]:
    """Run the three processes to their end and return the recorder's summary.

    Raises:
        ClustvitError: one of them failed; its last words are in the message.
    """
    output = args.output.absolute()
    manifest = output / "manifest.jsonl"
    camera = {
        "source": source.location, "rate_hz": args.rate, "count": source.frames, "manifest": manifest,
        "wait_for_subscribers": 2, "wait_timeout_s": 180.0,
    }  # fmt: skip
    node = {
        "model": str(args.model), "device": args.device, "merge_threshold": args.merge_threshold,
        # Scored is what the engine made; what people look at has a mask for every frame.
        "fill_frames": source.labels is None,
    }  # fmt: skip
    recorder = {
        "output_folder": output, "manifest": manifest, "idle_timeout_s": 4.0, "start_timeout_s": 200.0,
        "save_images": True, "save_clusters": True,
    }  # fmt: skip
    print(
        f"camera -> node -> recorder over DDS (ROS_DOMAIN_ID={environ['ROS_DOMAIN_ID']}): {source.frames} frames of "
        f"{source.location} at {args.rate:g} Hz, model {args.model}",
        flush=True,
    )
    with (
        NodeProcess("demo.recorder", recorder, environ, output / "logs" / "recorder.log") as recorder_process,
        NodeProcess("node.node", node, environ, output / "logs" / "node.log") as node_process,
        NodeProcess("demo.camera", camera, environ, output / "logs" / "camera.log") as camera_process,
        (
            NodeProcess("demo.viewer", {"model": str(args.model)}, environ, output / "logs" / "viewer.log")
            if args.view
            else contextlib.nullcontext()
        ),
    ):
        processes = (recorder_process, node_process, camera_process)
        while recorder_process.exit_code is None:
            failed = next((process for process in processes if process.exit_code), None)
            if failed is None and node_process.exit_code is not None:
                failed = node_process
            if failed is not None:
                raise ClustvitError(f"the {failed.name} process ended early:\n{failed.last_lines()}")
            time.sleep(0.1)
    if recorder_process.exit_code:
        raise ClustvitError(f"nothing was recorded; the node's last words:\n{node_process.last_lines()}")
    return json.loads((output / "recording.json").read_text(encoding="utf-8"))


def _environment() -> dict[str, str]:
    """What the processes get."""
    environ = node_environment(os.environ)
    # A domain of its own and this host only: neither the demo nor a robot nearby hears the other.
    if "ROS_DOMAIN_ID" not in environ:
        environ["ROS_DOMAIN_ID"] = str(claim_domain())
    environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    environ.setdefault("RCUTILS_LOGGING_USE_STDOUT", "1")
    return environ


def _print(report: dict[str, Any], source: DemoSource) -> None:
    node = report["node"]
    latency, engine = report["latency_ms"], report["engine_ms"]
    left_out = f" of {source.available}; --frames {source.available} sends all" if source.left_out else ""
    print(f"  frames sent      {report['frames_sent']}{left_out}")
    print(f"  frames received  {node.get('frames_received', '?')} by the node")
    print(f"  frames dropped   {node.get('frames_dropped', '?')} by the node for newer ones")
    print(f"  masks received   {report['masks_received']}, {report['fps'] or 0:.1f} fps")
    print(f"  latency          p50 {latency['p50']:.1f} ms, p95 {latency['p95']:.1f} ms, p99 {latency['p99']:.1f} ms")
    if engine:
        print(f"  of it the engine p50 {engine['p50']:.1f} ms, p95 {engine['p95']:.1f} ms, p99 {engine['p99']:.1f} ms")
    if "miou" in report:
        print(f"  mIoU             {report['miou']:.2f} on {report['images_scored']} masks")
