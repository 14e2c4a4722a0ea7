"""What the gates of a composition do: weights by site, expert and task, their entropy, and unused experts.

summarise        gate values -> GateReport         switch_some   switches off the LoRAs that a recipe names
write_report     the files of a report
heatmap_png      a report as a picture: sites by experts (MoLE, Fig. 7)
entropy_png      the entropy over training (Fig. 5)
report_lines     a report as text
as_csv           a report as CSV, one row per task, site and expert
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molecli.config import InspectGatesRecipe
from molecli.errors import UsageError
from molecli.evaluation.figures import MAX_LABELS, figure_of, save_figure, spread
from molecli.files.atomic import write_text
from molecli.files.composition import find_composition
from molecli.files.train_log import read_log
from molecli.mixture.mixture import Mixture, switch

ALL = "all"
# An expert is dead if it gets less than this part of its fair share 1/N.
DEAD_SHARE = 0.1


@dataclass(frozen=True)
class GateReport:
    """Gate values of one composition.

    weights[task][site][expert] is the mean over that task's examples; the task "all" has every example.
    entropy[task][site] is the mean over examples of the gate's entropy, in nats, at most ln N.
    course holds (step, entropy) for each logged training step.
    """

    composition: str
    experts: tuple[str, ...]
    sites: tuple[str, ...]
    tasks: tuple[str, ...]
    examples: dict[str, int]
    weights: dict[str, tuple[tuple[float, ...], ...]]
    entropy: dict[str, tuple[float, ...]]
    course: tuple[tuple[int, float], ...] = ()

    @property
    def max_entropy(self) -> float:
        """Entropy of the uniform gate, ln N."""
        return math.log(len(self.experts))

    @property
    def mean_entropy(self) -> float:
        """Entropy averaged over sites and examples."""
        return sum(self.entropy[ALL]) / len(self.sites)

    def by_expert(self, task: str) -> tuple[float, ...]:
        """The weight of each expert on `task`, averaged over sites."""
        rows = self.weights[task]
        return tuple(sum(row[i] for row in rows) / len(rows) for i in range(len(self.experts)))

    @property
    def dead(self) -> tuple[str, ...]:
        """Experts that get less than a tenth of their fair share at every site, on every task."""
        least = DEAD_SHARE / len(self.experts)
        rows = [row for task in self.weights for row in self.weights[task]]
        return tuple(name for i, name in enumerate(self.experts) if all(row[i] < least for row in rows))

    def document(self) -> dict[str, Any]:
        """The report as JSON stores it."""
        summary = {"max_entropy": self.max_entropy, "mean_entropy": self.mean_entropy, "dead": list(self.dead)}
        return {**asdict(self), **summary, "by_task": {task: self.by_expert(task) for task in self.weights}}

    def lines(self) -> list[str]:
        """The report as text."""
        return report_lines(self)

    def csv(self) -> str:
        """The report as CSV."""
        return as_csv(self)

    def draw(self, path: str | Path) -> Path:
        """The path of the written picture."""
        return heatmap_png(self, path)


def switch_some(recipe: InspectGatesRecipe, mixture: Mixture) -> None:
    """Switches off the LoRAs that the recipe names. Raises: UsageError for an unknown LoRA, or if none is left."""
    switch(mixture, mask=recipe.mask, only=recipe.only)
    if set(recipe.mask) >= set(recipe.only or mixture.names):
        raise UsageError("--mask", "every LoRA is switched off, so no gate is used", "Keep at least one.")


def summarise(
    values: Mapping[str, Mapping[str, Tensor]],
    experts: Sequence[str],
    *,
    composition: str = "",
    course: Sequence[tuple[int, float]] = (),
) -> GateReport:
    """The report on gate values {task: {site: [examples, N]}}."""
    sites = tuple(next(iter(values.values())))
    pooled = {site: torch.cat([gates[site] for gates in values.values()]) for site in sites}
    named = {ALL: pooled, **values}
    return GateReport(
        composition=composition,
        experts=tuple(experts),
        sites=sites,
        tasks=tuple(values),
        examples={task: len(gates[sites[0]]) for task, gates in named.items()},
        weights={task: tuple(tuple(gates[s].mean(0).tolist()) for s in sites) for task, gates in named.items()},
        entropy={task: tuple(float(entropies(gates[s]).mean()) for s in sites) for task, gates in named.items()},
        course=tuple(course),
    )


def entropy_course(composition: str) -> list[tuple[int, float]]:
    """(step, gate entropy) from the train_log.jsonl beside the composition; [] if there is none."""
    records = read_log(find_composition(composition).parent)
    return [(int(record["step"]), record["entropy"]) for record in records if "entropy" in record]


def write_report(report: GateReport, folder: Path) -> None:
    """Writes gates.json, gates.csv and gates.png, and entropy.png if the training was logged."""
    write_text(folder / "gates.json", json.dumps(report.document(), indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "gates.csv", report.csv())
    report.draw(folder / "gates.png")
    if report.course:
        entropy_png(report, folder / "entropy.png")


def as_csv(report: GateReport) -> str:
    """The report as CSV: task, site, expert, weight, entropy of the site's gate."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["task", "site", "expert", "weight", "entropy"])
    for task in report.weights:
        for site, weights, entropy in zip(report.sites, report.weights[task], report.entropy[task], strict=True):
            for expert, weight in zip(report.experts, weights, strict=True):
                rows.writerow([task, site, expert, f"{weight:.6f}", f"{entropy:.6f}"])
    return text.getvalue()


def report_lines(report: GateReport) -> list[str]:
    """The report as text: sites by experts, tasks by experts, entropy and dead experts."""
    head = [*report.experts, "entropy"]
    sites = [[*w, h] for w, h in zip(report.weights[ALL], report.entropy[ALL], strict=True)]
    tasks = [[*report.by_expert(task), sum(report.entropy[task]) / len(report.sites)] for task in report.weights]
    lines = [
        *table_lines("site", head, report.sites, sites),
        "",
        *table_lines("task", head, tuple(report.weights), tasks),
        "",
    ]
    lines.append(f"mean entropy {report.mean_entropy:.2f} of at most {report.max_entropy:.2f}")
    if report.course:
        (first, before), (last, after) = report.course[0], report.course[-1]
        lines.append(f"in training  {before:.2f} at step {first}, {after:.2f} at step {last}")
    lines.append(f"dead experts {', '.join(report.dead) or 'none'}")
    return lines


def table_lines(corner: str, head: Sequence[str], labels: Sequence[str], rows: Sequence[Sequence[float]]) -> list[str]:
    """A table of numbers as lines of text."""
    first = max(len(corner), *map(len, labels))
    widths = [max(len(name), 5) for name in head]
    lines = [f"{corner:{first}}  " + "  ".join(f"{name:>{w}}" for name, w in zip(head, widths, strict=True))]
    for label, row in zip(labels, rows, strict=True):
        lines.append(f"{label:{first}}  " + "  ".join(f"{v:>{w}.2f}" for v, w in zip(row, widths, strict=True)))
    return lines


def entropies(gates: Tensor) -> Tensor:
    """The entropy in nats of each row of [..., N]; a weight of 0 adds 0."""
    return -torch.special.xlogy(gates, gates).sum(-1)


def heatmap_png(report: GateReport, path: str | Path) -> Path:
    """The path of a picture with a panel for all tasks, then one for each task: sites down, experts across."""
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
    """The path of a picture of the gates' entropy over the training steps; a dashed line shows the uniform gate's."""
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


MAX_PANELS = 12
