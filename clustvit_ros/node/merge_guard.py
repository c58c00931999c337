"""What keeps merging from doing harm: exempt classes and regions per frame, and a check of accuracy now and then.

The only state is here: each camera's last mask, and what the checks found. The engine gets both as arguments of its
calls. Everything but `pairs` belongs to the worker's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clustvit_ros.classes import IGNORE_INDEX
from clustvit_ros.engine import Engine, Prediction, Settings
from clustvit_ros.engine.exemption import exempt_class_ids, parse_regions
from clustvit_ros.node.parameters import SegmentationParameters
from clustvit_ros.policy import AccuracyGuard, Agreement


def check_exemptions(parameters: SegmentationParameters, class_names: Sequence[str] | None) -> None:
    """Refuse exemptions that cannot be.

    Args:
        parameters: to be checked.
        class_names: of the model; None before one is loaded.

    Raises:
        ConfigError: a region that is no rectangle in the image, or a class that the model lacks.
    """
    parse_regions(parameters.merge_exempt_region)
    if class_names is not None:
        exempt_class_ids(class_names, parameters.merge_exempt_classes)


@dataclass(frozen=True)
class _Sample:
    """A segmented frame that may be compared with its unmerged self."""

    camera: str
    image: np.ndarray
    settings: Settings
    mask: np.ndarray
    token_capacity: int
    tokens_total: int


class MergeGuard:
    """Exemptions and accuracy checks of one engine.

    Args:
        engine: used by the thread that calls.
        clock: monotonic seconds.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._names = engine.info.classes.names
        self._masks: dict[str, np.ndarray] = {}
        self._guard = AccuracyGuard(clock())
        self._sample: _Sample | None = None
        self._parameters = SegmentationParameters()
        self._pairs: dict[str, str] = {}

    @property
    def pairs(self) -> Mapping[str, str]:
        """What the checks found, as keys and values of stats and diagnostics; any thread may ask."""
        return self._pairs

    def parameters_for(self, image_size: tuple[int, int], parameters: SegmentationParameters) -> SegmentationParameters:
        """The parameters with `min_tokens` as high as the latest checks want it."""
        self._parameters = parameters
        floor = self._guard.floor(self._engine.capacities(image_size))
        if floor <= parameters.min_tokens:
            return parameters
        return replace(parameters, min_tokens=floor)

    def settings_for(self, settings: Settings, cameras: Sequence[str], image_size: tuple[int, int]) -> Settings:
        """The settings of a call with the exemptions of its frames, and with the checks' floor.

        Args:
            settings: of the frames, alike for all of them.
            cameras: one for each image of the call.
            image_size: (height, width) of the images.
        """
        parameters = self._parameters
        floor = self._guard.floor(self._engine.capacities(image_size))
        class_ids = exempt_class_ids(self._names, parameters.merge_exempt_classes)
        if not (floor or class_ids or parameters.merge_exempt_region):
            return settings
        masks = [self._masks.get(camera) for camera in cameras]
        known = [mask for mask in masks if mask is not None]
        previous = None
        if class_ids and known and len({mask.shape for mask in known}) == 1:
            # A camera without a mask yet has nothing to exempt.
            previous = np.stack([np.full_like(known[0], IGNORE_INDEX) if mask is None else mask for mask in masks])
        return replace(
            settings,
            min_tokens=floor,
            merge_exempt_region=parse_regions(parameters.merge_exempt_region),
            merge_exempt_classes=class_ids,
            merge_exempt_source=parameters.merge_exempt_source,
            previous_mask=previous,
        )

    def saw(self, cameras: Sequence[str], images: Sequence[np.ndarray], settings: Settings, result: Prediction) -> None:
        """Remember a call's masks, before classes are grouped.

        Args:
            cameras, images: of the call, in order.
            settings: as `settings_for` gave them.
            result: what the engine made of it.
        """
        if settings.merge_exempt_classes:
            self._masks.update(zip(cameras, result.mask, strict=True))
        else:
            self._masks.clear()
        stats = result.stats
        self._sample = None
        # A replay must not depend on the clock.
        live = self._parameters.processing == "live"
        if live and self._guard.due(self._clock(), self._parameters.accuracy_check_period_s):
            self._sample = _Sample(
                cameras[0], images[0], settings, result.mask[0], stats.token_capacity, stats.tokens_total
            )

    def use_idle_time(self, idle: Callable[[], bool]) -> bool:
        """Compare the latest frame with its unmerged mask, if a check is due and nothing waits.

        Returns:
            True when a check was made: the next frame may have waited for it.
        """
        sample, parameters, now_s = self._sample, self._parameters, self._clock()
        if sample is None or not (idle() or self._guard.overdue(now_s, parameters.accuracy_check_period_s)):
            return False
        self._sample = None
        # The same outputs as the frame had: another size would be another resampling.
        full = Settings(
            merge_threshold=1.0, confidence=False, output_size=sample.settings.output_size,
            confidence_threshold=sample.settings.confidence_threshold,
        )  # fmt: skip
        try:
            reference = self._engine.segment(sample.image, full).mask[0]
        except Exception:  # whatever an engine raises; the frames themselves tell of a failing engine
            self._guard.skip(self._clock())
            return True
        agreement = compare(sample.mask, reference, self._names, sample.settings.merge_exempt_classes)
        image_size = (sample.image.shape[0], sample.image.shape[1])
        capacities = self._engine.capacities(image_size)
        self._guard.observe(agreement, self._clock(), parameters.min_agreement, sample.token_capacity, capacities)
        self._tell(agreement, self._guard.floor(capacities))
        return True

    def _tell(self, agreement: Agreement, floor: int) -> None:
        self._pairs = {
            "agreement": f"{agreement.overall:.4f}",
            **{f"agreement.{name}": f"{share:.4f}" for name, share in agreement.per_class.items()},
            "min_agreement": f"{self._parameters.min_agreement:g}",
            "accuracy_checks": str(self._guard.checks),
            "accuracy_min_tokens": str(floor),
        }


def compare(mask: np.ndarray, reference: np.ndarray, names: Sequence[str], class_ids: Sequence[int]) -> Agreement:
    """How far a mask agrees with the unmerged one.

    Args:
        mask, reference: (H, W) class ids.
        names: of the classes.
        class_ids: those that are told one by one.
    """
    labelled = (mask != IGNORE_INDEX) & (reference != IGNORE_INDEX)
    equal = mask == reference
    count = int(labelled.sum())
    per_class = {}
    for class_id in class_ids:
        there = reference == class_id
        if there.any():
            per_class[names[class_id]] = float(equal[there].mean())
    return Agreement(float((equal & labelled).sum() / count) if count else 1.0, per_class)
