# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros predict`: masks of pictures, videos and cameras, without ROS and without labels."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from clustvit_ros.cli.arguments import add_input_scale, add_merge_options, add_threads, new_folder, tell_merges_nothing
from clustvit_ros.demo.frame_source import FrameReader, FrameSource, PictureSource, SourceFrame, open_source
from clustvit_ros.engine import ENGINES, PRECISION_CHOICES, Engine, Prediction, create_engine
from clustvit_ros.engine.masks import draw_overlay
from clustvit_ros.errors import ConfigError, ImageError
from clustvit_ros.images import Intensities, check_pixels, is_image, orientation, write_image
from clustvit_ros.measure.pictures import FilmWriter, annotated, class_legend, window_problem
from clustvit_ros.paths import new_run_folder, replacing
from clustvit_ros.policy import Policy, percentile
from clustvit_ros.policy.parameter_spec import build
from clustvit_ros.policy.parameters import SegmentationParameters
from clustvit_ros.policy.plan import TOLERATED_MISSES

_RUNS = Path("runs") / "predict"
_ALPHA = 0.5
_DEFAULT_RATE_HZ, _LIVE_FILM_HZ = 25.0, 15.0
_PROBLEMS_TOLD = 5
_MAX_PIXELS = 1 << 28
_WINDOW = "clustvit-ros predict (q ends)"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "predict",
        help="masks and overlays of pictures, videos and cameras, without ROS",
        description="Pictures become masks/NAME.png (class ids, 255 = unlabelled) and overlays/NAME.jpg, a video or "
        "camera a film of overlays. Beside them lie legend.png, frames.jsonl (tokens, times, classes of every frame) "
        "and summary.json. Exit code 1: some pictures could not be read; they are listed.",
    )
    parser.add_argument(
        "source", nargs="+", metavar="SOURCE",
        help="picture, folder, pattern ('drive/**/*.jpg'), video, /dev/video0 or 0, rtsp://..., sim:SEED; several are "
        "taken one after the other",
    )  # fmt: skip
    parser.add_argument(
        "--model", default="camvid_tiny", help="one of `clustvit-ros models`, or a model folder (default: camvid_tiny)"
    )
    parser.add_argument("--out", type=Path, help=f"new or empty folder for the results (default: {_RUNS}/<n>)")
    add_merge_options(parser)
    add_input_scale(parser, "0.25")
    parser.add_argument(
        "--budget-ms", type=float, default=0.0,
        help="what a frame may take in the engine; size and tokens follow (default: 0, no budget)",
    )  # fmt: skip
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.0, help="pixels below it become 255, 0..1 (default: 0)"
    )
    parser.add_argument(
        "--intensity-range", default="0 65535", metavar="auto|'LOW HIGH'",
        help="of 16-bit pictures, what is black and white, in quotes; auto, for thermal cameras, takes nearly all of "
        "each picture's own values (default: '0 65535')",
    )  # fmt: skip
    parser.add_argument("--masks", action="store_true", help="of a video or camera, write every frame's mask as well")
    parser.add_argument("--frames", type=int, default=0, help="stop after so many frames of each source (default: all)")
    parser.add_argument("--show", action="store_true", help="show overlays in a window; q ends")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="what runs the network (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precision", choices=PRECISION_CHOICES, default="auto", help="of the network (default: auto)")
    add_threads(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.frames < 0:
        raise ConfigError(f"--frames: got {args.frames}, expected 0 (all) or more")
    parameters = build(
        SegmentationParameters,
        {
            "merge_threshold": args.merge_threshold, "token_capacity": args.token_capacity,
            "confidence_threshold": args.confidence_threshold, "latency_budget_ms": args.budget_ms,
            "input_scale": args.input_scale, "max_image_pixels": _MAX_PIXELS,
            "min_input_scale": min(0.375, args.input_scale), "threads": args.threads,
            "intensity_range": args.intensity_range,
        },
    )  # fmt: skip
    problem = window_problem(os.environ) if args.show else ""
    if problem:
        raise ConfigError(f"--show: {problem}; leave it out, the results are written in any case")
    unreadable: list[str] = []
    narrower = _Narrower(parameters.intensity_range)
    sources = _open(args.source, unreadable, narrower)
    with new_folder(args.out) if args.out else contextlib.nullcontext():
        engine = create_engine(args.model, args.engine, args.device, args.threads, args.precision)
    info = engine.info
    reason = f" ({info.device_reason})" if info.device_reason else ""
    print(f"model {info.model}, engine {info.engine_told} in {info.precision} on {info.device}{reason}", flush=True)
    tell_merges_nothing(args, info.model, info.merges)
    folder = args.out or new_run_folder(_RUNS)
    prediction = _Predictor(engine, parameters, folder, args, unreadable)
    started_s = time.monotonic()
    interrupted = False
    try:
        with (folder / "frames.jsonl").open("w", encoding="utf-8") as log:
            for source in sources:
                for entry in prediction.run(source):
                    log.write(json.dumps(entry) + "\n")
    except KeyboardInterrupt:
        interrupted = not any(source.live for source in sources)  # which is how a camera ends
    finally:
        prediction.finish(time.monotonic() - started_s, interrupted, narrower)
        engine.close()
    return 130 if interrupted else int(bool(unreadable))


def _open(given: list[str], unreadable: list[str], to_bytes: Callable[[np.ndarray], np.ndarray]) -> list[FrameSource]:
    """Sources in order; pictures that a shell's pattern named one by one are one source."""
    pictures = [Path(text) for text in given if is_image(Path(text))]
    if len(pictures) == len(given):
        return [PictureSource(pictures, unreadable.append, to_bytes)]
    return [open_source(text, on_unreadable=unreadable.append, to_bytes=to_bytes) for text in given]


class _Predictor:
    """Segments sources into a folder, and knows what came of all of them.

    Args:
        engine: what segments.
        parameters: as the node's.
        folder: for the results.
        args: `masks`, `frames` and `show`.
        unreadable: pictures that could not be read or segmented, so far.
    """

    def __init__(
        self, engine: Engine, parameters: SegmentationParameters, folder: Path, args: argparse.Namespace,
        unreadable: list[str],
    ) -> None:  # fmt: skip
        self._engine, self._parameters, self._folder, self._args = engine, parameters, folder, args
        self._unreadable = unreadable
        self._turned: list[str] = []  # stored otherwise than viewers show them
        self._classes = engine.info.classes
        self._palette = self._classes.palette()
        self._notes = _Notes()
        self._policy = Policy(engine, self._notes)
        self._names: set[str] = set()
        self._begun = False
        self._calibrating_s = 0.0
        self._pixels = np.zeros(len(self._palette), np.int64)
        self._films: list[FilmWriter] = []
        self._ended = False

    def run(self, source: FrameSource) -> Iterator[dict[str, Any]]:
        """Segment all of a source; facts of each frame, for `frames.jsonl`."""
        pictures = isinstance(source, PictureSource)
        rate_hz = _LIVE_FILM_HZ if source.live else source.rate_hz or _DEFAULT_RATE_HZ
        total = min(source.length, self._args.frames or source.length) or self._args.frames or None
        started_s, written = time.monotonic(), 0
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(desc=source.description, total=total, unit="image", mininterval=0.5))
            film: FilmWriter | None = None
            for frame in self._frames(source):
                image = cv2.cvtColor(frame.pixels, cv2.COLOR_BGR2RGB)
                try:
                    check_pixels(image.shape[0], image.shape[1], self._parameters.max_image_pixels)
                    prediction = self._segment(image)
                except ImageError as error:
                    self._unreadable.append(f"{frame.name}: {error}")
                    continue
                overlay = draw_overlay(image, prediction.mask[0], self._palette, _ALPHA)
                entry = self._entry(frame, prediction)
                stem = self._stem(frame.name, pictures)
                if pictures or self._args.masks:
                    entry["mask"] = f"masks/{stem}.png"
                    write_image(self._folder / entry["mask"], prediction.mask[0])
                if isinstance(source, PictureSource) and orientation(source.folder / frame.name) != 1:
                    self._turned.append(frame.name)
                if pictures:
                    entry["overlay"] = f"overlays/{stem}.jpg"
                    write_image(self._folder / entry["overlay"], overlay)
                else:
                    if film is None:
                        name = self._stem(frame.name.rpartition("_")[0] + ".mp4", True)
                        film = stack.enter_context(FilmWriter(self._folder / f"{name}.mp4", rate_hz))
                        self._films.append(film)
                    # A live film runs as fast as what it shows.
                    due = int((time.monotonic() - started_s) * rate_hz) if source.live else written + 1
                    while written < due:
                        film.add(overlay)
                        written += 1
                if self._args.show and self._is_closed(overlay, prediction, bar.format_dict["rate"]):
                    self._ended = True
                bar.update()
                yield entry
                if self._ended:
                    break

    def _frames(self, source: FrameSource) -> Iterator[SourceFrame]:
        reader = FrameReader(source, loop=False, size=None)
        count = 0
        try:
            while not self._ended and not (self._args.frames and count >= self._args.frames):
                try:
                    frame = reader.next()
                except StopIteration:
                    return
                if frame is None:
                    time.sleep(0.001)
                    continue
                count += 1
                yield frame
        finally:
            reader.close()

    def _segment(self, image: np.ndarray) -> Prediction:
        first = not self._begun
        while True:
            begun_s = time.monotonic()
            plan = self._policy.plan([image], self._parameters)
            prediction = self._engine.segment(image, plan.settings)
            self._policy.learn(plan, prediction, [prediction.stats.total_ms])
            if plan.budget_state == "calibrating":
                size = f"{image.shape[1]}x{image.shape[0]}"
                tqdm.write(f"calibrating at {size}; kept for the next run unless other processes compute meanwhile")
            self._notes.quiet = first  # what it would say is the error of the check
            self._policy.use_idle_time(lambda: True)
            self._notes.quiet = False
            if first and self._parameters.latency_budget_ms:
                self._policy.check(SegmentationParameters(), self._parameters)
            if plan.budget_state != "calibrating":
                break
            self._calibrating_s += time.monotonic() - begun_s
        self._begun = True
        return prediction

    def _entry(self, frame: SourceFrame, prediction: Prediction) -> dict[str, Any]:
        mask, stats = prediction.mask[0], prediction.stats
        counts = np.bincount(mask.ravel(), minlength=len(self._palette))
        self._pixels += counts
        names = enumerate(self._classes.names)
        shares = {name: round(float(counts[i]) / mask.size, 4) for i, name in names if counts[i]}
        return {
            "name": frame.name, "size": list(mask.shape), "tokens_kept": round(stats.tokens_kept, 2),
            "tokens_total": stats.tokens_total, "input_size": list(stats.input_size),
            "total_ms": round(stats.total_ms, 3), "stages_ms": {k: round(v, 3) for k, v in stats.stages_ms.items()},
            "classes": shares,
        }  # fmt: skip

    def _stem(self, name: str, with_suffix: bool) -> str:
        """A name for what is written, without suffix unless another has that name already."""
        stem = str(Path(name).with_suffix("")) if with_suffix else name
        candidates = itertools.chain((stem, name), (f"{stem}_{number}" for number in itertools.count(2)))
        # Folders of results may lie where A and a are one file.
        chosen = next(candidate for candidate in candidates if candidate.lower() not in self._names)
        self._names.add(chosen.lower())
        return chosen

    def _is_closed(self, overlay: np.ndarray, prediction: Prediction, rate_hz: float | None) -> bool:
        stats, budget_ms = prediction.stats, self._parameters.latency_budget_ms
        shown = annotated(
            overlay, self._classes, rate_hz or 0.0, stats.total_ms, budget_ms, stats.tokens_kept, stats.tokens_total
        )
        cv2.imshow(_WINDOW, cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
        return cv2.waitKey(1) & 0xFF in (ord("q"), 27)

    def finish(self, elapsed_s: float, interrupted: bool, narrower: _Narrower) -> None:
        """Write the summary and tell it; nothing is left of a run without a frame, good or bad.

        Args:
            elapsed_s: since the first frame was asked for.
            interrupted: some of what was given has not been looked at.
            narrower: what 16-bit pictures went through.
        """
        # By what was written: an interruption may come between any two lines of this program.
        with (self._folder / "frames.jsonl").open(encoding="utf-8") as log:
            entries = [json.loads(line) for line in log if line.endswith("\n")]
        info, count, unreadable, turned = self._engine.info, len(entries), self._unreadable, self._turned
        engine_ms = [entry["total_ms"] for entry in entries]
        elapsed_s -= self._calibrating_s
        if not count and not unreadable:
            (self._folder / "frames.jsonl").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._folder.rmdir()
            return
        report: dict[str, Any] = {
            "model": info.model, "engine": info.engine, "device": info.device, "precision": info.precision,
            "classes": [
                {"id": i, "name": name, "colour": list(colour)}
                for i, (name, colour) in enumerate(zip(self._classes.names, self._classes.colours, strict=True))
            ],
            "merge_threshold": self._parameters.merge_threshold, "token_capacity": self._parameters.token_capacity,
            "input_scale": self._parameters.input_scale, "intensity_range": self._args.intensity_range,
            "hardly_in_range": narrower.count,
            "images": count, "interrupted": interrupted, "unreadable": unreadable, "turned": turned,
            "seconds": round(elapsed_s, 3), "films": [str(film.path.relative_to(self._folder)) for film in self._films],
        }  # fmt: skip
        if count:
            report["images_per_second"] = round(count / elapsed_s, 2)
            report["engine_ms"] = {f"p{p}": round(percentile(engine_ms, p / 100), 3) for p in (50, 95)}
            shares_kept = [entry["tokens_kept"] / entry["tokens_total"] for entry in entries]
            report["tokens_kept_share"] = round(float(np.mean(shares_kept)), 4)
            write_image(self._folder / "legend.png", class_legend(self._classes, 22 * len(self._classes)))
        if count and self._parameters.latency_budget_ms:
            budget_ms = self._parameters.latency_budget_ms
            within = float(np.mean(np.array(engine_ms) <= budget_ms))
            report["budget"] = {"ms": budget_ms, "within": round(within, 4)}
        with replacing(self._folder / "summary.json") as partial:
            partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        for problem in unreadable[:_PROBLEMS_TOLD]:
            print(f"  left out: {problem}")
        if len(unreadable) > _PROBLEMS_TOLD:
            print(f"  left out: {len(unreadable) - _PROBLEMS_TOLD} more, see summary.json")
        if narrower.count:
            print(f"  {narrower.count} of {narrower.seen}: {narrower.problem}", file=sys.stderr)
        if turned:
            names = ", ".join(turned[:3]) + (", ..." if len(turned) > 3 else "")
            print(
                f"  segmented as stored, sideways or upside down to viewers: {len(turned)} with an orientation tag "
                f"({names}); turn their pixels and drop the tag (exiftran -ai)"
            )
        if not count:
            print(f"0 images: none of {len(unreadable)} could be read")
        else:
            print(
                f"{count} image{'s' * (count > 1)} in {elapsed_s:.1f} s, {report['images_per_second']:.1f} per second; "
                f"engine p50 {report['engine_ms']['p50']:.1f} ms, p95 {report['engine_ms']['p95']:.1f} ms; "
                f"{100 * report['tokens_kept_share']:.0f} % of the tokens kept"
            )
            shares = self._pixels / max(self._pixels.sum(), 1)
            order = [i for i in np.argsort(-shares)[:6] if shares[i] > 0.001 and i < len(self._classes)]
            told = ", ".join(f"{self._classes.names[i]} {100 * shares[i]:.1f} %" for i in order)
            print(f"  {told or 'all unlabelled'}")
        if "budget" in report:
            within, budget_ms = report["budget"]["within"], report["budget"]["ms"]
            print(f"  {100 * within:.1f} % within the budget of {budget_ms:g} ms")
            if 1.0 - within > TOLERATED_MISSES:
                why = self._policy.status.problem() or "the latest hold it; the first showed how fast this machine is"
                print(f"  this budget was missed: {why}", file=sys.stderr)
        for film in self._films:
            print(f"  film {film.path}{f' ({film.note})' if film.note else ''}")
        unfinished = "interrupted, the rest was not looked at; " if interrupted else ""
        print(f"{unfinished}results in {self._folder}")


class _Narrower:
    """Makes 8 bits of 16-bit pictures, and counts those that hardly use the range that was given."""

    def __init__(self, limits: tuple[int, int] | None) -> None:
        self._intensities = Intensities(weight=1.0)
        self._narrow = self._intensities.within(limits)
        self.seen = self.count = 0
        self.problem = ""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        narrowed = self._narrow(pixels)
        self.seen += 1
        if self._intensities.problem:
            self.count += 1
            self.problem = self.problem or self._intensities.problem
        return narrowed


class _Notes:
    """What the policy logs: problems are told, progress is not."""

    quiet = False

    def info(self, text: str, **_: Any) -> None:
        """Nothing: the progress bar moves."""

    def warning(self, text: str, **_: Any) -> None:
        """Tell it."""
        if not self.quiet:
            tqdm.write(text)

    error = warning
