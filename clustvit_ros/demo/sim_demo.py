# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The demo without a camera: a simulated drive, its true classes, and what every latency budget costs in accuracy."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clustvit_ros.demo.film import write_film, write_summary
from clustvit_ros.demo.processes import NodeProcess
from clustvit_ros.errors import ClustvitError
from clustvit_ros.images import read_stored
from clustvit_ros.measure.metrics import ConfusionMatrix
from clustvit_ros.networks.model_folder import load_config
from clustvit_ros.policy import percentile

DEFAULT_SEED = 3
BUDGET_SHARES = (1.0, 0.6, 0.4, 0.25)
HELD_SHARE = 0.98
"""A budget is held when so many settled frames are within it, and their 95th percentile is."""

# What two cores segment while they render and record: nothing waits, and a budget has the engine's latency to itself.
SIM_RATE_HZ = 5.0
STREAM_RATE_HZ = 30.0
_STREAM_FRAMES = 90
_LOOP_FRAMES = 50
# Nine metres per second: within one phase, the camera sees enough of the world to be judged by it.
_TIME_LAPSE = 3.0
_SETTLE_S = 1.0
# Renderer, recorder and viewer are not on a robot: they stand back for the node that is being measured.
_HELPERS_NICE = 10


@dataclass
class Phase:
    """Frames that were made with the same settings, from the same stretch of the drive.

    Args:
        name: "default", "full" or "budget_<percent>".
        facts: what the conductor noted.
        frames: entries of the recording that have a mask.
        miou: percent; None without truth for the model's classes.
    """

    name: str
    facts: dict[str, Any]
    frames: list[dict[str, Any]] = field(default_factory=list)
    miou: float | None = None

    def column(self, key: str) -> np.ndarray:
        """A number of the node's statistics, per frame."""
        return np.array([float(frame["stats"][key]) for frame in self.frames])

    @property
    def title(self) -> str:
        """What was set, in words."""
        if self.name == "default":
            return f"merge threshold {self.facts['merge_threshold']:g}"
        if self.name == "full":
            return "nothing merged"
        text = f"budget {100 * self.facts['share']:.0f} %: {self.facts['budget_ms']:.1f} ms"
        return text + (" (minimum)" if self.facts["refused"] else "")

    @property
    def verdict(self) -> str:
        """Whether the budget was held, in words; empty for a phase without one."""
        if "budget_ms" not in self.facts:
            return ""
        figures = self.figures()
        return f"{'held' if figures['held'] else 'missed'}, {100 * figures['within_budget']:.0f} % within"

    def figures(self) -> dict[str, Any]:
        """For summary.json."""
        engine_ms, latency_ms = self.column("engine_ms"), [frame["latency_ms"] for frame in self.frames]
        p95_ms = round(percentile(engine_ms, 0.95), 3)
        verdict = {}
        if "budget_ms" in self.facts:
            budget_ms = self.facts["budget_ms"]
            within = float((engine_ms <= budget_ms).mean())
            verdict = {"within_budget": round(within, 4), "held": within >= HELD_SHARE and p95_ms <= budget_ms}
        sizes = [frame["stats"]["input_size"] for frame in self.frames]
        return {
            **{key: value for key, value in self.facts.items() if not key.endswith("_ns")}, "name": self.name,
            "frames": len(self.frames), "miou": None if self.miou is None else round(self.miou, 3),
            "engine_p50_ms": round(float(np.median(engine_ms)), 3),
            "engine_p95_ms": p95_ms, **verdict,
            "latency_p50_ms": round(float(np.median(latency_ms)), 3),
            "latency_p95_ms": round(percentile(latency_ms, 0.95), 3),
            "tokens_kept_mean": round(float(self.column("tokens_kept").mean()), 2),
            "input_size": max(sizes, key=sizes.count), "tokens_total": int(max(self.column("tokens_total"))),
        }  # fmt: skip


