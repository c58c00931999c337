# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The interface between a network that runs somewhere and everything that wants masks from it.

Images, masks and all maps are uint8 arrays: resize, normalisation, upsampling and arg-max happen inside the engine on
its device. Settings are arguments of the call, never state, so that a mask is always attributable to the settings that
made it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from clustvit_ros.classes import ClassSet
from clustvit_ros.engine.ladder import Accuracy, OperatingPoint
from clustvit_ros.errors import ConfigError, ImageError

PRECISIONS = ("float32", "float16", "bfloat16", "int8")
"""What a network may compute in; what decides or sums stays in float32. int8 is for a CPU, the halves are for a GPU."""

PRECISION_CHOICES = ("auto", *PRECISIONS)
"""What may be asked for: "auto" is float16 on a GPU, float32 on a CPU."""


EXEMPT_SOURCES = ("previous_mask", "two_pass")
"""Where classes that are exempt from merging are looked for."""


@dataclass(frozen=True)
class Settings:
    """How much one call merges, and what it returns.

    Args:
        merge_threshold: a token is merged when its merge score is above this; 0.5 is the paper's arg-max, 1.0 merges
            nothing, 0.0 everything.
        token_capacity: upper bound on kept tokens; 0 lets the threshold alone decide.
        input_scale: share of the sides of the full input, above 0 to 1, at which the network sees the image, in whole
            patches; exemptions hold at every size.
        threads: CPU threads to compute with, one of the engine's `thread_counts`; 0 is the engine's own choice.
        confidence_threshold: pixels whose confidence (0..1) is below this get the ignore index; 0 labels every pixel.
        output_size: (height, width) of mask, confidence and cluster map; None is the input image's size.
        confidence: compute the confidence map.
        clusters: compute the cluster map.
        min_tokens: keep at least so many tokens, though the threshold would merge them; `token_capacity` comes first.
        merge_exempt_region: rectangles (top, left, bottom, right), fractions of the image, whose tokens are never
            merged. Exempt tokens come before `token_capacity`: it rises to the next rung that has room for them all.
        merge_exempt_classes: ids of classes whose tokens are never merged, nor the tokens beside them.
        merge_exempt_source: where those classes are looked for: "previous_mask", or "two_pass", the mask that a first
            pass over the same frame gives, for almost twice the time.
        previous_mask: (H, W) or (B, H, W) class ids of the engine's own classes, for the former; None exempts no class.

    Raises:
        ConfigError: a value outside its range.
    """

    merge_threshold: float = 0.5
    token_capacity: int = 0
    confidence_threshold: float = 0.0
    output_size: tuple[int, int] | None = None
    confidence: bool = True
    clusters: bool = False
    min_tokens: int = 0
    merge_exempt_region: tuple[tuple[float, float, float, float], ...] = ()
    merge_exempt_classes: tuple[int, ...] = ()
    merge_exempt_source: str = "previous_mask"
    previous_mask: np.ndarray | None = field(default=None, compare=False, repr=False)
    input_scale: float = 1.0
    threads: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.input_scale <= 1.0:
            raise ConfigError(f"input_scale: got {self.input_scale}, expected above 0.0 to 1.0")
        for name in ("merge_threshold", "confidence_threshold"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name}: got {value}, expected 0.0 to 1.0")
        if self.token_capacity < 0:
            raise ConfigError(f"token_capacity: got {self.token_capacity}, expected 0 (automatic) or a positive count")
        if self.min_tokens < 0:
            raise ConfigError(f"min_tokens: got {self.min_tokens}, expected 0 or a positive count")
        if self.merge_exempt_source not in EXEMPT_SOURCES:
            raise ConfigError(
                f"merge_exempt_source: got {self.merge_exempt_source!r}, expected one of {', '.join(EXEMPT_SOURCES)}"
            )
        if self.output_size is not None and min(self.output_size) < 1:
            raise ConfigError(f"output_size: got {self.output_size}, expected positive (height, width)")

    @property
    def looks_back(self) -> bool:
        """Whether exempt classes are looked for in what was seen a frame ago."""
        return bool(self.merge_exempt_classes) and self.merge_exempt_source == "previous_mask"


