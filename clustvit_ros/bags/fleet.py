# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Many bags on many workers, by Ray Data: one engine per worker, a worker that dies is replaced and goes on.

Ray owns the pool, its restarts and its retries. A bag that raises does not stop the others: it is tried again after
them, and then listed.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustvit_ros.bags.labelling import LabelOptions, label_bag
from clustvit_ros.engine import create_engine
from clustvit_ros.errors import ClustvitError, ConfigError

LABELLED, DAMAGED, FAILED = "labelled", "damaged", "failed"


@dataclass(frozen=True)
class BagOutcome:
    """What became of one bag.

    Args:
        source: the bag.
        target: its output.
        status: labelled (every image), damaged (what could be read is labelled), or failed.
        reason: why not labelled, or empty.
        frames: images with a mask.
        finished_before: nothing was left to do.
        seconds: that it took.
        worker: process id of the worker.
    """

    source: str
    target: str
    status: str
    reason: str = ""
    frames: int = 0
    finished_before: bool = False
    seconds: float = 0.0
    worker: int = 0


@dataclass(frozen=True)
class FleetOptions:
    """How the work is spread.

    Args:
        address: auto (a running Ray cluster if there is one, else this machine), local, or a cluster's address.
        workers: 0 takes one per GPU, or without GPUs, one per `cpus_per_worker` CPUs.
        gpus_per_worker: share of a GPU that a worker takes; None takes a whole one where there are GPUs.
        cpus_per_worker: CPUs, and threads of the engine, of each worker.
        retries: how often a bag that failed is tried again.

    Raises:
        ConfigError: a number outside its range.
    """

    address: str = "auto"
    workers: int = 0
    gpus_per_worker: float | None = None
    cpus_per_worker: int = 1
    retries: int = 1

    def __post_init__(self) -> None:
        for name, lowest in (("workers", 0), ("cpus_per_worker", 1), ("retries", 0)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {lowest}")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ConfigError(f"gpus_per_worker: got {self.gpus_per_worker}, expected 0 or more")


class BagLabeller:
    """A worker: loads the model once and labels one bag after the other.

    Args:
        engine: arguments of `create_engine`.
        options: options of `label_bag`.
        restart: remove earlier output.
    """

    def __init__(self, engine: Mapping[str, Any], options: LabelOptions, restart: bool) -> None:
        self._engine = create_engine(**engine)
        self._options = options
        self._restart = restart

    def __call__(self, row: Mapping[str, str]) -> dict[str, Any]:
        """Label one bag; errors become part of the outcome, so that they stop no other bag.

        Args:
            row: source and target.
        """
        start_s = time.monotonic()
        outcome: dict[str, Any] = {"source": row["source"], "target": row["target"], "worker": os.getpid()}
        outcome |= {"reason": "", "frames": 0, "finished_before": False}
        try:
            report = label_bag(Path(row["source"]), Path(row["target"]), self._engine, self._options, self._restart)
        except Exception as error:  # a worker outlives every bag
            kind = "" if isinstance(error, ClustvitError) else f"{type(error).__name__}: "
            outcome |= {"status": FAILED, "reason": f"{kind}{error}"}
        else:
            missing = [*report.damage, *report.problems]
            outcome |= {
                "status": LABELLED if report.complete else DAMAGED, "reason": "; ".join(missing),
                "frames": report.labelled, "finished_before": report.finished_before,
            }  # fmt: skip
        return outcome | {"seconds": time.monotonic() - start_s}


def label_bags(
    bags: Sequence[tuple[Path, Path]], engine: Mapping[str, Any], options: LabelOptions = LabelOptions(),
    fleet: FleetOptions = FleetOptions(), restart: bool = False,
    progress: Callable[[BagOutcome], None] = lambda outcome: None,
) -> list[BagOutcome]:  # fmt: skip
    """Label many bags; what an earlier run finished is left alone, what it began is continued.

    Args:
        bags: (source, target) of each; on a cluster, paths that all its machines see.
        engine: arguments of `create_engine`; `threads` is set here.
        options: options of `label_bag`.
        fleet: how the work is spread.
        restart: remove earlier output.
        progress: told of each bag as it ends; of one that will be tried again, at its last end.

    Returns:
        One outcome per bag, in the order of `bags`.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """
    ray, started_here = connect(fleet.address)
    try:
        outcomes: dict[str, BagOutcome] = {}
        pending = list(bags)
        for attempt in range(fleet.retries + 1):
            last = attempt == fleet.retries
            for outcome in _run(ray, pending, dict(engine), options, fleet, restart and attempt == 0):
                outcomes[outcome.source] = outcome
                if outcome.status != FAILED or last:
                    progress(outcome)
            pending = [(source, target) for source, target in bags if outcomes[str(source)].status == FAILED]
            if not pending:
                break
        return [outcomes[str(source)] for source, _ in bags]
    finally:
        if started_here:
            ray.shutdown()


def connect(address: str) -> tuple[Any, bool]:
    """Connect to Ray.

    Args:
        address: auto, local, or a cluster's address.

    Returns:
        The ray module, and True when this call connected it.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"many bags need the Python package {error.name!r}; install it, or this package with its 'fleet' extra"
        ) from error
    if ray.is_initialized():
        return ray, False
    init = functools.partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    if address == "auto":
        try:
            init(address="auto")
            return ray, True
        except ConnectionError:
            address = "local"  # no cluster is running, this machine will do
    try:
        if address == "local":
            init(address="local", include_dashboard=False)
        else:
            init(address=address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray: got {address!r}, where no Ray cluster answers ({error}); expected auto, local or HOST:PORT"
        ) from error
    return ray, True


def _run(
    ray: Any, bags: Sequence[tuple[Path, Path]], engine: dict[str, Any], options: LabelOptions, fleet: FleetOptions,
    restart: bool,
) -> Iterator[BagOutcome]:  # fmt: skip
    resources = ray.cluster_resources()
    gpus = fleet.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if resources.get("GPU", 0) and engine.get("device", "auto") != "cpu" else 0.0
    room = int(resources["GPU"] / gpus) if gpus else int(resources.get("CPU", 1) / fleet.cpus_per_worker)
    workers = max(1, min(fleet.workers or room, len(bags)))
    engine = {**engine, "threads": engine.get("threads") or fleet.cpus_per_worker}
    rows = [{"source": str(source), "target": str(target)} for source, target in bags]
    # Progress is told by bags, not by Ray's operators and their log.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.execution_options.preserve_order = False
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        BagLabeller,
        fn_constructor_args=(engine, options, restart),
        num_cpus=fleet.cpus_per_worker,
        num_gpus=gpus,
        # One bag at a time and none in reserve: bags are long, and the last one should not wait behind another.
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
    )
    for row in data.iter_rows():
        yield BagOutcome(**row)
