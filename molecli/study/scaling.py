"""Whether a method gets better or worse from one number of LoRAs to the next, and whether that is significant.

Growth    one method, from one number to the next larger    growth_table    a table of them, for the report
growths   the comparisons of a study -> all Growths

The two numbers are compared as if they were two methods. So each example is paired with itself, whatever the order in
the evaluations, and each number counts with the mean of its repetitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from molecli.evaluation.compare import CompareReport, Margin, judged, line_up
from molecli.evaluation.tables import TextRow, TextTable


@dataclass(frozen=True)
class Growth:
    """A method's average at a `number` of LoRAs ("24-loras") minus that at the next smaller number (the margin's
    `second`), in points."""

    method: str
    number: str
    margin: Margin

    @property
    def step(self) -> str:
        """`8 → 24`."""
        return " → ".join(str(_count(number)) for number in (self.margin.second, self.number))

    def document(self) -> dict[str, Any]:
        """The growth as JSON stores it: method, from, to, difference, low, high, significant."""
        margin = asdict(self.margin)
        return {"method": self.method, "from": margin.pop("second"), "to": self.number, **margin}

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Growth:
        """The growth that `document` returned."""
        found = {key: document[key] for key in ("difference", "low", "high", "significant")}
        return cls(document["method"], document["to"], Margin(document["from"], **found))


def growths(comparisons: Mapping[str, CompareReport]) -> list[Growth]:
    """Each method's growth from each number of LoRAs ("8-loras") to the next larger, if both have the method. It uses
    the first contest, with the same resampling.

    Left out are methods with the same runs at both numbers, such as the base, and averages over different tasks.
    Raises: MismatchError if the two were not scored on the same examples.
    """
    if len(comparisons) < 2:
        return []
    methods = dict.fromkeys(method for report in comparisons.values() for method in report.contests[0][0].methods)
    steps = list(pairwise(sorted(comparisons, key=_count)))
    found = (_growth(method, fewer, more, comparisons) for method in methods for fewer, more in steps)
    return [growth for growth in found if growth is not None]


def _growth(method: str, fewer: str, more: str, comparisons: Mapping[str, CompareReport]) -> Growth | None:
    runs = {n: [run for run in comparisons[n].runs if method in run.methods] for n in (fewer, more)}
    here, there = (comparisons[n].contests[0][0].metrics for n in (more, fewer))
    shared = {run.place for run in runs[fewer]} & {run.place for run in runs[more]}
    if shared or here != there or not all(runs.values()):
        return None
    named = [replace(run, methods={n: run.methods[method]}) for n, some in runs.items() for run in some]
    report = comparisons[more]
    verdicts = judged(line_up(named, here), samples=report.samples, seed=report.seed, subject=more)
    (margin,) = list(verdicts.values())[-1].margins  # of the average, or of the only task
    return Growth(method, more, margin)


def growth_table(found: Sequence[Growth]) -> TextTable:
    """A row for each method, a column for each step from one number to the next."""
    cells = {(growth.method, growth.step): str(growth.margin) for growth in found}
    ordered = sorted(found, key=lambda growth: _count(growth.number))
    steps = tuple(dict.fromkeys(growth.step for growth in ordered))
    rows = [
        TextRow(method, tuple(cells.get((method, step), "–") for step in steps))
        for method in dict.fromkeys(growth.method for growth in found)
    ]
    return TextTable("gain from more LoRAs", steps, tuple(rows))


def _count(number: str) -> int:
    return int(number.removesuffix("-loras"))
