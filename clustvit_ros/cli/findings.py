"""What `clustvit-ros doctor` finds: one sentence, how bad it is, and what to do about it."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


class Level(str, enum.Enum):
    """How bad a finding is."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        check: what was looked at, e.g. "shared memory".
        level: how bad it is.
        finding: what was found, in a sentence.
        remedy: what to do; empty only where nothing is wrong.
    """

    check: str
    level: Level
    finding: str
    remedy: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", Level(self.level))
        if self.level is not Level.OK and not self.remedy:
            raise ValueError(f"{self.check}: a finding of level {self.level.value} needs a remedy")


def as_text(findings: Sequence[Finding]) -> str:
    """A list for people."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.value:5}{finding.check}: {finding.finding}")
        if finding.remedy:
            lines.append(f"       -> {finding.remedy}")
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    lines.append(", ".join(f"{count} {level.value}" for level, count in counts.items()))
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """The same for programs: `ok`, and `findings` with check, level, finding and remedy."""
    content = {
        "ok": not any(finding.level is Level.FAIL for finding in findings),
        "findings": [{**asdict(finding), "level": finding.level.value} for finding in findings],
    }
    return json.dumps(content, indent=1)