@dataclass(frozen=True)
class Stats:
    """What one call did, and what it cost.

    Args:
        tokens_total: patch tokens per image.
        tokens_kept: patch tokens that were processed individually after the injection point, mean over the batch.
        token_capacity: slots that were available to kept tokens.
        merge_threshold: the threshold in force.
        stages_ms: milliseconds by stage; sum about `total_ms`. `preprocess` and `postprocess`, and between them what
            the engine can tell apart: `encode` (up to the injection point), `finish` (from there), `decode` (the head).
        total_ms: milliseconds from the call to its return.
        tokens_exempt: patch tokens that had to be kept, of the image that had the most.
        threads: CPU threads that computed it; 0 where the engine does not tell.
        input_size: (height, width) at which the network saw the images.
        input_scale: its share of the sides of the full input, as asked for.
    """

    tokens_total: int
    tokens_kept: float
    token_capacity: int
    merge_threshold: float
    total_ms: float
    stages_ms: dict[str, float] = field(default_factory=dict)
    tokens_exempt: int = 0
    threads: int = 0
    input_size: tuple[int, int] = (0, 0)
    input_scale: float = 1.0

    @property
    def operating_point(self) -> OperatingPoint:
        """Where the call ran."""
        return OperatingPoint(self.input_scale, self.token_capacity, self.tokens_total)


@dataclass(frozen=True)
class Prediction:
    """Label maps of a batch of B images.

    Args:
        mask: (B, H, W) uint8 class ids (uint16 above 255 classes); 255 is unlabelled.
        confidence: (B, H, W) uint8, softmax probability of the mask's class scaled to 0..255, 0 where the mask is 255;
            None when not asked for.
        cluster_map: (B, H, W) uint8, cluster id per pixel, 0 = kept; None when not asked for.
        stats: what was used and what it cost.
        class_grid: (B, h, w) class ids on the network's own grid, however sure it is: what the next frame's exempt
            classes are looked for in; None unless the settings look back.
    """

    mask: np.ndarray
    confidence: np.ndarray | None
    cluster_map: np.ndarray | None
    stats: Stats
    class_grid: np.ndarray | None = None

    def alone(self, index: int) -> Prediction:
        """The maps of one image, as a batch of their own."""
        one = slice(index, index + 1)
        return Prediction(
            self.mask[one], None if self.confidence is None else self.confidence[one],
            None if self.cluster_map is None else self.cluster_map[one], self.stats,
            None if self.class_grid is None else self.class_grid[one],
        )  # fmt: skip


@dataclass(frozen=True)
class EngineInfo:
    """What an engine runs, and where.

    Args:
        model: name of the model.
        engine: name of the implementation, e.g. "torch".
        device: name of the device that it runs on, e.g. "cpu" or "cuda:0 (Orin)".
        device_reason: why this device and engine, when chosen automatically or fallen back to; else empty.
        precision: e.g. "float32".
        classes: names and colours.
        input_size: (height, width) the network sees for an image of that aspect.
        tokens_total: patch tokens at `input_size`.
        weights_sha256: hash of the weights file; empty when there is none.
        model_sha256: hash of the weights, the network's configuration and its input, so that measurements can be kept
            for them; empty when there are no weights.
        accuracies: what the model's operating points are worth, as its folder says; empty where it says nothing.
        merges: whether the network merges tokens, so that threshold and capacity have an effect.
        execution_providers: ONNX Runtime's, with the share of the network's operations that each of them took, e.g.
            "CUDAExecutionProvider 98 %, CPUExecutionProvider 2 %"; empty for other engines.
    """

    model: str
    engine: str
    device: str
    device_reason: str
    precision: str
    classes: ClassSet
    input_size: tuple[int, int]
    tokens_total: int
    weights_sha256: str = ""
    model_sha256: str = ""
    accuracies: tuple[Accuracy, ...] = ()
    merges: bool = True
    execution_providers: str = ""

    @property
    def engine_told(self) -> str:
        """The engine's name for people, with its execution providers."""
        return f"{self.engine} ({self.execution_providers})" if self.execution_providers else self.engine


