"""The gates of a study's compositions: their entropy over the training, and the weight of each LoRA (MoLE, Fig. 5).

Contents: Look, read_looks, look_tables, entropy_course_png.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from molecli.evaluation.figures import figure_of, save_figure
from molecli.evaluation.gate_report import ALL
from molecli.evaluation.tables import TextRow, TextTable

LARGEST = "largest mean weight"
_STEPS = 6  # training steps in the table
_MOST = 24  # LoRAs whose weights the table shows


@dataclass(frozen=True)
class Look:
    """The gates of one column, averaged over its compositions (seeds, tasks, sets of LoRAs).

    weights: by LoRA, over all sites and inputs; entropy: in nats, at most `uniform`; course: step -> mean entropy.
    """

    name: str
    weights: Mapping[str, float]
    entropy: float
    uniform: float
    course: Mapping[int, float]
    compositions: int

    @property
    def largest(self) -> float:
        """The weight of the LoRA with the largest weight."""
        return max(self.weights.values())


def read_looks(folder: Path, names: Sequence[str]) -> list[Look]:
    """The gates that the jobs gates/<number>/... in `folder` recorded, for each method and number of LoRAs."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        _, number, *_, method = name.split("/")
        label = method if number == "all" else f"{method}, {number.replace('-', ' ')}"
        groups.setdefault(label, []).append(json.loads((folder / name / "gates.json").read_text(encoding="utf-8")))
    return [_look(label, some) for label, some in groups.items()]


def _look(label: str, found: Sequence[Mapping[str, Any]]) -> Look:
    weights: dict[str, list[float]] = {}
    course: dict[int, list[float]] = {}
    for one in found:
        for expert, weight in zip(one["experts"], one["by_task"][ALL], strict=True):
            weights.setdefault(expert, []).append(weight)
        for step, entropy in one["course"]:
            course.setdefault(step, []).append(entropy)
    return Look(
        label,
        {expert: fmean(some) for expert, some in weights.items()},
        fmean(one["mean_entropy"] for one in found),
        fmean(one["max_entropy"] for one in found),
        {step: fmean(some) for step, some in course.items()},
        len(found),
    )


def look_tables(looks: Sequence[Look]) -> list[TextTable]:
    """Two tables: the entropy over the training, and the mean weight of each LoRA in percent."""
    columns = tuple(look.name for look in looks)
    steps = _spread(sorted({step for look in looks for step in look.course}))
    rows = [TextRow(f"step {step}", tuple(_number(look.course.get(step)) for look in looks)) for step in steps]
    rows.append(TextRow("on the scored inputs", tuple(_number(look.entropy) for look in looks)))
    rows.append(TextRow("uniform", tuple(_number(look.uniform) for look in looks)))
    experts = list(dict.fromkeys(expert for look in looks for expert in look.weights))
    shown = experts if len(experts) <= _MOST else []
    shares = [TextRow(expert, tuple(_percent(look.weights.get(expert)) for look in looks)) for expert in shown]
    shares.append(TextRow(LARGEST, tuple(_percent(look.largest) for look in looks)))
    return [
        TextTable("gate entropy (nats)", columns, tuple(rows)),
        TextTable("mean gate weight (%)", columns, tuple(shares)),
    ]


def entropy_course_png(looks: Sequence[Look], path: Path) -> Path:
    """The path of a picture of the gates' entropy over the training, as a share of the uniform gate's entropy."""
    figure = figure_of(6.0, 3.6)
    axis = figure.subplots()
    for look in looks:
        if look.course and look.uniform:
            axis.plot(list(look.course), [value / look.uniform for value in look.course.values()], label=look.name)
    axis.axhline(1.0, color="grey", linewidth=0.8, linestyle="--", label="uniform")
    axis.set(xlabel="training step", ylabel="mean gate entropy / ln N", ylim=(0, 1.08))
    axis.legend(fontsize=8, loc="lower left")
    return save_figure(figure, path)


def _spread(steps: Sequence[int]) -> list[int]:
    """At most _STEPS steps: the first, the last, and some between."""
    if len(steps) <= _STEPS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (_STEPS - 1))] for i in range(_STEPS)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
