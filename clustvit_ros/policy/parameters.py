# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The parameters of the segmentation node: the one table that node, descriptors, tests and README share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from clustvit_ros.engine import ENGINES, PRECISION_CHOICES, Settings
from clustvit_ros.engine.engine import EXEMPT_SOURCES
from clustvit_ros.engine.exemption import Region, parse_regions
from clustvit_ros.engine.masks import parse_groups
from clustvit_ros.errors import ConfigError
from clustvit_ros.policy.parameter_spec import ParameterSpec, parameter, parameter_table, specs_of

MOST_THREADS = 1024
"""Native code ends the process when it is asked for very many."""

REFERENCES = ("inference", "stamp")
"""What a budget covers: the engine alone, or from the frame's stamp to the publication of its mask."""

DEADLINE_POLICIES = ("publish_late", "drop")
"""What becomes of a mask that missed its deadline."""


def split_names(text: str) -> tuple[str, ...]:
    """Names that commas separate."""
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


def parse_cameras(text: str) -> tuple[str, ...]:
    """The cameras' names; the only camera has an empty one.

    Raises:
        ConfigError: a name repeats.
    """
    names = split_names(text)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"cameras: got {', '.join(repeated)} more than once, expected each name once")
    return names or ("",)


def parse_output_size(text: str) -> str | tuple[int, int]:
    """The words `input` and `model` as they are, a fixed size as (height, width)."""
    height, by, width = text.partition("x")
    return (int(height), int(width)) if by else text


def parse_intensity_range(text: str) -> tuple[int, int] | None:
    """LOW and HIGH; None is automatic.

    Raises:
        ConfigError: they span nothing, or more than 16 bits.
    """
    if text == "auto":
        return None
    low, high = map(int, text.split())
    if not low < high <= 65_535:
        raise ConfigError(f"intensity_range: got {text}, expected auto or LOW HIGH with LOW below HIGH, at most 65535")
    return low, high


_OF_MERGING = ("merge_threshold", "token_capacity", "min_tokens", "merge_exempt_classes", "merge_exempt_region")
_OF_ADAPTING = ("latency_budget_ms", "max_rate_hz", "fill_frames")
# As in topics: \w would be letters of every script.
_NAME = "[A-Za-z][A-Za-z0-9_]*"


