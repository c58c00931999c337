# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The loop that every training shares: steps, schedule, averaged weights, checkpoints, and a stop on a bad loss.

Everything random in a step follows from seed, step and process alone, so that a run continued from any checkpoint ends
with the weights of an uninterrupted one.
"""

from __future__ import annotations

import abc
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clustvit_ros.errors import ConfigError, DataError
from clustvit_ros.training.crops import Batch, Place
from clustvit_ros.training.distributed import Processes
from clustvit_ros.training.optimisation import (
    Optimisation,
    Precision,
    build_optimizer,
    relative_rate,
    update_average,
)
from clustvit_ros.training.run_folder import (
    CHECKPOINT,
    append_line,
    check_fingerprint,
    load_checkpoint,
    save_checkpoint,
)

LOG = "log.jsonl"
Network = TypeVar("Network", bound=nn.Module)


class TimeUp(Exception):
    """The time limit was reached; everything is saved, and the same command continues."""


class Losses(NamedTuple):
    """What a step is judged by.

    Attributes:
        losses: scalars whose sum is optimised.
        measures: scalars that are logged alone.
    """

    losses: dict[str, Tensor]
    measures: dict[str, Tensor]


class RunOptions(NamedTuple):
    """How a run is carried out; nothing here changes what is learned.

    Attributes:
        time_limit_s: stop and save after so long; 0 is no limit.
        checkpoint_every_s: save within an epoch when so long has passed; the end of an epoch saves in any case.
        compile: let `torch.compile` fuse network and losses.
        on_record: called with each epoch's record in the main process.
    """

    time_limit_s: float = 0.0
    checkpoint_every_s: float = 120.0
    compile: bool = False
    on_record: Callable[[dict[str, Any]], None] = lambda record: None


def tensorboard_writer(run_dir: Path) -> Callable[[dict[str, Any]], None]:
    """A function that logs an epoch's record for TensorBoard.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the Python package tensorboard; install it, or this package with its "
            "'tensorboard' extra"
        ) from error
    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, dict):
                for part, number in value.items():
                    if number is not None:
                        writer.add_scalar(f"{name}/{part}", number, record["epoch"])
            elif isinstance(value, (int, float)) and name != "epoch":
                writer.add_scalar(name, value, record["epoch"])
        writer.flush()

    return write


