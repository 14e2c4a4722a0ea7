"""Score tables: methods as columns, tasks as rows, the average last, the best score of a row in bold.

Each table is drawn for a terminal (rich) or as GitHub markdown; `draw` chooses.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from molecli.evaluation.scoring import AVERAGE, Result, main_metric, percent

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_MISSING = "–"


@dataclass(frozen=True)
class ScoreRow:
    """One task, or the average: a score in percent for each column, or None."""

    label: str
    scores: tuple[float | None, ...]

    def cells(self) -> list[tuple[str, bool]]:
        """(text, whether it is the best) for each column; scores with the same text are equally good."""
        texts = [_MISSING if score is None else f"{score:.1f}" for score in self.scores]
        shown = [float(text) for text in texts if text != _MISSING]
        best = max(shown) if len(shown) > 1 else None
        return [(text, text != _MISSING and float(text) == best) for text in texts]


@dataclass(frozen=True)
class TextRow:
    """A row whose cells are words, such as a difference with its interval."""

    label: str
    texts: tuple[str, ...]

    def cells(self) -> list[tuple[str, bool]]:
        """(text, False) for each column: no cell is the best."""
        return [(text, False) for text in self.texts]


@dataclass(frozen=True)
class ScoreTable:
    """Scores as a table; `corner` says what the numbers are."""

    corner: str
    columns: tuple[str, ...]
    rows: tuple[ScoreRow, ...]


@dataclass(frozen=True)
class TextTable:
    """Words as a table."""

    corner: str
    columns: tuple[str, ...]
    rows: tuple[TextRow, ...]


Table = ScoreTable | TextTable


def score_table(methods: Mapping[str, Sequence[Result]], metric: str | None = None) -> ScoreTable:
    """The table of every method's scores, by each task's main metric, or by `metric` for the tasks that have it.

    A task without a result of a method is left out of that method's average.
    """
    by_task = {name: {result.task: result for result in results} for name, results in methods.items()}
    scored = [r for results in methods.values() for r in results if metric is None or metric in r.scores]
    metrics = {result.task: metric or main_metric(result) for result in scored}
    mixed = len(set(metrics.values())) > 1
    rows = []
    for task, name in metrics.items():
        found = [results.get(task) for results in by_task.values()]
        label = f"{task} ({name})" if mixed else task
        rows.append(ScoreRow(label, tuple(None if result is None else percent(result, metric) for result in found)))
    if len(rows) > 1:
        rows.append(ScoreRow(AVERAGE, tuple(_mean([row.scores[i] for row in rows]) for i in range(len(by_task)))))
    corner = "task (%)" if mixed else f"{next(iter(metrics.values()), 'score')} (%)"
    return ScoreTable(corner, tuple(by_task), tuple(rows))


def draw(tables: Sequence[Table], lines: Sequence[str] = ()) -> None:
    """Draws tables and lines on stdout: formatted on a terminal, as markdown in a pipe or a file."""
    for number, table in enumerate(tables):
        if sys.stdout.isatty():
            from rich.console import Console

            Console().print(to_rich(table))
        else:
            sys.stdout.write("\n" * (number > 0) + to_markdown(table))
    if len(tables) > 1 and lines:
        sys.stdout.write("\n")
    for line in lines:
        sys.stdout.write(f"{line}\n")


def to_rich(table: Table, *, title: str | None = None) -> RichTable:
    """The table for a terminal."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    drawn = RichTable(title=title, title_justify="left")
    drawn.add_column(escape(table.corner), overflow="fold")
    for column in table.columns:
        drawn.add_column(escape(column), justify="right", overflow="fold")
    rows: Sequence[ScoreRow | TextRow] = table.rows
    for i, row in enumerate(rows):
        if i and row.label == AVERAGE:
            drawn.add_section()
        drawn.add_row(escape(row.label), *(f"[bold]{text}[/bold]" if best else text for text, best in row.cells()))
    return drawn


def to_markdown(table: Table) -> str:
    """The table as GitHub markdown, ending in a line break."""
    lines = [_line([table.corner, *table.columns]), "|---|" + "---:|" * len(table.columns)]
    rows: Sequence[ScoreRow | TextRow] = table.rows
    for row in rows:
        lines.append(_line([row.label, *(f"**{text}**" if best else text for text, best in row.cells())]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _mean(scores: Sequence[float | None]) -> float | None:
    there = [score for score in scores if score is not None]
    return fmean(there) if there else None