class Engine(abc.ABC):
    """Segments images. Calls must not overlap; an engine belongs to one thread at a time."""

    @property
    @abc.abstractmethod
    def info(self) -> EngineInfo:
        """What this engine runs, and where."""

    @property
    def fault(self) -> str:
        """Why this engine does not run as it was asked to, in a sentence; empty while it does."""
        return ""

    @abc.abstractmethod
    def warmup(self, image_size: tuple[int, int] | None = None) -> None:
        """Do everything slow that a first call at full size would do, for images of (height, width) `image_size`."""

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Numbers of CPU threads that a call may be given, most first; 0 alone where it is the engine's own choice."""
        return (0,)

    @abc.abstractmethod
    def input_size(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, int]:
        """(height, width) at which the network sees an image of (height, width) `image_size`, in whole patches.

        Args:
            image_size: (height, width) of the camera image.
            input_scale: share of the sides of the full input.
        """

    @abc.abstractmethod
    def capacities(self, image_size: tuple[int, int], input_scale: float = 1.0) -> tuple[int, ...]:
        """The ladder of token capacities that this engine runs with, ascending; the last one keeps every token.

        Args:
            image_size: (height, width) of the camera image.
            input_scale: share of the sides of the full input.
        """

    @abc.abstractmethod
    def segment(self, images: np.ndarray | Sequence[np.ndarray], settings: Settings = Settings()) -> Prediction:
        """Segment one image or several of one size.

        Args:
            images: (H, W, 3) or (B, H, W, 3) uint8 RGB, or a sequence of the former.
            settings: merge strength and outputs of this call.

        Raises:
            ImageError: wrong shape or type of an image.
            EngineError: the device failed.
        """

    def look_ahead(self, upcoming: Callable[[], np.ndarray | None]) -> None:  # noqa: B027 (most copy nothing)
        """Let the engine bring images to its device while that is at others.

        Args:
            upcoming: gives the images of the next call as far as they are known, to stay unchanged until then; called
                in the thread of `segment`, which waits for its device meanwhile.
        """

    def close(self) -> None:  # noqa: B027 (most engines have nothing to free)
        """Free the device's memory; the engine cannot be used afterwards."""


