# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Training of a segmentation network: ClustViT's joint loss over random merge settings, distilled from itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clustvit_ros.config import to_mapping
from clustvit_ros.engine.ladder import scaled_size
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.architectures import build_network
from clustvit_ros.networks.clustering import Clusterer, Regenerator
from clustvit_ros.networks.cts import PolicyNetwork
from clustvit_ros.networks.segmenter import Backbone, Segmenter
from clustvit_ros.networks.vit import grid_size_of
from clustvit_ros.training.crops import COUNTED_IMAGES, DEFAULT_CACHE_BYTES, Batch, Crops, Place, check_counts
from clustvit_ros.training.dataset import LabelledImages, joined
from clustvit_ros.training.distributed import Processes
from clustvit_ros.training.initialisation import InitReport, known_classes, load_init, load_teacher
from clustvit_ros.training.loop import LOG, Losses, RunOptions, TrainingLoop, seeded_generator
from clustvit_ros.training.losses import (
    JointClasses,
    cluster_loss,
    distillation_loss,
    frequency_weights,
    lovasz_softmax,
    mean_prediction,
    pseudo_clusters,
    segmentation_loss,
    shareable,
)
from clustvit_ros.training.recipe import Recipe, Schedule
from clustvit_ros.training.run_folder import CHECKPOINT, hash_names

__all__ = ["CHECKPOINT", "LOG", "Trainer"]

# Every second label in both directions is judged, at a place drawn for each step: the losses, which cost as much as the
# network where that computes in bfloat16, take a quarter of the time.
_LABEL_STRIDE = 2


