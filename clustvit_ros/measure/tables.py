# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Tables and plots for people: the one writer of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clustvit_ros.errors import ConfigError


def markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table as lines of text, columns aligned.

    Args:
        lines: cells of each row, the titles first.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled]


def new_figure(size_in: tuple[float, float], rows: int = 1, columns: int = 1, **layout: Any) -> tuple[Any, Any]:
    """A matplotlib figure that needs no screen and belongs to nobody else, and its axes.

    Args:
        size_in: (width, height) in inches.
        rows: axes below each other.
        columns: axes beside each other.
        layout: further arguments of `Figure.subplots`.

    Returns:
        The figure, and its axes as a (rows, columns) array.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"plot: matplotlib cannot be imported ({error}); install clustvit_ros with its 'train' extra"
        ) from error
    figure = Figure(figsize=size_in, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as the path's suffix says; folders are made.

    Raises:
        ConfigError: a suffix of no picture format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # a suffix that matplotlib does not know
        raise ConfigError(f"{path}: cannot be drawn ({error})") from error