class TrainingLoop(abc.ABC, Generic[Network]):
    """A training of some network by some loss.

    Args:
        network: what is trained; moved to the device.
        optimisation: how.
        num_images: images of an epoch.
        fingerprint: everything that a checkpoint must agree with before it is continued.
        run_dir: checkpoint and log go here; an existing checkpoint is continued.
        device: device that trains.
        processes: those that train together.
        options: how the run is carried out.

    Raises:
        DataError: the checkpoint in `run_dir` was made in another way, or the batch cannot be divided.
    """

    def __init__(
        self, network: Network, optimisation: Optimisation, num_images: int, fingerprint: dict[str, Any], run_dir: Path,
        device: torch.device, processes: Processes = Processes(), options: RunOptions = RunOptions(),
    ) -> None:  # fmt: skip
        if optimisation.batch_size % processes.world_size:
            raise DataError(
                f"schedule: batch_size is {optimisation.batch_size}, which cannot be divided between "
                f"{processes.world_size} processes"
            )
        # Channels last in memory is how convolutions run fastest, in bfloat16 above all.
        self.network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = copy.deepcopy(network).eval().requires_grad_(False)
        self.optimisation, self.run_dir, self.device = optimisation, Path(run_dir), device
        self.processes, self.options = processes, options
        self.num_images, self.fingerprint = num_images, fingerprint
        self.precision = Precision(optimisation.precision, device)
        self.steps_per_epoch = max(num_images // optimisation.batch_size, 1)
        processes.synchronise_norms(self.network, device)
        self.optimizer = build_optimizer(self.network, optimisation.learning_rate, optimisation.weight_decay)
        self.step = 0
        self.best_score = -math.inf
        self._totals: dict[str, float] = {}
        self._pending: _Report | None = None
        self._started = self._saved = time.monotonic()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if (self.run_dir / CHECKPOINT).exists():
            self._resume()
        step_module = self._step_module()
        if options.compile:
            step_module.compile()
        self._module = processes.wrap(step_module, device)

    @abc.abstractmethod
    def _step_module(self) -> nn.Module:
        """A module around the network that maps the tensors of `_inputs` to the names and values of `Losses`."""

    @abc.abstractmethod
    def _batches(self, epoch: int, batches: list[list[Place]]) -> Iterator[Batch]:
        """This process's part of each of the global `batches`."""

    @abc.abstractmethod
    def _inputs(self, step: int, batch: Batch) -> tuple[Any, ...]:
        """Arguments of the step module."""

    def _order(self, generator: torch.Generator) -> list[int]:
        """Indices of the images of an epoch, `num_images` of them, as they are drawn."""
        return torch.randperm(self.num_images, generator=generator).tolist()

    def _to_training_mode(self) -> None:
        self.network.train()

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.step // self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.optimisation.epochs

    def run(self, end_of_epoch: Callable[[int, dict[str, Any]], None]) -> None:
        """Train to the end.

        Args:
            end_of_epoch: called in the main process with the number of complete epochs and the epoch's record, which
                it may extend.

        Raises:
            TimeUp: the time limit was reached first.
            DataError: a loss was not finite, or a checkpoint could not be written.
        """
        self.progress = tqdm(
            total=self.total_steps, initial=self.step, desc=self.fingerprint.get("name", "train"), unit="step",
            mininterval=1.0, disable=not self.processes.is_main, dynamic_ncols=True,
        )  # fmt: skip
        try:
            for epoch in range(self.epoch, self.optimisation.epochs):
                started = time.monotonic()
                record: dict[str, Any] = {"epoch": epoch + 1, **self._train_epoch(epoch)}
                record["learning_rate"] = self._rate(self.step - 1)
                record["train_s"] = round(time.monotonic() - started, 1)
                if self.processes.is_main:
                    end_of_epoch(epoch + 1, record)
                self._save()
                if self.processes.is_main:
                    append_line(self.run_dir / LOG, json.dumps(record))
                    self.options.on_record(record)
                self.processes.wait()
                if epoch + 1 < self.optimisation.epochs:
                    self._check_time()
        finally:
            self.progress.close()

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """Train from the current step to the end of an epoch; means over its steps."""
        size = self.optimisation.batch_size
        order = self._order(seeded_generator(self.optimisation.seed, epoch))
        # An epoch of fewer images than a batch has starts anew within it.
        order = (order * math.ceil(size / len(order)))[: self.steps_per_epoch * size]
        places = list(enumerate(order))
        batches = [places[start : start + size] for start in range(0, len(places), size)]
        done = self.step - epoch * self.steps_per_epoch
        if done == 0:
            self._totals = {}
        self._to_training_mode()
        for batch in self._batches(epoch, batches[done:]):
            self._train_step(batch)
            if self.step % self.steps_per_epoch and self._is_due():
                self._save()
                self._check_time()
        self._settle()
        return {name: value / self.steps_per_epoch for name, value in self._totals.items()}

    def _train_step(self, batch: Batch) -> None:
        step, optimisation = self.step, self.optimisation
        torch.manual_seed(_seed(optimisation.seed, step * self.processes.world_size + self.processes.rank))
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs = self._inputs(step, batch)
        with self.precision.autocast():
            losses, measures = self._module(*inputs)
        loss = torch.stack(list(losses.values())).sum()
        report = _Report(step, batch.names, {"loss": loss, **losses, **measures}, self.processes)
        self.precision.step(loss, self.optimizer, self.network, optimisation.clip_norm)
        update_average(self.averaged, self.network, optimisation.ema_decay, step)
        # A loss is read when the next step is under way, so that a GPU never waits for the CPU.
        self._settle()
        self._pending = report
        self.step += 1
        self.progress.update()

    def _settle(self) -> None:
        """Read the last step's losses, and stop if they are not finite."""
        if self._pending is None:
            return
        report, self._pending = self._pending, None
        values = report.read()
        if not math.isfinite(values["loss"]):
            path = self.run_dir / CHECKPOINT
            kept = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
            raise DataError(
                f"the loss became {values['loss']} at step {report.step}, on {', '.join(report.names)}; {kept}; "
                "look at these files, or lower the learning rate"
            )
        for name, value in values.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
        self.progress.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)

    def _rate(self, step: int) -> float:
        optimisation = self.optimisation
        progress = step / self.total_steps
        return optimisation.learning_rate * relative_rate(progress, optimisation.warmup, optimisation.poly_power)

    def _is_due(self) -> bool:
        now = time.monotonic()
        due = now - self._saved > self.options.checkpoint_every_s or self._time_is_up()
        # Saving settles the last loss with all processes, so they have to do it in the same step.
        return self.processes.agree(due) if self.processes.world_size == 1 or self.step % 20 == 0 else False

    def _time_is_up(self) -> bool:
        limit_s = self.options.time_limit_s
        return limit_s > 0 and time.monotonic() - self._started > limit_s

    def _check_time(self) -> None:
        if self.processes.agree(self._time_is_up()):
            raise TimeUp

    def _save(self) -> None:
        self._settle()
        if self.processes.is_main:
            state = {
                "fingerprint": json.dumps(self.fingerprint), "step": self.step, "epoch": self.epoch,
                "best_score": self.best_score, "totals": self._totals, "network": self.network.state_dict(),
                "averaged": self.averaged.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.precision.state_dict(),
            }  # fmt: skip
            save_checkpoint(self.run_dir / CHECKPOINT, state)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        path = self.run_dir / CHECKPOINT
        state = load_checkpoint(path)
        check_fingerprint(path, str(state.get("fingerprint", "{}")), self.fingerprint)
        try:
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.precision.load_state_dict(state["scaler"])
            self.step, self.best_score, self._totals = state["step"], state["best_score"], state["totals"]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: is no whole checkpoint of this run ({type(error).__name__}: {str(error).splitlines()[0]}); "
                "pass another run folder to start anew"
            ) from error


class _Report:
    """What a step was judged by, on its way to the CPU.

    Args:
        step: number of it.
        names: file names of the images in it.
        values: scalars by name, on the device.
        processes: those whose mean is meant.
    """

    def __init__(self, step: int, names: list[str], values: dict[str, Tensor], processes: Processes) -> None:
        self.step, self.names = step, names
        self._keys = list(values)
        means = processes.mean(torch.stack([value.detach().float() for value in values.values()]))
        # Copied behind the step's own work, and waited for without waiting for what comes after it.
        self._values = means.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if means.is_cuda else None
        if self._copied:
            self._copied.record()

    def read(self) -> dict[str, float]:
        if self._copied:
            self._copied.synchronize()
        return dict(zip(self._keys, self._values.tolist(), strict=True))


def _seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % 2**63


def seeded_generator(seed: int, index: int) -> torch.Generator:
    """Random numbers that depend on `seed` and `index` alone; epochs count up from 0, steps down from -1."""
    return torch.Generator().manual_seed(_seed(seed, index % 2**31))
