"""Score tables: methods as columns, tasks as rows, the average last, the best of a row in bold.

One table, two renderings: for a terminal (rich) and for a README (GitHub markdown).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from molecli.engine.scoring import Result, main_metric, percent

if TYPE_CHECKING:
    from rich.table import Table

AVERAGE = "average"
_MISSING = "–"


@dataclass(frozen=True)
class Row:
    """One task, or the average: a score in percent by column, None where there is none."""

    label: str
    scores: tuple[float | None, ...]

    def cells(self) -> list[tuple[str, bool]]:
        """(text, whether it is the best) by column; scores that print alike are equally good."""
        texts = [_MISSING if score is None else f"{score:.1f}" for score in self.scores]
        shown = [float(text) for text in texts if text != _MISSING]
        best = max(shown) if len(shown) > 1 else None
        return [(text, text != _MISSING and float(text) == best) for text in texts]


@dataclass(frozen=True)
class ScoreTable:
    """Scores ready to be drawn; `corner` says what the numbers are."""

    corner: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def score_table(methods: Mapping[str, Sequence[Result]], metric: str | None = None) -> ScoreTable:
    """The table of the scores of every method, by each task's main metric or by `metric`, where a task has that one.

    A task that a method lacks is left out of that method's average.
    """
    by_task = {name: {result.task: result for result in results} for name, results in methods.items()}
    scored = [r for results in methods.values() for r in results if metric is None or metric in r.scores]
    metrics = {result.task: metric or main_metric(result) for result in scored}
    mixed = len(set(metrics.values())) > 1
    rows = []
    for task, name in metrics.items():
        found = [results.get(task) for results in by_task.values()]
        label = f"{task} ({name})" if mixed else task
        rows.append(Row(label, tuple(None if result is None else percent(result, metric) for result in found)))
    if len(rows) > 1:
        rows.append(Row(AVERAGE, tuple(_mean([row.scores[i] for row in rows]) for i in range(len(by_task)))))
    corner = "task (%)" if mixed else f"{next(iter(metrics.values()), 'score')} (%)"
    return ScoreTable(corner, tuple(by_task), tuple(rows))


def to_rich(table: ScoreTable, *, title: str | None = None) -> Table:
    """The table for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    drawn.add_column(escape(table.corner), overflow="fold")
    for column in table.columns:
        drawn.add_column(escape(column), justify="right", overflow="fold")
    for i, row in enumerate(table.rows):
        if i and row.label == AVERAGE:
            drawn.add_section()
        drawn.add_row(escape(row.label), *(f"[bold]{text}[/bold]" if best else text for text, best in row.cells()))
    return drawn


def to_markdown(table: ScoreTable) -> str:
    """The table as GitHub markdown, a line break at its end."""
    lines = [_line([table.corner, *table.columns]), "|---|" + "---:|" * len(table.columns)]
    for row in table.rows:
        lines.append(_line([row.label, *(f"**{text}**" if best else text for text, best in row.cells())]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _mean(scores: Sequence[float | None]) -> float | None:
    there = [score for score in scores if score is not None]
    return fmean(there) if there else None
