"""Figures without a display: made, labelled and saved as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molecli.files.atomic import write_with

MAX_LABELS = 60
DPI = 150


def figure_of(width: float, height: float) -> Any:
    """An empty figure of (width, height) inches."""
    # Not pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """The path, after writing the figure as PNG; the file is never incomplete."""
    return write_with(path, lambda part: figure.savefig(part, dpi=DPI, format="png"))


def spread(count: int) -> Sequence[int]:
    """At most MAX_LABELS of `count` indices, evenly spread."""
    stride = -(-count // MAX_LABELS)
    return range(0, count, stride)