def run_sim(args: argparse.Namespace, seed: int, environ: Mapping[str, str]) -> int:
    """Drive, turn the knobs, score, and draw.

    Args:
        args: as of `clustvit-ros demo`.
        seed: seed of the world.
        environ: environment of the processes.

    Raises:
        ConfigError: the renderer is not installed, or the model cannot be used.
        ClustvitError: a process failed; its last words are in the message.
    """
    from clustvit_ros.sim import SIM_CLASSES  # says what is missing where the renderer is

    classes = load_config(args.model).classes
    output = args.output.absolute()
    (output / "logs").mkdir(parents=True)
    scored = classes.names == SIM_CLASSES.names
    recording, notes, streaming = _record(args, seed, output, environ, scored)
    phases = [_phase(facts, recording["frames"], output, len(classes) if scored else 0) for facts in notes["phases"]]
    phases = [phase for phase in phases if phase.frames]
    if not phases or phases[0].name != "default":
        raise ClustvitError("no frame with mask, image and clusters was recorded; is the machine overloaded?")
    film = write_film(output / "demo.mp4", phases, recording["frames"], output, classes, args.rate)
    write_summary(output / "summary.png", phases, output, classes)
    report = {
        "model": str(args.model), "source": f"sim:{seed}", "miou": phases[0].miou,
        **{key: recording[key] for key in ("frames_sent", "masks_received", "node", "fps", "latency_ms", "engine_ms")},
        "full_ms": next(phase.facts["engine_p50_ms"] for phase in phases if phase.name == "full"),
        "phases": [phase.figures() for phase in phases], "streaming": streaming,
    }  # fmt: skip
    (output / "summary.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print(report, phases, args.output, film)
    if not scored:
        print(f"  not scored: {args.model} has other classes than the simulated world ({', '.join(SIM_CLASSES.names)})")
    return 0


def _record(
    args: argparse.Namespace, seed: int, output: Path, environ: Mapping[str, str], scored: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Run the processes to their end; the recorder's summary, the conductor's notes, and what streaming is worth."""
    manifest, notes, stream = output / "manifest.jsonl", output / "phases.json", output / "streaming.json"
    loop_frames = args.frames or _LOOP_FRAMES
    # One frame more than a pass: with one less, a single late frame would be more than 2 %.
    phase_s = (loop_frames + 1) / args.rate
    camera = {
        "source": f"sim:{seed}", "rate_hz": args.rate, "time_lapse": _TIME_LAPSE, "loop_frames": loop_frames,
        "manifest": manifest, "wait_for_subscribers": 2, "wait_timeout_s": 180.0,
    }  # fmt: skip
    node = {"model": str(args.model), "device": args.device, "merge_threshold": args.merge_threshold}
    recorder = {
        "output_folder": output, "manifest": manifest, "overlay_every": 0, "save_images": True,
        "save_ground_truth": True, "save_clusters": True, "idle_timeout_s": 60.0, "start_timeout_s": 200.0,
    }  # fmt: skip
    conductor = {
        "output": notes, "merge_threshold": args.merge_threshold, "phase_s": phase_s,
        "budget_shares": ",".join(map(str, BUDGET_SHARES)),
    }  # fmt: skip
    print(
        f"simulated camera (seed {seed}) -> node -> recorder over DDS (ROS_DOMAIN_ID={environ['ROS_DOMAIN_ID']}), "
        f"{args.rate:g} Hz, model {args.model};\n{2 + len(BUDGET_SHARES)} phases of {phase_s:g} s over "
        f"the same stretch: merge threshold {args.merge_threshold:g}, nothing merged, and budgets of "
        f"{', '.join(f'{100 * share:.0f}' for share in BUDGET_SHARES)} % of what that takes",
        flush=True,
    )
    logs = output / "logs"
    with contextlib.ExitStack() as stack:

        def start(module: str, parameters: dict[str, Any]) -> NodeProcess:
            log = logs / f"{module.rpartition('.')[2]}.log"
            nice = 0 if module == "node.node" else _HELPERS_NICE
            return stack.enter_context(NodeProcess(module, parameters, environ, log, nice))

        recording = start("demo.recorder", recorder)
        # Ended before the recorder: its last words, too, are recorded.
        processes = [
            start("node.node", node), start("demo.camera", camera), start("demo.conductor", conductor), recording,
        ]  # fmt: skip
        if getattr(args, "view", False):
            start("demo.viewer", {"model": str(args.model)})
        conducting = processes[2]
        told = 0
        while conducting.exit_code is None:
            failed = next((process for process in processes if process.exit_code is not None), None)
            if failed is not None and conducting.exit_code is None:
                raise ClustvitError(f"the {failed.name} process ended early:\n{failed.last_lines()}")
            done = _phases_of(notes)
            for number, phase in enumerate(done[told:], told + 1):
                budget = f" of {phase['budget_ms']:.1f} ms" if "budget_ms" in phase else ""
                print(
                    f"  {number} of {2 + len(BUDGET_SHARES)}: {phase['name'].replace('_', ' ')}{budget}, engine p50 "
                    f"{phase['engine_p50_ms']:.1f} ms",
                    flush=True,
                )
            told = len(done)
            time.sleep(0.1)
        if conducting.exit_code:
            raise ClustvitError(f"the conductor gave up:\n{conducting.last_lines(3)}\n{processes[0].last_lines()}")
        processes[1].stop()
        time.sleep(_SETTLE_S)
        recording.stop(30.0)
        if scored:
            print(f"  the same drive at {STREAM_RATE_HZ:g} Hz, frames dropped and filled", flush=True)
            source = {"source": f"sim:{seed}", "rate_hz": STREAM_RATE_HZ, "frames": args.frames or _STREAM_FRAMES}
            streaming = start("demo.streaming", {**source, "output": stream})
            while streaming.exit_code is None:
                if processes[0].exit_code is not None:
                    raise ClustvitError(f"the node process ended early:\n{processes[0].last_lines()}")
                time.sleep(0.1)
            if streaming.exit_code:
                raise ClustvitError(f"streaming failed:\n{streaming.last_lines(3)}\n{processes[0].last_lines()}")
    return (
        json.loads((output / "recording.json").read_text(encoding="utf-8")),
        json.loads(notes.read_text(encoding="utf-8")),
        json.loads(stream.read_text(encoding="utf-8")) if scored else None,
    )


def _phases_of(notes: Path) -> list[dict[str, Any]]:
    """What the conductor noted so far."""
    return json.loads(notes.read_text(encoding="utf-8"))["phases"] if notes.exists() else []


def _phase(facts: dict[str, Any], frames: list[dict[str, Any]], folder: Path, num_classes: int) -> Phase:
    """The frames of a phase, scored against the truth that was published with them."""
    complete = ("mask", "image", "ground_truth", "clusters", "stats")
    chosen = [
        frame
        for frame in frames
        if facts["after_ns"] < frame["stamp_ns"] <= facts["until_ns"] and all(frame[key] for key in complete)
    ]
    phase = Phase(facts["name"], facts, chosen)
    if num_classes and chosen:
        matrix = ConfusionMatrix(num_classes)
        for frame in chosen:
            matrix.add(read_stored(folder / frame["ground_truth"]), read_stored(folder / frame["mask"]))
        phase.miou = 100 * float(matrix.miou())
    return phase


def _print(report: dict[str, Any], phases: list[Phase], output: Path, film: Path) -> None:
    node, live = report["node"], report["phases"][0]
    print(
        f"  frames           {report['frames_sent']} sent, {node.get('frames_received', '?')} received by the node, "
        f"{node.get('frames_dropped', '?')} dropped for newer ones; {report['fps'] or 0:.1f} masks per second"
    )
    if live["miou"] is not None:
        print(
            f"  live mIoU        {live['miou']:.2f} at {phases[0].title}, on {live['frames']} frames with known truth"
        )
    print(
        f"  latency          p50 {live['latency_p50_ms']:.1f} ms, p95 {live['latency_p95_ms']:.1f} ms, stamp to mask; "
        f"of it the engine p50 {live['engine_p50_ms']:.1f} ms, p95 {live['engine_p95_ms']:.1f} ms"
    )
    print(f"\n  {'setting':<32} {'engine p50':>11} {'p95':>9} {'input':>9} {'tokens kept':>13} {'mIoU':>7}")
    for phase, figures in zip(phases, report["phases"], strict=True):
        miou = "-" if figures["miou"] is None else f"{figures['miou']:.2f}"
        kept = f"{figures['tokens_kept_mean']:.0f} of {figures['tokens_total']}"
        p50, p95, size = figures["engine_p50_ms"], figures["engine_p95_ms"], figures["input_size"]
        line = f"  {phase.title:<32} {p50:>8.1f} ms {p95:>6.1f} ms {size:>9} {kept:>13} {miou:>7}  {phase.verdict}"
        print(line.rstrip())
    for phase in phases:
        if phase.facts.get("refused"):
            print(f"  {100 * phase.facts['share']:.0f} % is not possible on this machine: {phase.facts['refused']}")
    if report["streaming"]:
        fresh, held, filled = (report["streaming"][name] for name in ("fresh", "held", "filled"))
        print(
            f"\n  at {report['streaming']['rate_hz']:g} Hz     streaming mIoU {held['miou']:.2f} with frames dropped "
            f"({100 * held['coverage']:.0f} % get a mask), {filled['miou']:.2f} with fill_frames "
            f"({100 * filled['coverage']:.0f} %); every frame's own mask would be {fresh['miou']:.2f}"
        )
    print(f"\n  film {film}\n  picture {output / 'summary.png'}, figures {output / 'summary.json'}")
