# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Losses of ClustViT's joint training: segmentation, the Clusterer's own (arXiv 2510.01948), and distillation.

Targets of the Clusterer, made from segmentation labels (ClustViT, arXiv 2510.01948).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clustvit_ros.classes import IGNORE_INDEX

CLUSTER_LOSS_WEIGHT = 0.1
_NEVER = -1e4  # logit of a class that an image cannot have; finite, for differences of such logits are taken


def cluster_loss(cluster_logits: Tensor, targets: Tensor, weight: float = CLUSTER_LOSS_WEIGHT) -> Tensor:
    """Cross-entropy of the Clusterer against pseudo-clusters, "keep" included, mean over all tokens.

    The only gradient the Clusterer gets, since the arg-max of the merge passes none.

    Args:
        cluster_logits: (B, N, k+1).
        targets: (B, h, w) int64 of `pseudo_clusters`, h * w == N, or (B, N).
    """
    return weight * F.cross_entropy(cluster_logits.transpose(1, 2), targets.flatten(1))


def segmentation_loss(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, hard_share: float = 1.0,
    average: Callable[[Tensor], Tensor] = lambda total_weight: total_weight,
) -> Tensor:  # fmt: skip
    """Cross-entropy at label resolution, void ignored.

    Args:
        logits: (B, Q, h, w), resized bilinearly to the labels.
        labels: (B, H, W) int64, 255 = void. A batch without any labelled pixel gives 0.
        class_weights: (Q,), or None.
        hard_share: share of each image's labelled pixels that count, those with the highest loss (online hard
            example mining; Wu, Shen, van den Hengel, arXiv 1605.06885).
        average: turns the batch's total weight into its mean over all processes of a distributed training, so that
            their mean loss is the loss of the whole batch.
    """
    logits = _at(logits, labels)
    losses = F.cross_entropy(logits, labels, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="none")
    valid = labels != IGNORE_INDEX
    if class_weights is None:
        weights = valid.to(losses.dtype)
    else:
        weights = class_weights[labels.where(valid, 0)].where(valid, 0.0)
    if hard_share < 1.0:
        losses, weights = _hardest(losses.flatten(1), weights.flatten(1), valid.flatten(1), hard_share)
    return losses.sum() / average(weights.sum()).clamp(min=1e-6)


