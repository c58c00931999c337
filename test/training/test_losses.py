# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Losses beyond plain cross-entropy, by their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch

from clustvit_ros.training.losses import distillation_loss, lovasz_softmax, segmentation_loss


def one_hot_logits(labels, num_classes, certainty):
    return certainty * torch.nn.functional.one_hot(labels, num_classes).permute(0, 3, 1, 2).float()


def test_lovasz_of_certain_predictions_is_one_minus_the_iou():
    """On hard predictions the extension equals the set function: the mean over present classes of 1 - IoU."""
    torch.manual_seed(0)
    truth, predicted = (torch.randint(0, 3, (2, 12, 16)) for _ in range(2))
    losses = []
    for image in range(2):
        present = truth[image].unique()
        inter = [((truth[image] == c) & (predicted[image] == c)).sum() for c in present]
        union = [((truth[image] == c) | (predicted[image] == c)).sum() for c in present]
        losses.append(sum(1 - float(i) / float(u) for i, u in zip(inter, union, strict=True)) / len(present))
    value = lovasz_softmax(one_hot_logits(predicted, 3, 60.0), truth)
    assert float(value) == pytest.approx(sum(losses) / 2, abs=1e-4)


def test_lovasz_ignores_void_and_survives_an_image_of_it():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randint(0, 3, (1, 8, 8))
    labels[:, :4] = 255
    value = lovasz_softmax(logits, labels)
    before = value.item()
    changed = logits.detach().clone()
    changed[:, :, :4] += 5 * torch.randn(1, 3, 4, 8)
    assert float(lovasz_softmax(changed, labels)) == pytest.approx(before, abs=1e-6)
    assert lovasz_softmax(logits, torch.full_like(labels, 255)).item() == 0.0
    value.backward()
    assert logits.grad[:, :, :4].abs().max() == 0 and logits.grad[:, :, 4:].abs().max() > 0


def test_hard_pixels_alone_count():
    logits = torch.zeros(1, 2, 1, 8)
    logits[0, 0, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, 9.0])
    labels = torch.zeros(1, 1, 8, dtype=torch.long)
    labels[0, 0, 7] = 255
    each = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255, reduction="none")[0, 0]
    # ceil(7 labelled pixels * 0.4) = 3 hardest: those with the lowest logit of the true class.
    assert float(segmentation_loss(logits, labels, hard_share=0.4)) == pytest.approx(float(each[4:7].mean()))
    weights = torch.tensor([2.0, 0.5])
    expected = float(each[4:7].mean())
    assert float(segmentation_loss(logits, labels, weights, hard_share=0.4)) == pytest.approx(expected)


def test_hardness_is_the_unweighted_loss():
    """A heavy class must not fill the hard share just because it is heavy."""
    logits = torch.tensor([[1.0, -2.0], [0.0, 0.0]])[None, :, None]  # Q=2, two pixels
    labels = torch.tensor([[[0, 1]]])
    logits[0, :, 0, 1] = torch.tensor([0.0, 1.0])
    logits[0, :, 0, 0] = torch.tensor([0.0, 2.0])  # pixel 0 of class 0 is wrong, pixel 1 of class 1 is right
    weights = torch.tensor([0.1, 10.0])
    wrong = torch.nn.functional.cross_entropy(logits[..., :1], labels[..., :1])
    assert float(segmentation_loss(logits, labels, weights, hard_share=0.5)) == pytest.approx(float(wrong))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_the_kl_divergence_and_spares_the_teacher(temperature):
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 4, 3, 5, requires_grad=True) for _ in range(2))
    value = distillation_loss(student, teacher, temperature)
    p, q = ((x / temperature).softmax(1) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(value, expected)
    value.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert float(distillation_loss(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-6)


def test_losses_of_halves_average_to_the_loss_of_the_whole():
    """What lets several processes give the result of one."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 4, 4), torch.randint(0, 3, (4, 16, 16))
    labels[0, :12] = 255
    for weights, share in itertools.product((None, torch.tensor([1.0, 2.0, 5.0])), (1.0, 0.3)):
        totals: list[torch.Tensor] = []
        _halves(logits, labels, weights, share, lambda weight, totals=totals: totals.append(weight) or weight)
        halves = _halves(logits, labels, weights, share, lambda weight, totals=totals: sum(totals) / 2)
        torch.testing.assert_close(sum(halves) / 2, segmentation_loss(logits, labels, weights, share))


def _halves(logits, labels, weights, share, average):
    halves = (slice(0, 2), slice(2, 4))
    return [segmentation_loss(logits[half], labels[half], weights, share, average) for half in halves]