def as_batch(images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Check images and stack them.

    Args:
        images: (H, W, 3) or (B, H, W, 3) uint8, or a sequence of (H, W, 3).

    Returns:
        (B, H, W, 3) uint8.

    Raises:
        ImageError: not uint8, not three channels, empty, or of different sizes.
    """
    if not isinstance(images, np.ndarray):
        if len(images) == 0:
            raise ImageError("images: got an empty sequence, expected at least one image")
        if len({image.shape for image in images}) != 1:
            raise ImageError(f"images: got sizes {[image.shape for image in images]}, expected one size per batch")
        images = np.stack(images)
    batch = images[None] if images.ndim == 3 else images
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3 or 0 in batch.shape:
        raise ImageError(f"images: got shape {images.shape} of {images.dtype}, expected (height, width, 3) uint8 RGB")
    return batch


def check_precision(precision: str) -> None:
    """Refuse what is none of `PRECISION_CHOICES`.

    Raises:
        ConfigError: with the choices.
    """
    if precision not in PRECISION_CHOICES:
        raise ConfigError(f"precision: got {precision!r}, expected one of {', '.join(PRECISION_CHOICES)}")


OUTCOMES = ("segmented", "filled", "late", "unwatched", "rejected", "failed")
"""The engine's mask was published; a carried one was; it was late and withheld; nobody subscribed; it is no usable
image; the engine raised."""

OVERTAKEN = "overtaken"
"""Outcome of an engine call for a frame that had been filled before: its mask is carried on, and not published."""


@dataclass(frozen=True)
class FrameRecord:
    """One frame; every duration in milliseconds.

    Args:
        camera: name of the camera that it is from; empty for the only one.
        outcome: one of `OUTCOMES`, or `OVERTAKEN`.
        problem: why it was rejected or failed; else empty.
        image_size: (height, width) of the camera image.
        mask_size: (height, width) of the mask.
        batch: how many images were segmented together.
        stats: what the engine did; its times are those of the whole batch. None when it did nothing.
        confidence_threshold: confidence below which pixels were left unlabelled.
        plan: why it was segmented this way, as keys and values.
        deadline_missed: whether it took longer than its budget.
        deadline_misses: misses so far, this frame included.
        decode_ms: from message to RGB array.
        publish_ms: from mask and confidence to messages that DDS has.
        arrival_age_ms: from the frame's stamp to its arrival; 0 when it has no stamp.
        age_ms: from the frame's stamp (from its arrival when it has none) to the publication of the mask.
        stamped: whether the frame had a stamp.
        filled: whether its mask was carried to it from another frame, whose `stats` these are; None where no frame is.
        filled_frames: how many frames have got that mask, this one included.
        filled_age_ms: from the stamp of the frame that the mask was made of to this one's.
        flow_ms: what it took to follow the picture and carry the mask.
    """

    camera: str = ""
    outcome: str = "segmented"
    problem: str = ""
    image_size: tuple[int, int] = (0, 0)
    mask_size: tuple[int, int] = (0, 0)
    batch: int = 1
    stats: Stats | None = None
    confidence_threshold: float = 0.0
    plan: Mapping[str, str] = field(default_factory=dict)
    deadline_missed: bool = False
    deadline_misses: int = 0
    decode_ms: float = 0.0
    publish_ms: float = 0.0
    arrival_age_ms: float = 0.0
    age_ms: float = 0.0
    stamped: bool = True
    filled: bool | None = None
    filled_frames: int = 0
    filled_age_ms: float = 0.0
    flow_ms: float = 0.0

    def label_pairs(self) -> dict[str, str]:
        """What a mask was made with: keys and values that depend on frame, model and settings, never on the clock."""
        if self.stats is None:
            return {}
        return {
            "merge_threshold": f"{self.stats.merge_threshold:g}",
            "confidence_threshold": f"{self.confidence_threshold:g}", "token_capacity": str(self.stats.token_capacity),
            "tokens_total": str(self.stats.tokens_total), "tokens_kept": f"{self.stats.tokens_kept:g}",
            "input_size": "{}x{}".format(*self.stats.input_size), "mask_size": "{}x{}".format(*self.mask_size),
        }  # fmt: skip

    def as_pairs(self) -> dict[str, str]:
        """Keys and values of the frame's statistics."""
        if self.stats is None:
            return {}
        return {
            **self.label_pairs(), "tokens_exempt": str(self.stats.tokens_exempt), "threads": str(self.stats.threads),
            "image_size": "{}x{}".format(*self.image_size), "input_scale": f"{self.stats.input_scale:g}",
            "batch": str(self.batch),
            "decode_ms": f"{self.decode_ms:.3f}", "engine_ms": f"{self.stats.total_ms:.3f}",
            "publish_ms": f"{self.publish_ms:.3f}", "age_ms": f"{self.age_ms:.3f}",
            "deadline_missed": str(self.deadline_missed).lower(), "deadline_misses": str(self.deadline_misses),
            "published": str(self.outcome in ("segmented", "filled")).lower(), **self.plan, **self._filled_pairs(),
            **{f"stage.{name}_ms": f"{value:.3f}" for name, value in self.stats.stages_ms.items()},
        }  # fmt: skip

    def _filled_pairs(self) -> dict[str, str]:
        if not self.filled:
            return {} if self.filled is None else {"filled": "false"}
        return {
            "filled": "true", "filled_frames": str(self.filled_frames), "filled_age_ms": f"{self.filled_age_ms:.3f}",
            "flow_ms": f"{self.flow_ms:.3f}",
        }  # fmt: skip