@dataclass(frozen=True)
class SegmentationParameters:
    """One consistent set of values; a frame is processed under exactly one of these."""

    model: str = parameter(
        "camvid_tiny", "Name of a shipped model, or path of a model folder; loaded beside the old one, then swapped.",
        live=True,
    )  # fmt: skip
    engine: str = parameter(
        "auto", "What runs it; `auto`: `cuda_graph` on a GPU, `torch` or what `tune --engines` found on a CPU.",
        choices=ENGINES,
    )  # fmt: skip
    device: str = parameter(
        "auto", "Where it runs; `auto` takes the GPU when a real kernel runs on it.",
        pattern=r"auto|cpu|cuda(:[0-9]{1,3})?", form="auto, cpu, cuda or cuda:N",
    )  # fmt: skip
    precision: str = parameter(
        "auto", "What it computes in; `auto`: float16 on a GPU, float32 or what `tune --engines` found on a CPU.",
        choices=PRECISION_CHOICES,
    )  # fmt: skip
    threads: int = parameter(
        0, "CPU threads of the engine; 0: as many as other processes leave cores.", minimum=0, maximum=MOST_THREADS
    )
    merge_threshold: float = parameter(
        0.5, "Tokens whose merge score is above this are merged; 1 merges nothing, 0 everything.",
        minimum=0.0, maximum=1.0, live=True,
    )  # fmt: skip
    token_capacity: int = parameter(
        0, "Upper bound on the tokens kept after merging; 0 lets the threshold alone decide.",
        minimum=0, maximum=1_048_576, unit="tokens", live=True,
    )  # fmt: skip
    input_scale: float = parameter(
        1.0, "Share of the sides of the model's input at which images are segmented; a budget goes no higher.",
        minimum=0.25, maximum=1.0, live=True,
    )  # fmt: skip
    latency_budget_ms: float = parameter(
        0.0, "What a frame may take; the input shrinks and tokens are merged as it needs. 0 is no budget.",
        minimum=0.0, maximum=60_000.0, unit="ms", live=True,
    )  # fmt: skip
    budget_reference: str = parameter(
        "inference", "What the budget covers: the engine alone, or from the image's stamp to the mask's publication.",
        choices=REFERENCES, live=True,
    )  # fmt: skip
    deadline_policy: str = parameter(
        "publish_late", "What becomes of a mask that missed the budget; it is counted in any case.",
        choices=DEADLINE_POLICIES, live=True,
    )  # fmt: skip
    min_tokens: int = parameter(
        0, "The budget keeps at least so many tokens, even if it is missed; `token_capacity` comes first.",
        minimum=0, maximum=1_048_576, unit="tokens", live=True,
    )  # fmt: skip
    min_input_scale: float = parameter(
        0.375, "How far a budget may shrink the input, at most `input_scale`; 1 lets it merge only.",
        minimum=0.25, maximum=1.0, live=True,
    )  # fmt: skip
    merge_exempt_classes: tuple[str, ...] = parameter(
        "", "Classes whose tokens, as the camera's previous mask shows them, are never merged, nor those beside them.",
        pattern=r"[^;:]*", form="CLASS, CLASS", separator=",", parse=split_names, live=True,
    )  # fmt: skip
    merge_exempt_region: tuple[Region, ...] = parameter(
        "", "Rectangles whose tokens are never merged, e.g. the lower third: `0.67 0 1 1`.",
        pattern=r"\s*|[-+.0-9eE,\s]+(;[-+.0-9eE,\s]+)*;?", form="TOP LEFT BOTTOM RIGHT; ... as fractions of the image",
        separator=";", parse=parse_regions, live=True,
    )  # fmt: skip
    merge_exempt_source: str = parameter(
        "previous_mask", "Where exempt classes are looked for; `two_pass` segments every frame twice instead.",
        choices=EXEMPT_SOURCES, live=True,
    )  # fmt: skip
    min_agreement: float = parameter(
        0.0, "Merging and shrinking back off while a smaller share of pixels equals the full mask's; 0 asks nothing.",
        minimum=0.0, maximum=1.0, live=True,
    )  # fmt: skip
    accuracy_check_period_s: float = parameter(
        0.0, "How often a frame is segmented unmerged at full size and compared, between frames; 0 is never.",
        minimum=0.0, maximum=3600.0, unit="s", live=True,
    )  # fmt: skip
    lazy: bool = parameter(
        True, "While nobody subscribes to an output of a camera, its frames are counted, not segmented.", live=True
    )
    max_rate_hz: float = parameter(
        0.0, "At most so many frames of a camera per second are segmented, evenly spaced; 0 is off.",
        minimum=0.0, maximum=1000.0, unit="Hz", live=True,
    )  # fmt: skip
    recalibrate: bool = parameter(
        False, "Times the engine again instead of using the kept calibration; becomes false when done.", live=True
    )
    class_groups: tuple[tuple[str, tuple[str, ...]], ...] = parameter(
        "", "Replaces the model's classes by fewer; ids follow the order, what no group names becomes 255.",
        pattern=r"\s*|[^;:]+:[^;:]+(;[^;:]+:[^;:]+)*(;\s*)?", form="GROUP: CLASS, CLASS; GROUP: CLASS", separator=";",
        parse=parse_groups, live=True,
    )  # fmt: skip
    cameras: tuple[str, ...] = parameter(
        "", "Several cameras share the engine; the topics of each are below its name (`front/image`).",
        pattern=rf"|{_NAME}(\s*,\s*{_NAME})*", form="names of letters, digits and _", separator=",",
        parse=parse_cameras, fixed=True,
    )  # fmt: skip
    batching: bool = parameter(
        False, "Whether frames of several cameras that wait may share one engine call; not with a latency budget.",
        live=True,
    )  # fmt: skip
    confidence_threshold: float = parameter(
        0.0, "Pixels less confident than this become 255 (unlabelled) in the mask.",
        minimum=0.0, maximum=1.0, live=True,
    )  # fmt: skip
    output_size: str | tuple[int, int] = parameter(
        "input", "Size of mask, confidence and clusters: the image's, the network's, or fixed.",
        pattern=r"input|model|[1-9][0-9]{0,3}x[1-9][0-9]{0,3}", form="input, model or HEIGHTxWIDTH",
        parse=parse_output_size, live=True,
    )  # fmt: skip
    points_slop_ms: float = parameter(
        0.0, "How far the stamps of image and cloud may differ for labelled points; 0: they are equal.",
        minimum=0.0, maximum=1000.0, unit="ms", live=True,
    )  # fmt: skip
    overlay_alpha: float = parameter(
        0.5, "Weight of the class colours in the overlay; 0 shows the image alone.",
        minimum=0.0, maximum=1.0, live=True,
    )  # fmt: skip
    fill_frames: bool = parameter(
        False, "Frames that come while the engine is busy get its newest mask, carried to them by optical flow.",
        live=True,
    )  # fmt: skip
    max_filled_frames: int = parameter(
        8, "So many frames, at most, get a mask carried from the same one of the engine.", minimum=1, maximum=1000,
        live=True,
    )  # fmt: skip
    image_transport: str = parameter(
        "raw", "`compressed` subscribes to JPEG or PNG on `<image>/compressed`.", choices=("raw", "compressed")
    )
    rotate: int = parameter(
        0, "180 for a camera that hangs upside down: the network sees the image turned; outputs are as the camera's.",
        choices=(0, 180), unit="degrees", live=True,
    )  # fmt: skip
    intensity_range: tuple[int, int] | None = parameter(
        "0 65535", "Of 16-bit images, what is black and white; `auto` follows the pictures, for thermal cameras.",
        pattern=r"auto|[0-9]{1,5}\s+[0-9]{1,5}", form="auto or LOW HIGH", parse=parse_intensity_range, live=True,
    )  # fmt: skip
    processing: str = parameter(
        "live", "`every_frame` queues all frames and adapts nothing, so that masks of a replay repeat bit for bit.",
        choices=("live", "every_frame"),
    )  # fmt: skip
    queue_limit_mb: int = parameter(
        1024, "With `every_frame`, frames that wait may take so much memory; what comes then is dropped, and told.",
        minimum=1, maximum=1_048_576, unit="MB",
    )  # fmt: skip
    max_image_pixels: int = parameter(
        16_777_216, "Larger images are rejected before any memory is spent on them.",
        minimum=1, maximum=1_073_741_824, unit="pixels", live=True,
    )  # fmt: skip
    input_timeout_s: float = parameter(
        3.0, "After so long without an image, log and diagnostics say so.",
        minimum=0.1, maximum=3600.0, unit="s", live=True,
    )  # fmt: skip
    autostart: bool = parameter(True, "Configure and activate at start; false waits for a lifecycle manager.")
    scripted_latency_ms: float = parameter(
        0.0, "How long the scripted engine takes with every token kept; merging saves up to three quarters.",
        minimum=0.0, maximum=60_000.0, unit="ms",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.min_input_scale > self.input_scale:
            raise ConfigError(
                f"min_input_scale: got {self.min_input_scale:g} with input_scale {self.input_scale:g}, expected 0.25 "
                f"to {self.input_scale:g}; set both (min_input_scale is 0.375 unless it is given)"
            )

    @cached_property
    def adapts(self) -> bool:
        """Whether latency, load and faults may change how a frame is segmented; never in a replay."""
        return self.processing == "live"

    @cached_property
    def fills(self) -> bool:
        """Whether masks are carried to frames that the engine does not get to; never in a replay."""
        return self.fill_frames and self.adapts

    @cached_property
    def fewest_tokens(self) -> int:
        """The fewest tokens that a budget must leave; the user's upper bound comes first."""
        return min(self.min_tokens, self.token_capacity or self.min_tokens)

    @cached_property
    def budget_target(self) -> tuple[float, str]:
        """Milliseconds, and of what."""
        return self.latency_budget_ms, self.budget_reference

    @cached_property
    def budget_terms(self) -> tuple[object, ...]:
        """What decides whether a budget can be held."""
        bounds = self.fewest_tokens, self.min_input_scale, self.input_scale
        return (*self.budget_target, *bounds) if self.adapts else (self.latency_budget_ms,)

    def eases_budget_of(self, other: SegmentationParameters) -> bool:
        """Whether both have a budget of the same thing, and the other's is no larger."""
        same = self.budget_reference == other.budget_reference
        return same and 0.0 < other.latency_budget_ms <= self.latency_budget_ms

    @property
    def exempt_region(self) -> tuple[Region, ...]:
        """`merge_exempt_region`, which is of the camera's image, as the network sees it."""
        if not self.rotate:
            return self.merge_exempt_region
        return tuple(
            (1.0 - bottom, 1.0 - right, 1.0 - top, 1.0 - left) for top, left, bottom, right in self.merge_exempt_region
        )

    @cached_property
    def exempts(self) -> bool:
        """Whether classes or regions are exempt from merging."""
        return bool(self.merge_exempt_classes or self.merge_exempt_region)

    def without_effect(self, merges: bool) -> tuple[str, ...]:
        """What has been set and changes nothing, and why: a sentence each.

        Args:
            merges: whether the network merges tokens.
        """
        reasons: dict[str, str] = {}
        if not merges:
            reasons |= dict.fromkeys(_OF_MERGING, "the model merges no tokens")
        if not self.accuracy_check_period_s:
            reasons["min_agreement"] = "accuracy_check_period_s is 0, so that nothing is checked"
        if not self.adapts:
            reasons |= dict.fromkeys(_OF_ADAPTING, "processing is every_frame")
        return tuple(
            f"{name} has no effect: {reason}"
            for name, reason in reasons.items()
            if getattr(self, name) != getattr(SegmentationParameters, name)
        )

    @cached_property
    def is_guarded(self) -> bool:
        """Whether classes or regions are exempt from merging, or masks are compared with unmerged ones."""
        return self.exempts or self.accuracy_check_period_s > 0.0

    def settings(
        self, model_size: tuple[int, int], confidence: bool, clusters: bool, token_capacity: int = 0,
        input_scale: float = 0.0,
    ) -> Settings:  # fmt: skip
        """What one engine call gets.

        Args:
            model_size: (height, width) that the network works at, for `output_size: model`.
            confidence: whether somebody wants the confidence map.
            clusters: whether somebody wants the cluster map.
            token_capacity: most tokens that may be kept; 0 is what the user set.
            input_scale: size that the network sees; 0 is what the user set.
        """
        size = self.output_size
        return Settings(
            merge_threshold=self.merge_threshold, token_capacity=token_capacity or self.token_capacity,
            confidence_threshold=self.confidence_threshold,
            output_size=size if isinstance(size, tuple) else model_size if size == "model" else None,
            confidence=confidence, clusters=clusters, input_scale=input_scale or self.input_scale,
        )  # fmt: skip


@dataclass(frozen=True)
class CameraParameters:
    """What a camera of `cameras` has for itself; declared as `<camera>.<name>`."""

    merge_threshold: float = parameter(
        -1.0, "As `merge_threshold`, for this camera; -1 takes the node's.", minimum=-1.0, maximum=1.0, live=True
    )
    rotate: int = parameter(
        -1, "As `rotate`, for this camera; -1 takes the node's.", choices=(-1, 0, 180), unit="degrees", live=True
    )

    def __post_init__(self) -> None:
        if -1.0 < self.merge_threshold < 0.0:
            raise ConfigError(f"merge_threshold: got {self.merge_threshold:g}, expected 0 to 1, or -1: the node's")

    def over(self, parameters: SegmentationParameters) -> SegmentationParameters:
        """The node's parameters as they hold for this camera."""
        own = {name: value for name, value in vars(self).items() if value >= 0}
        return replace(parameters, **own) if own else parameters


PARAMETERS: tuple[ParameterSpec, ...] = specs_of(SegmentationParameters)
"""Every parameter of the segmentation node, in the order of the README's table."""


def as_markdown_table() -> str:
    """The table for the README; a test compares the two."""
    return parameter_table(SegmentationParameters)


def camera_markdown_table() -> str:
    """The table of a camera's own parameters for the README."""
    return parameter_table(CameraParameters, "<camera>.")
