"""Pictures of gates: sites by experts (MoLE, Fig. 7), and entropy over training (Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.files.atomic import write_with

if TYPE_CHECKING:
    from molecli.engine.inspect import GateReport

MAX_PANELS = 12
MAX_LABELS = 60
DPI = 150


def heatmap_png(report: GateReport, path: str | Path) -> Path:
    """The path of a picture with one panel for each task, all of them first: sites down, experts across."""
    panels = list(report.weights) if len(report.tasks) > 1 else list(report.weights)[:1]
    panels = panels[:MAX_PANELS]
    wide = max(1.1, 0.42 * len(report.experts))
    longest = max(map(len, report.sites))
    width = min(24.0, 0.075 * longest + wide * len(panels) + 1.2)
    height = min(24.0, max(2.6, 0.17 * min(len(report.sites), MAX_LABELS) + 1.7))
    figure = figure_of(width, height)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, panels, strict=True):
        image = axis.imshow(report.weights[task], aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0)
        axis.set_title(task, fontsize=8)
        axis.set_xticks(range(len(report.experts)), report.experts, rotation=60, ha="right", fontsize=7)
        axis.tick_params(length=2)
    places = spread(len(report.sites))
    axes[0].set_yticks(places, [report.sites[i] for i in places], fontsize=6)
    figure.colorbar(image, ax=list(axes), label="mean gate weight", fraction=0.03, pad=0.02)
    return save_figure(figure, path)


def entropy_png(report: GateReport, path: str | Path) -> Path:
    """The path of a picture of the gates' entropy over the training steps, with the uniform gate's as a line."""
    figure = figure_of(5.0, 3.2)
    axis = figure.subplots()
    steps, values = zip(*report.course, strict=True)
    axis.plot(steps, values)
    axis.axhline(
        report.max_entropy, color="grey", linewidth=0.8, linestyle="--", label=f"uniform: ln {len(report.experts)}"
    )
    axis.set(xlabel="training step", ylabel="mean gate entropy (nats)", ylim=(0, report.max_entropy * 1.08 or 1.0))
    axis.legend(fontsize=8, loc="lower left")
    return save_figure(figure, path)


def figure_of(width: float, height: float) -> Any:
    """An empty figure of (width, height) inches."""
    # Not pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """The path, now holding the figure as PNG, whole or not at all."""
    return write_with(path, lambda part: figure.savefig(part, dpi=DPI, format="png"))


def spread(count: int) -> Sequence[int]:
    """At most MAX_LABELS of `count` places, evenly spread."""
    stride = -(-count // MAX_LABELS)
    return range(0, count, stride)
