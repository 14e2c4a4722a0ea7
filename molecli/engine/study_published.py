"""A paper's figures beside those of a study, each marked as what it is.

A published row is called after a task, "average", or a number of LoRAs; where several metrics are scored, the metric
stands behind it ("common_gen rougeL"), and "average of all" is over tasks and metrics; "largest mean weight" is of the
gates. Its columns are the study's. Contents: beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from molecli.engine.compare import CompareReport
from molecli.engine.study_gates import LARGEST, Look
from molecli.engine.tables import AVERAGE, ScoreTable, TextRow, TextTable

# (row, column) -> percent
Figures = dict[tuple[str, str], float]


def beside(
    published: Mapping[str, Mapping[str, float]],
    comparisons: Mapping[str, CompareReport],
    curve: ScoreTable | None,
    looks: Sequence[Look],
) -> TextTable:
    """The published rows and columns, before each column what was measured here, where it was.

    `curve`: the averages by the number of LoRAs, where there are several numbers. An average over other tasks than the
    published one is not shown.
    """
    here: Figures = {(LARGEST, look.name): 100 * look.largest for look in looks}
    here |= _by_row(next(iter(comparisons.values()))) if curve is None else _by_number(curve)
    tasks = [] if curve is not None else list(next(iter(comparisons.values())).contests[0][0].metrics)
    here = {key: value for key, value in here.items() if not _average(key[0]) or _alike(published, here, key[1], tasks)}
    columns = list(dict.fromkeys(column for row in published.values() for column in row))
    measured = [column for column in columns if any((row, column) in here for row in published)]
    heads, cells = [], {row: list[str]() for row in published}
    for column in columns:
        heads += [f"{column}, here"] * (column in measured) + [f"{column}, published"]
        for row, texts in cells.items():
            texts += [_text(here.get((row, column)), 1)] * (column in measured)
            texts.append(_text(published[row].get(column)))
    return TextTable("here and published", tuple(heads), tuple(TextRow(row, tuple(t)) for row, t in cells.items()))


def _average(row: str) -> bool:
    return row == AVERAGE or row.startswith(f"{AVERAGE} ")


def _alike(published: Mapping[str, Mapping[str, float]], here: Figures, column: str, tasks: Sequence[str]) -> bool:
    """Whether the column's averages are over the same here and there: every row that was published was measured, and of
    the `tasks` measured none is beyond them. Where averages alone were published nobody can tell."""
    rows = [row for row in published if not _average(row) and row != LARGEST]
    known = all(any(row == task or row.startswith(f"{task} ") for row in rows) for task in tasks)
    return not rows or (known and all((row, column) in here for row in rows))


def _by_row(report: CompareReport) -> Figures:
    first = report.contests[0][0]
    # An average over some of the tasks alone is another number.
    whole = [contest for contest, _ in report.contests if set(contest.metrics) == set(first.metrics)]
    found: Figures = {}
    for contest, _ in report.contests:
        for row, scores in contest.rows().items():
            metric = contest.label if row == AVERAGE else contest.metrics[row]
            for name, score in scores.items() if row != AVERAGE or contest in whole else ():
                found.setdefault((row, name), score)
                found.setdefault((f"{row} {metric}", name), score)
    for name in first.methods:
        averages = [found.get((f"{AVERAGE} {contest.label}", name)) for contest in whole]
        if there := [average for average in averages if average is not None]:
            found[f"{AVERAGE} of all", name] = fmean(there)
    return found


def _by_number(curve: ScoreTable) -> Figures:
    found: Figures = {}
    for i, name in enumerate(curve.columns):
        scores = [(row.label, score) for row in curve.rows if (score := row.scores[i]) is not None]
        for label, score in scores:
            found[label, name] = score
        if len(scores) == len(curve.rows):
            found[AVERAGE, name] = fmean(score for _, score in scores)
    return found


def _text(value: float | None, digits: int | None = None) -> str:
    """The value with so many digits; without a number of them as it was written."""
    if value is None:
        return "–"
    return str(value) if digits is None else f"{value:.{digits}f}"