def _hardest(losses: Tensor, weights: Tensor, valid: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The hardest pixels of each image, by their unweighted loss: all (B, P) -> (B, K), zero where fewer count."""
    counts = (valid.sum(dim=1) * share).ceil()
    hardness = losses.detach() / weights.clamp(min=1e-6)
    index = hardness.where(valid, -1.0).topk(max(round(losses.shape[1] * share), 1), dim=1).indices
    counted = torch.arange(index.shape[1], device=index.device) < counts[:, None]
    return losses.gather(1, index).where(counted, 0.0), weights.gather(1, index).where(counted, 0.0)


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Lovász-Softmax loss: the convex extension of 1 - IoU, mean over each image's classes, then over images.

    Berman, Triki, Blaschko, "The Lovász-Softmax loss", arXiv 1705.08790, in its per-image form.

    Args:
        logits: (B, Q, h, w), resized bilinearly to the labels.
        labels: (B, H, W) int64, 255 = void. An image without any labelled pixel gives 0.
    """
    probabilities = _at(logits, labels).softmax(dim=1).flatten(2)  # B Q P
    labels = labels.flatten(1)
    ids = torch.arange(probabilities.shape[1], device=labels.device)
    truth = labels[:, None] == ids[:, None]
    present = truth.any(dim=2)  # B Q
    # Rows that count, one after another: most classes are in few images, and sorting is what costs. How many there are
    # is known only once they are counted; a GPU waits for that, once a step.
    images, classes = present.nonzero(as_tuple=True)
    valid = (labels != IGNORE_INDEX)[images]
    truth = truth[images, classes]  # R P
    # Void has no error and is therefore sorted behind everything that counts.
    errors, order = ((truth.to(probabilities.dtype) - probabilities[images, classes]).abs() * valid).sort(
        dim=1, descending=True
    )
    found = truth.gather(1, order).cumsum(dim=1, dtype=errors.dtype)
    total = found[:, -1:]
    extra = torch.arange(1, errors.shape[1] + 1, device=errors.device) - found
    jaccard = 1.0 - (total - found) / (total + extra)
    steps = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], dim=1)
    per_row = (errors * steps).sum(dim=1) / present.sum(dim=1).to(errors.dtype)[images]
    return per_row.sum() / len(labels)


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits on the grid of labels: (B, Q, h, w), (B, H, W) -> (B, Q, H, W)."""
    size = (labels.shape[1], labels.shape[2])
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of class distributions, mean over patches (Hinton et al., arXiv 1503.02531).

    Args:
        student: (B, Q, h, w) logits of the cheaper pass.
        teacher: (B, Q, h, w) logits of the full network; no gradient flows into it.
        temperature: both are divided by it, the loss multiplied by its square.
    """
    log_student = (student / temperature).log_softmax(dim=1)
    log_teacher = (teacher.detach() / temperature).log_softmax(dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * divergence.mean()


class JointClasses:
    """Labels and logits of a joint training.

    Label ids of the data sets stand behind each other. So do the logits, the model's own first, but a data set whose
    labels mean classes of the model has none: where a label may mean several, any of them is right (learning from
    partial labels; Cour, Sapp, Taskar, JMLR 2011).

    Args:
        counts: classes of each data set, the model's own first.
        meanings: for each data set the model's classes that each of its own may be, none for void; or None where its
            classes are its own.
    """

    def __init__(self, counts: Sequence[int], meanings: Sequence[Sequence[Sequence[int]] | None]) -> None:
        self.counts = tuple(counts)
        self.own = self.counts[0]
        has_logits = [meaning is None for meaning in meanings]
        self.num_logits = sum(count for count, has in zip(counts, has_logits, strict=True) if has)
        self._ends = torch.tensor(self.counts).cumsum(0)
        self._allowed = torch.zeros(len(counts) + 1, self.num_logits, dtype=torch.bool)  # a void image has no home
        self._may_be = torch.zeros(int(self._ends[-1]), self.num_logits, dtype=torch.bool)
        self._translates = not all(has_logits)
        label, logit = 0, 0
        for home, (count, meaning) in enumerate(zip(counts, meanings, strict=True)):
            if meaning is None:
                self._allowed[home, logit : logit + count] = True
                self._may_be[label : label + count, logit : logit + count] = torch.eye(count, dtype=torch.bool)
                logit += count
            else:
                self._allowed[home, : self.own] = True
                for row, may_be in enumerate(meaning, label):
                    self._may_be[row, list(may_be)] = True
            label += count

    def foreign(self, labels: Tensor) -> Tensor:
        """Which logits say nothing of an image: (B, H, W) label ids, 255 = void -> (B, Q, 1, 1) bool."""
        home = torch.bucketize(labels.flatten(1).amin(1), self._ends.to(labels.device), right=True)
        return ~self._allowed.to(labels.device)[home][:, :, None, None]

    def own_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits with those that say nothing of an image out of the game: (B, Q, h, w), (B, H, W) -> (B, Q, h, w)."""
        return logits.float().masked_fill(self.foreign(labels), _NEVER)

    def judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and what is right, in the model's own terms, for any loss.

        Where a label may mean several classes, they count as one, the likeliest of them: its logit becomes that of all
        together, which makes cross-entropy the negative log of their summed probability.

        Args:
            logits: (B, Q, h, w), those of other data sets' classes out of the game.
            labels: (B, H, W) label ids, 255 = void.

        Returns:
            (B, Q, H, W) logits, and the places of the right ones, (B, H, W) int64, 255 = void.
        """
        logits = _at(logits, labels)
        if not self._translates:
            return logits, labels
        valid = labels != IGNORE_INDEX
        may_be = self._may_be.to(labels.device)[labels.where(valid, 0)].permute(0, 3, 1, 2)
        right = logits.detach().masked_fill(~may_be, -torch.inf).argmax(dim=1, keepdim=True)
        known = valid[:, None] & may_be.any(dim=1, keepdim=True)
        together = logits.masked_fill(~may_be, _NEVER).logsumexp(dim=1, keepdim=True)
        alone = logits.masked_fill(may_be, _NEVER).scatter(1, right, together)
        return alone.where(known, logits), right.where(known, IGNORE_INDEX)[:, 0]

    def pixel_counts(self, counts: Tensor) -> Tensor:
        """Pixels for which each logit is known to be right, of those of each label id: (ids,) -> (Q,)."""
        known = self._may_be & (self._may_be.sum(dim=1, keepdim=True) == 1)
        return (known * counts[:, None]).sum(dim=0)


def mean_prediction(logits: Sequence[Tensor]) -> Tensor:
    """Log of the mean of an ensemble's probabilities: (B, Q, h_i, w_i) logits of each -> (B, Q, h_0, w_0)."""
    size = (logits[0].shape[2], logits[0].shape[3])
    probabilities = [
        F.interpolate(each.float(), size=size, mode="bilinear", align_corners=False).softmax(dim=1) for each in logits
    ]
    return torch.stack(probabilities).mean(dim=0).clamp(min=1e-6).log()


def frequency_weights(pixel_counts: Tensor, bound: float = 10.0) -> Tensor:
    """Class weights that grow as frequency falls: 1 / ln(1.02 + share), mean 1 (ENet, arXiv 1606.02147).

    Args:
        pixel_counts: (Q,) labelled pixels per class in the training data.
        bound: largest ratio between two weights.
    """
    share = pixel_counts.double() / pixel_counts.sum().clamp(min=1)
    weights = 1.0 / torch.log(1.02 + share)
    weights = weights.clamp(max=float(weights.min()) * bound)
    return (weights / weights.mean()).float()


def shareable(labels: Tensor, side_px: int) -> Tensor:
    """1 for squares that show one class and nothing else: (B, H, W) int64 -> (B, H // side, W // side) int64."""
    squares = labels.unfold(1, side_px, side_px).unfold(2, side_px, side_px)
    lowest, highest = squares.amin(dim=(3, 4)), squares.amax(dim=(3, 4))
    return ((lowest == highest) & (lowest != IGNORE_INDEX)).long()


def pseudo_clusters(labels: Tensor, patch_size: int, num_clusters: int) -> Tensor:
    """Which patches ought to be merged: homogeneous ones of the k classes that cover most such patches of the image.

    Args:
        labels: (B, H, W) int64 class ids, 255 = void; H and W are padded with void to whole patches.
        patch_size: side of a patch in pixels.
        num_clusters: k.

    Returns:
        (B, h, w) int64. 1..k are ranks by descending count within the image (the lower class id first among equals);
        0 is everything else: patches with several values, void patches, and classes of lower rank.
    """
    pad_bottom, pad_right = -labels.shape[1] % patch_size, -labels.shape[2] % patch_size
    labels = torch.nn.functional.pad(labels, (0, pad_right, 0, pad_bottom), value=IGNORE_INDEX)
    patches = labels.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)  # B h w p p
    lowest, highest = patches.amin(dim=(3, 4)), patches.amax(dim=(3, 4))
    homogeneous = (lowest == highest) & (lowest != IGNORE_INDEX)
    classes = torch.where(homogeneous, lowest, IGNORE_INDEX).flatten(1)  # B N

    num_values = IGNORE_INDEX + 1
    counts = torch.zeros(labels.shape[0], num_values, dtype=torch.long, device=labels.device)
    counts.scatter_add_(1, classes, torch.ones_like(classes))
    counts[:, IGNORE_INDEX] = 0
    ranked = counts.argsort(dim=1, descending=True, stable=True)[:, :num_clusters]
    rank_of_class = torch.zeros_like(counts)
    ranks = torch.arange(1, ranked.shape[1] + 1, device=labels.device).expand_as(ranked)
    rank_of_class.scatter_(1, ranked, torch.where(counts.gather(1, ranked) > 0, ranks, 0))
    rank_of_class[:, IGNORE_INDEX] = 0
    return rank_of_class.gather(1, classes).unflatten(1, lowest.shape[1:])
