"""The training loop: ClustViT's joint loss, resumable at any epoch with the weights of an uninterrupted run."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.errors import DataError
from clustvit_ros.modeling.architectures import build_network
from clustvit_ros.modeling.segmenter import Segmenter
from clustvit_ros.modeling.vit import grid_size_of
from clustvit_ros.training.dataset import LabelledImages, Sample
from clustvit_ros.training.losses import cluster_loss, frequency_weights, segmentation_loss
from clustvit_ros.training.pseudo_clusters import pseudo_clusters
from clustvit_ros.training.recipe import Recipe

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


class Trainer:
    """Trains the network of a recipe.

    Args:
        recipe: what to train, and how.
        data: training images; they are held in memory.
        run_dir: checkpoint and log go here; an existing checkpoint is continued.
        device: where to train.

    Raises:
        DataError: the checkpoint in `run_dir` was made with another recipe.
    """

    def __init__(self, recipe: Recipe, data: LabelledImages, run_dir: Path, device: torch.device) -> None:
        self.recipe, self.run_dir, self.device = recipe, Path(run_dir), device
        schedule = recipe.schedule
        torch.manual_seed(schedule.seed)
        config = recipe.model_config()
        self.network = build_network(config.network, len(config.classes)).to(device)
        self.averaged = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.crops = _Crops([data[i] for i in range(len(data))], recipe)
        self.class_weights = None
        if schedule.class_weighting:
            self.class_weights = frequency_weights(self.crops.pixel_counts(len(config.classes))).to(device)
        self.steps_per_epoch = max(len(self.crops) // schedule.batch_size, 1)
        self.optimizer = torch.optim.AdamW(_decay_groups(self.network, schedule.weight_decay), schedule.learning_rate)
        self.epoch = 0
        self.best_score = -math.inf
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if (self.run_dir / CHECKPOINT).exists():
            self._resume()

    def train(self, validate: Callable[[Segmenter], dict[str, Any]], save_best: Callable[[Segmenter], None]) -> None:
        """Train to the end of the recipe.

        Args:
            validate: scores the averaged network; its result must hold `miou` and is logged.
            save_best: called with the averaged network whenever `miou` is the best so far.
        """
        schedule = self.recipe.schedule
        for epoch in range(self.epoch, schedule.epochs):
            started = time.monotonic()
            record = {"epoch": epoch + 1, **self._train_epoch(epoch)}
            record["train_s"] = round(time.monotonic() - started, 1)
            if (epoch + 1) % schedule.validate_every == 0 or epoch + 1 == schedule.epochs:
                scores = validate(self.averaged)
                record.update(scores)
                if scores["miou"] > self.best_score:
                    self.best_score = scores["miou"]
                    save_best(self.averaged)
                tqdm.write(
                    f"epoch {epoch + 1}/{schedule.epochs}: loss {record['loss']:.3f}, mIoU {scores['miou']:.2f} "
                    f"(best {self.best_score:.2f})"
                )
            self.epoch = epoch + 1
            self._save()
            with (self.run_dir / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        schedule = self.recipe.schedule
        self.crops.epoch = epoch
        order = torch.randperm(len(self.crops), generator=_generator(schedule.seed, epoch))
        loader = DataLoader(
            self.crops,
            batch_size=schedule.batch_size,
            sampler=order.tolist(),
            drop_last=len(order) >= schedule.batch_size,
        )
        self.network.train()
        totals = {"loss": 0.0, "segmentation_loss": 0.0, "cluster_loss": 0.0, "cluster_accuracy": 0.0}
        progress = tqdm(loader, desc=f"epoch {epoch + 1}/{schedule.epochs}", leave=False, mininterval=1.0)
        for index, (images, labels) in enumerate(progress):
            step = epoch * self.steps_per_epoch + index
            for name, value in self._train_step(step, images.to(self.device), labels.to(self.device)).items():
                totals[name] += value
            progress.set_postfix(loss=f"{totals['loss'] / (index + 1):.3f}")
        return {name: value / len(loader) for name, value in totals.items()}

    def _train_step(self, step: int, images: Tensor, labels: Tensor) -> dict[str, float]:
        schedule = self.recipe.schedule
        progress = step / (schedule.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate * _rate(progress, schedule.warmup, schedule.poly_power)
        mean, std = (
            torch.tensor(v, device=images.device).view(1, 3, 1, 1)
            for v in (self.recipe.input.mean, self.recipe.input.std)
        )
        output = self.network((images.float() - mean) / std, token_capacity=self._capacity(step, progress))
        losses = {"segmentation_loss": segmentation_loss(output.logits, labels, self.class_weights)}
        accuracy = 0.0
        if output.cluster_logits is not None:
            patch_size = self.network.backbone.patch_size
            targets = pseudo_clusters(labels, patch_size, output.cluster_logits.shape[2] - 1)
            targets = targets.flatten(1)
            if output.cluster_positions is not None:
                targets = targets.gather(1, output.cluster_positions)
            losses["cluster_loss"] = cluster_loss(output.cluster_logits, targets)
            accuracy = float((output.cluster_logits.detach().argmax(2) == targets).float().mean())
        loss = torch.stack(list(losses.values())).sum()
        report = {
            "loss": loss.item(),
            **{name: value.item() for name, value in losses.items()},
            "cluster_accuracy": accuracy,
        }
        if not math.isfinite(report["loss"]):
            raise DataError(
                f"the loss became {report['loss']} at step {step}; lower the learning rate or check the labels"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), schedule.clip_norm)
        self.optimizer.step()
        self._average(step)
        return report

    def _capacity(self, step: int, progress: float) -> int:
        """Tokens kept in a step: all at first, then a drawn share of them."""
        schedule = self.recipe.schedule
        rows, columns = grid_size_of(self.recipe.augmentation.crop_size, self.network.backbone.patch_size)
        if progress < schedule.merge_after:
            return rows * columns
        pick = torch.randint(len(schedule.kept_fractions), (), generator=_generator(schedule.seed, -1 - step))
        return max(round(rows * columns * schedule.kept_fractions[int(pick)]), 1)

    @torch.no_grad()
    def _average(self, step: int) -> None:
        # The average follows closely at first, or it would stay near the initial weights for hundreds of steps.
        decay = min(self.recipe.schedule.ema_decay, (1 + step) / (10 + step))
        for averaged, current in zip(
            self.averaged.state_dict().values(), self.network.state_dict().values(), strict=True
        ):
            if averaged.is_floating_point():
                averaged.lerp_(current, 1.0 - decay)
            else:
                averaged.copy_(current)

    def _save(self) -> None:
        state = {
            "recipe": repr(self.recipe),
            "epoch": self.epoch,
            "best_score": self.best_score,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        partial = self.run_dir / (CHECKPOINT + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.run_dir / CHECKPOINT)

    def _resume(self) -> None:
        path = self.run_dir / CHECKPOINT
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["recipe"] != repr(self.recipe):
            raise DataError(
                f"{path} was made with another recipe; pass an empty run folder, or the recipe it was made with"
            )
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.epoch, self.best_score = state["epoch"], state["best_score"]


class _Crops(Dataset):
    """Augmented crops; which crop an index gives depends on seed, epoch and index alone."""

    def __init__(self, samples: list[Sample], recipe: Recipe) -> None:
        self._samples, self._recipe = samples, recipe
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self._recipe.schedule.seed, self.epoch, index))
        image, labels = self._recipe.augmentation(self._samples[index], self._recipe.input.size, rng)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(labels).long()

    def pixel_counts(self, num_classes: int) -> Tensor:
        """Labelled pixels per class over all images: (Q,)."""
        counts = sum(np.bincount(sample.labels.ravel(), minlength=IGNORE_INDEX + 1) for sample in self._samples)
        return torch.from_numpy(np.asarray(counts)[:num_classes])


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + index % 2**31)


def _rate(progress: float, warmup: float, poly_power: float) -> float:
    """Learning rate relative to its peak at `progress` (0..1) of all steps."""
    if progress < warmup:
        return (progress + 1e-4) / warmup
    return (1.0 - (progress - warmup) / (1.0 - warmup)) ** poly_power


def _decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only."""
    embeddings = ("cls_token", "pos_embed", "class_embed")
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (plain if parameter.ndim < 2 or name.endswith(embeddings) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
