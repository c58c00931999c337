# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Batches of augmented crops: images are kept on the device where they fit, and read ahead where they do not."""

from __future__ import annotations

import concurrent.futures
import math
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from clustvit_ros.classes import IGNORE_INDEX, Sample
from clustvit_ros.errors import DataError
from clustvit_ros.training.augmentation import Augmentation, ClassPlaces

Place = tuple[int, int]
"""Position within an epoch, and index of the image there."""

DEFAULT_CACHE_BYTES = 4 << 30
_READERS = 8
_BATCHES_AHEAD = 2
COUNTED_IMAGES = 2000
"""At most so many images are counted, evenly chosen."""


class Batch(NamedTuple):
    """Crops with labels.

    Attributes:
        images: (B, 3, h, w) float32, 0..255, on the device.
        labels: (B, h, w) int64, 255 = void.
        names: stems of the images they are from.
    """

    images: Tensor
    labels: Tensor
    names: list[str]


class _Stored(NamedTuple):
    image: Tensor
    labels: Tensor
    places: ClassPlaces
    name: str


class Crops:
    """Draws crops; which one a place in an epoch gives depends on seed, epoch and place alone.

    Args:
        read: reads the image of an index.
        count: images.
        augmentation: how crops are drawn.
        input_size: (height, width) of the model's input for a whole image.
        seed: seed of the drawing.
        device: device that crops are made on.
        cache_bytes: images are kept there if all of them fit into this.
        own: images from here on are none of the model's own camera: at scale 1 they are as large as its input, but keep
            their shape. None means that there are none.
    """

    def __init__(
        self,
        read: Callable[[int], Sample],
        count: int,
        augmentation: Augmentation,
        input_size: tuple[int, int],
        seed: int,
        device: torch.device,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        own: int | None = None,
    ) -> None:
        self._read, self._count, self._own = read, count, count if own is None else own
        self._augmentation, self._input_size, self._seed = augmentation, input_size, seed
        self._device = device
        self._readers = concurrent.futures.ThreadPoolExecutor(_READERS)
        first = self._prepare(0)
        size_bytes = (first.image.nbytes + first.labels.nbytes) * count
        self._cache: list[_Stored] | None = None
        if size_bytes <= cache_bytes:
            self._cache = [self._move(item) for item in self._readers.map(self._prepare, range(count))]

    def __len__(self) -> int:
        return self._count

    def batches(self, epoch: int, batches: list[list[Place]]) -> Iterator[Batch]:
        """Crops of each of `batches`, in their order."""
        waiting: deque[list[concurrent.futures.Future]] = deque()
        if self._cache is None:
            waiting.extend(self._submit(batch) for batch in batches[:_BATCHES_AHEAD])
        for number, batch in enumerate(batches):
            if self._cache is not None:
                items = [self._cache[index] for _, index in batch]
            else:
                items = [self._move(future.result()) for future in waiting.popleft()]
                if number + _BATCHES_AHEAD < len(batches):
                    waiting.append(self._submit(batches[number + _BATCHES_AHEAD]))
            yield self._cut(epoch, batch, items)

    def pixel_counts(self, num_classes: int) -> Tensor:
        """Labelled pixels per class: (Q,) int64; of evenly chosen images where there are very many."""
        chosen = range(0, self._count, max(self._count // COUNTED_IMAGES, 1))
        if self._cache is not None:
            labels = (self._cache[index].labels.cpu() for index in chosen)
        else:
            labels = (item.labels for item in self._readers.map(self._prepare, chosen))
        counts = sum(np.bincount(each.numpy().ravel(), minlength=IGNORE_INDEX + 1) for each in labels)
        return torch.from_numpy(np.asarray(counts)[:num_classes])

    def _submit(self, batch: list[Place]) -> list[concurrent.futures.Future]:
        return [self._readers.submit(self._prepare, index) for _, index in batch]

    def _cut(self, epoch: int, batch: list[Place], items: list[_Stored]) -> Batch:
        crops = [
            self._augmentation.draw(
                item.labels.shape,
                item.places,
                self._size_of(index, item.labels.shape),
                np.random.default_rng((self._seed, epoch, position, index)),
            )
            for (position, index), item in zip(batch, items, strict=True)
        ]
        images, labels = self._augmentation.cut([i.image for i in items], [i.labels for i in items], crops)
        if self._augmentation.paste:
            rng = np.random.default_rng((self._seed, epoch, *batch[0]))
            own = [index < self._own for _, index in batch]
            images, labels = self._augmentation.paste_classes(images, labels, own, rng)
        return Batch(images, labels, [item.name for item in items])

    def _size_of(self, index: int, image_size: Sequence[int]) -> tuple[float, float]:
        """(height, width) of a whole image at scale 1."""
        if index < self._own:
            return self._input_size
        scale = math.sqrt(math.prod(self._input_size) / math.prod(image_size))
        return image_size[0] * scale, image_size[1] * scale

    def _prepare(self, index: int) -> _Stored:
        """Read an image, no larger than the largest zoom can use."""
        image, labels, name = self._read(index)
        limit = [side * max(self._augmentation.scale[1], 1.0) for side in self._input_size]
        shrink = max(limit[0] / labels.shape[0], limit[1] / labels.shape[1])
        if shrink < 1.0:
            size = round(labels.shape[1] * shrink), round(labels.shape[0] * shrink)
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        return _Stored(torch.from_numpy(planes), torch.from_numpy(labels), ClassPlaces(labels), name)

    def _move(self, item: _Stored) -> _Stored:
        return item._replace(image=item.image.to(self._device), labels=item.labels.to(self._device))


def check_counts(counts: Tensor, names: Sequence[str], where: str, known: Collection[str] = ()) -> None:
    """Refuse training labels in which a class never occurs: nothing can be learnt of it, and no score would show it.

    Of a class that the training knows at its start, enough is there: that is told, and no more.

    Args:
        counts: (C,), pixels of each class.
        names: of the classes.
        where: folder of the labels.
        known: classes that the weights to start from can tell already.

    Raises:
        DataError: which classes, and what such labels often are.
    """
    lacking = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    absent = [name for name in lacking if name not in known]
    if not absent:
        if lacking:
            print(
                f"{where}: no pixel of {', '.join(lacking)} in the training labels: what the start knows of it "
                "fades the longer they learn", file=sys.stderr,
            )  # fmt: skip
        return
    only_zero = len(names) > 1 and int((counts > 0).sum()) == 1 and bool(counts[0])
    pattern = (
        "; every labelled pixel is 0, as in binary masks of 0 and 255, and 255 is void here: write class ids 0, 1, ..."
        if only_zero
        else "; check ids and colours, or leave the class out of the list"
    )
    raise DataError(f"{where}: no pixel of {', '.join(absent)} in the training labels{pattern}")