class Trainer(TrainingLoop[Segmenter]):
    """Trains the network of a recipe.

    Args:
        recipe: what to train, and how; its classes are known.
        data: training images.
        run_dir: checkpoint and log go here; an existing checkpoint is continued.
        device: device that trains.
        processes: those that train together.
        options: how the run is carried out.
        cache_bytes: images are held on the device if all of them fit into this.
        further: training images of a joint training's other data sets, in the recipe's order.

    Raises:
        DataError: the checkpoint in `run_dir` was made with another recipe, class list or images.
        ModelError: the weights of `init` do not fit.
        ConfigError: only merging is to be trained, and the network does not merge.
        DataError: a class never occurs in the training labels.
    """

    def __init__(
        self, recipe: Recipe, data: LabelledImages, run_dir: Path, device: torch.device,
        processes: Processes = Processes(), options: RunOptions = RunOptions(), cache_bytes: int = DEFAULT_CACHE_BYTES,
        further: Sequence[LabelledImages] = (),
    ) -> None:  # fmt: skip
        self.recipe, self.schedule = recipe, recipe.schedule
        torch.manual_seed(self.schedule.seed)
        self.config = recipe.model_config()
        crop, batch = recipe.augmentation.crop_size, self.schedule.batch_size
        if batch * math.prod(grid_size_of(crop, self.config.network.patch_size)) < 2 or min(crop) < _LABEL_STRIDE:
            raise ConfigError(
                f"recipe {recipe.name}: crop_size is {list(crop)} and batch_size {batch}, expected two patches of "
                f"{self.config.network.patch_size} px in a batch, and sides of at least {_LABEL_STRIDE} px"
            )
        names, others = self.config.classes.names, recipe.sources[1 : 1 + len(further)]
        self._joint: JointClasses | None = None
        if further:
            meanings = [None, *(source.meanings(names) for source in others)]
            self._joint = JointClasses([len(names), *(part.num_classes for part in further)], meanings)
        network = build_network(self.config.network, self._joint.num_logits if self._joint else len(names))
        self.init_report: InitReport | None = None
        continued = (Path(run_dir) / CHECKPOINT).exists()  # what it started from may be gone by now
        if recipe.init and not continued:
            self.init_report = load_init(network, recipe.init, names)
        self._teacher: Segmenter | None = None
        if self.schedule.teacher == "init":
            # Loaded for itself: a run that is continued has other weights by now.
            self._teacher = build_network(self.config.network, len(names))
            unknown = load_init(self._teacher, recipe.init, names).new_classes
            if unknown:
                raise ConfigError(
                    f"recipe {recipe.name}: teacher is 'init', which knows no {', '.join(unknown)}; expected 'self'"
                )
            self._teacher = self._teacher.requires_grad_(False).eval().to(device)
        self._teachers = [load_teacher(name, recipe).to(device) for name in self.schedule.teachers]
        self._merging: list[nn.Module] = []
        if self.schedule.trains == "merging":
            self._merging = _freeze_all_but_merging(network, recipe.name, self.init_report)
        images = joined([data, *further]) if further else data
        self._counts = _images_per_epoch(recipe, [len(part) for part in (data, *further)])
        self.crops = Crops(
            images.__getitem__, len(images), recipe.augmentation, recipe.input.size, self.schedule.seed, device,
            cache_bytes, len(data),
        )  # fmt: skip
        self._class_weights: Tensor | None = None
        counts = self.crops.pixel_counts(images.num_classes)
        if len(images) <= COUNTED_IMAGES:  # else a rare class may be in none of those that were counted
            own_counts, *further_counts = counts.split([part.num_classes for part in (data, *further)])
            check_counts(own_counts, names, data.where, names if continued else known_classes(recipe.init))
            for source, part, of_part in zip(others, further, further_counts, strict=True):
                if source.means is None:
                    check_counts(of_part, [entry.name for entry in source.classes], part.where)
        if self.schedule.class_weighting:
            counts = self._joint.pixel_counts(counts) if self._joint else counts
            self._class_weights = frequency_weights(counts).to(device)
        fingerprint = {**to_mapping(recipe), "images": hash_names(pair.image for pair in images.pairs)}
        super().__init__(
            network, self.schedule, sum(drawn for _, drawn in self._counts), fingerprint, run_dir, device, processes,
            options,
        )  # fmt: skip
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (recipe.input.mean, recipe.input.std)
        )

    def train(
        self, validate: Callable[[Segmenter], dict[str, Any]] | None, save_best: Callable[[Segmenter], None]
    ) -> None:
        """Train to the end of the recipe.

        Args:
            validate: scores the averaged network; its result must hold `miou` and is logged. None trains without
                validation, and the last weights are the best.
            save_best: called with the averaged network whenever `miou` is the best so far.

        Raises:
            TimeUp: the time limit was reached first; the same call continues.
            DataError: a loss was not finite, or something could not be written.
        """

        def end_of_epoch(epoch: int, record: dict[str, Any]) -> None:
            last = epoch == self.schedule.epochs
            if validate is None:
                if last:
                    save_best(self._own_network())
                return
            if epoch % self.schedule.validate_every and not last:
                return
            own = self._own_network()
            scores = validate(own)
            record.update(scores)
            if scores["miou"] > self.best_score:
                self.best_score = scores["miou"]
                save_best(own)
            tqdm.write(
                f"epoch {epoch}/{self.schedule.epochs}: loss {record['loss']:.3f}, mIoU {scores['miou']:.2f} "
                f"(best {self.best_score:.2f})"
            )

        self.run(end_of_epoch)

    def _own_network(self) -> Segmenter:
        """The averaged network, as a model of its own data's classes alone."""
        if self._joint is None:
            return self.averaged
        own = self._joint.own
        network = copy.deepcopy(self.averaged)
        classify = cast(nn.Linear | nn.Conv2d, network.head.classify)
        for name, values in list(classify.named_parameters()):
            setattr(classify, name, nn.Parameter(values[:own].clone(), requires_grad=False))
        return network

    def _order(self, generator: torch.Generator) -> list[int]:
        """All of the model's own images, and as many of the others as their weights say."""
        order: list[int] = []
        first = 0
        for images, drawn in self._counts:
            again = -(-drawn // images)
            places = torch.cat([torch.randperm(images, generator=generator) for _ in range(again)])[:drawn]
            order += (places + first).tolist()
            first += images
        if len(self._counts) == 1:
            return order
        return [order[place] for place in torch.randperm(len(order), generator=generator).tolist()]

    def _to_training_mode(self) -> None:
        # What is frozen has to compute what it will compute in use: no dropped paths, no batch statistics.
        self.network.train(self.schedule.trains == "all")
        for part in self._merging:
            part.train()
        if self._teacher is not None:
            # Statistics over mixed input sizes would be those of no size, and the full one's are known.
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def _step_module(self) -> nn.Module:
        patch_size = self.config.network.patch_size
        return _TrainingStep(
            self.network, self.schedule, patch_size, self._class_weights, self.processes, self._teacher, self._joint,
            self._teachers,
        )  # fmt: skip

    def _batches(self, epoch: int, batches: list[list[Place]]) -> Iterator[Batch]:
        return self.crops.batches(epoch, [self.processes.share(batch) for batch in batches])

    def _inputs(self, step: int, batch: Batch) -> tuple[Any, ...]:
        images = (batch.images - self._mean) / self._std
        generator = seeded_generator(self.schedule.seed, -1 - step)
        setting = self._setting(step, generator)
        row, column = torch.randint(_LABEL_STRIDE, (2,), generator=generator).tolist()
        judged = batch.labels[:, row::_LABEL_STRIDE, column::_LABEL_STRIDE]
        return images, batch.labels, judged, *setting

    def _setting(self, step: int, generator: torch.Generator) -> tuple[tuple[int, int], float, int | None]:
        """Input size, merge threshold and token capacity of a step: all tokens at first, then a drawn setting."""
        schedule, patch_size = self.schedule, self.config.network.patch_size
        count = len(schedule.kept_fractions) + len(schedule.merge_thresholds)
        pick = int(torch.randint(count, (), generator=generator))
        scale = schedule.input_scales[int(torch.randint(len(schedule.input_scales), (), generator=generator))]
        size = scaled_size(self.recipe.augmentation.crop_size, scale, patch_size)
        rows, columns = grid_size_of(size, patch_size)
        if step < schedule.merge_after * self.total_steps:
            return size, 1.0, rows * columns
        if pick < len(schedule.kept_fractions):
            return size, 1.0, max(round(rows * columns * schedule.kept_fractions[pick]), 1)
        return size, schedule.merge_thresholds[pick - len(schedule.kept_fractions)], None


def _freeze_all_but_merging(network: Segmenter, name: str, init: InitReport | None) -> list[nn.Module]:
    """Leave gradients to what merging learns with: Clusterers and Regenerators, or a policy network.

    Raises:
        ConfigError: there is none, or something else starts random, and would stay so.
    """
    network.requires_grad_(False)
    kinds = (Clusterer, Regenerator, PolicyNetwork)
    parts = {name: module for name, module in network.named_modules() if isinstance(module, kinds)}
    if not parts:
        raise ConfigError(
            f"recipe {name}: trains is 'merging', and its network has no Clusterer; expected a ClustViT with its own "
            "way to merge, or merging 'cts'; stvit's blocks learn it with trains: all, others need no training"
        )
    for part in parts.values():
        part.requires_grad_(True)
    random = [*init.missing, *init.mismatched, *init.new_classes] if init else []
    if stays := [name for name in random if not name.startswith(tuple(f"{part}." for part in parts))]:
        raise ConfigError(
            f"recipe {name}: trains is 'merging', but {', '.join(stays[:5])} would start random and stay so; expected "
            "weights (--init) of the whole network, its head and classes included, or trains: all"
        )
    return list(parts.values())


class _TrainingStep(nn.Module):
    """Network and losses in one forward pass, which is what DistributedDataParallel can follow."""

    def __init__(
        self, network: Segmenter, schedule: Schedule, patch_size: int, class_weights: Tensor | None,
        processes: Processes, teacher: Segmenter | None, joint: JointClasses | None,
        teachers: Sequence[Segmenter] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self._teachers = tuple(teachers)
        self._joint = joint
        self.network = network
        self._teacher = [teacher] if teacher is not None else []  # in a list: no part of what is trained
        self._schedule, self._patch_size, self._processes = schedule, patch_size, processes
        # Not a buffer: the weights of every process are the same and need no broadcast.
        self._class_weights = class_weights

    def forward(
        self, images: Tensor, labels: Tensor, judged: Tensor, input_size: tuple[int, int], merge_threshold: float,
        token_capacity: int | None,
    ) -> Losses:  # fmt: skip
        weight = self._schedule.distillation_weight
        backbone = cast(Backbone, self.network.backbone)
        full_size = (images.shape[2], images.shape[3])
        # What no setting but the size changes, stem and first blocks, is computed once for both passes.
        state = backbone.encode(resized(images, input_size))
        merged = self.network.decode(backbone.finish(state, merge_threshold, token_capacity))
        merged = merged._replace(logits=self._own_logits(merged.logits, labels))
        losses = self._supervise(merged.logits.float(), judged)
        measures: dict[str, Tensor] = {}
        # Heads may answer on a finer grid than the patches'.
        num_tokens = 0 if merged.cluster_ids is None else merged.cluster_ids.shape[1]
        merges = merged.cluster_ids is not None and token_capacity != num_tokens
        if self._teacher:
            with torch.no_grad():
                full_logits = self._full(self._teacher[0], images)
            losses["distillation_loss"] = weight * self._divergence(merged.logits, full_logits)
        elif weight > 0 and (merges or input_size != full_size):
            # Both passes learn from the labels, the cheaper one from the other as well (as slimmable networks are
            # trained; Yu, Huang, arXiv 1903.05134), so that the full network is as good as a plain ViT.
            # Where merging alone is trained, the full pass has nothing to learn.
            fixed = self._schedule.trains == "merging"
            with torch.set_grad_enabled(not fixed):
                full_logits = self._full(self.network, images, state if input_size == full_size else None)
            full_logits = self._own_logits(full_logits, labels)
            if not fixed:
                full_losses = self._supervise(full_logits.float(), judged)
                losses = {name: (losses[name] + full_losses[name]) / 2 for name in losses}
            losses["distillation_loss"] = weight * self._divergence(merged.logits, full_logits)
        else:
            measures["distillation_loss"] = losses["segmentation_loss"].new_zeros(())
        if self._teachers:
            losses["teacher_loss"] = weight * self._from_teachers(merged.logits, images, labels)
        if merged.cluster_logits is not None:
            cluster_logits = merged.cluster_logits.float()
            small = labels
            if input_size != full_size:
                small = F.interpolate(labels[:, None].float(), input_size, mode="nearest-exact")[:, 0].long()
            if backbone.merge_unit == 1:
                targets = pseudo_clusters(small, self._patch_size, cluster_logits.shape[2] - 1).flatten(1)
            else:
                targets = shareable(small, self._patch_size * backbone.merge_unit).flatten(1)
            if merged.cluster_positions is not None:
                targets = targets.gather(1, merged.cluster_positions)
            losses["cluster_loss"] = cluster_loss(cluster_logits, targets)
            right = cluster_logits.detach().argmax(2) == targets
            measures["cluster_accuracy"] = right.float().mean()
        return Losses(losses, measures)

    def _full(self, network: Segmenter, images: Tensor, state: Any = None) -> Tensor:
        """Logits of the unmerged pass over images at full size, whose `encode` may be done already."""
        backbone = cast(Backbone, network.backbone)
        rows, columns = grid_size_of((images.shape[2], images.shape[3]), backbone.patch_size)
        state = backbone.encode(images) if state is None else state
        return network.decode(backbone.finish(state, 1.0, rows * columns)).logits

    def _own_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits with those of other data sets' classes out of the game."""
        return self._joint.own_logits(logits, labels) if self._joint else logits

    def _from_teachers(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Divergence from what the further models say of the model's own images; they know no others."""
        known = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        own = logits.shape[1]
        if self._joint:
            own, known = self._joint.own, ~self._joint.foreign(labels)[:, 0, 0, 0]
        if not bool(known.any()):
            return logits.sum() * 0.0
        with torch.no_grad():
            said = mean_prediction([self._full(teacher, images[known]) for teacher in self._teachers])
        return self._divergence(logits[known, :own], said)

    def _divergence(self, logits: Tensor, full_logits: Tensor) -> Tensor:
        size = (full_logits.shape[2], full_logits.shape[3])
        temperature = self._schedule.distillation_temperature
        return distillation_loss(resized(logits.float(), size), full_logits.float(), temperature)

    def _supervise(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        schedule = self._schedule
        if self._joint:
            logits, labels = self._joint.judged(logits, labels)
        losses = {
            "segmentation_loss": segmentation_loss(
                logits, labels, self._class_weights, schedule.ohem_share, self._processes.mean
            )
        }
        if schedule.lovasz_weight > 0:
            losses["lovasz_loss"] = schedule.lovasz_weight * lovasz_softmax(logits, labels)
        return losses


def _images_per_epoch(recipe: Recipe, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(images, images drawn in an epoch) of each data set: all of the first, of the others as their weights say."""
    weights = [source.weight for source in recipe.sources[: len(sizes)]] or [1.0]
    return [
        (size, max(round(sizes[0] * weight / weights[0]), 1)) for size, weight in zip(sizes, weights, strict=True)
    ]


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, H, W) at another size, (B, C, *size); shrinking averages, as an engine's input does."""
    if maps.shape[2:] == size:
        return maps
    shrinks = size[0] < maps.shape[2]
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
