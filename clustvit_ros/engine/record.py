"""What became of one frame: the record that statistics, diagnostics, log lines and bag labels are written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from clustvit_ros.engine.engine import Stats

OUTCOMES = ("segmented", "late", "rejected", "failed")
"""A mask was published; it was late and withheld; the message cannot be segmented; the engine raised."""


@dataclass(frozen=True)
class FrameRecord:
    """One frame; every duration in milliseconds.

    Args:
        camera: name of the camera that it is from; empty for the only one.
        outcome: one of `OUTCOMES`.
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

    def label_pairs(self) -> dict[str, str]:
        """What a mask was made with: keys and values that depend on frame, model and settings, never on the clock."""
        if self.stats is None:
            return {}
        return {
            "merge_threshold": f"{self.stats.merge_threshold:g}",
            "confidence_threshold": f"{self.confidence_threshold:g}",
            "token_capacity": str(self.stats.token_capacity),
            "tokens_total": str(self.stats.tokens_total),
            "tokens_kept": f"{self.stats.tokens_kept:g}",
            "mask_size": "{}x{}".format(*self.mask_size),
        }

    def as_pairs(self) -> dict[str, str]:
        """Keys and values of the frame's statistics."""
        if self.stats is None:
            return {}
        return {
            **self.label_pairs(),
            "tokens_exempt": str(self.stats.tokens_exempt),
            "threads": str(self.stats.threads),
            "image_size": "{}x{}".format(*self.image_size),
            "batch": str(self.batch),
            "decode_ms": f"{self.decode_ms:.3f}",
            "engine_ms": f"{self.stats.total_ms:.3f}",
            "publish_ms": f"{self.publish_ms:.3f}",
            "age_ms": f"{self.age_ms:.3f}",
            "deadline_missed": str(self.deadline_missed).lower(),
            "deadline_misses": str(self.deadline_misses),
            "published": str(self.outcome == "segmented").lower(),
            **self.plan,
            **{f"stage.{name}_ms": f"{value:.3f}" for name, value in self.stats.stages_ms.items()},
        }
