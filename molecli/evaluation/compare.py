"""`mole evaluate --compare`: the methods of several results side by side, which one wins, and how clearly.

Contest        the scores of every method by one metric, its runs pooled     line_up    runs -> Contest
Verdict        which method wins a task, or on average, and by how much      judged     Contest -> Verdicts
run_compare    paths -> CompareReport: the whole command

Methods are paired by example: the question and its answers, or the scene, its LoRAs and the picture's seed. If several
runs have the same method, they are repetitions of it (for example with other training seeds). Each example counts with
the mean of its repetitions, and a resample draws examples with all their repetitions. So the interval is about other
examples with these repetitions; `by_run` shows how much the repetitions differ. Runs of the same methods that have no
task in common are parts of one run. Runs of pictures can have different seeds: then a method's pictures are those of
all its runs, and every method needs the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from molecli.catalog.metrics import metric_row
from molecli.errors import MismatchError, UsageError, suggestion
from molecli.evaluation.saved_results import (
    AGAIN,
    Key,
    Run,
    Sample,
    check_examples,
    check_settings,
    check_tasks,
    check_versions,
    counts,
    read_run,
    whole_runs,
)
from molecli.evaluation.scoring import AVERAGE, OWN_LORA, scored_samples
from molecli.evaluation.tables import ScoreRow, ScoreTable, Table, TextRow, TextTable, draw, to_markdown
from molecli.files.atomic import write_text
from molecli.functional.bootstrap import Scored, central, resampled_scores

LEVEL = 0.95


@dataclass(frozen=True)
class Contest:
    """Every method's pooled score on every task: scores[task][method], by the task's metric in `metrics`.

    among: a name for these tasks, if they are only some of the tasks.
    """

    metrics: Mapping[str, str]
    methods: Mapping[str, int]
    scores: Mapping[str, Mapping[str, Scored]]
    by_run: Mapping[str, Mapping[str, float]]
    among: str = ""

    @property
    def label(self) -> str | None:
        """The metric, if all tasks have the same one."""
        names = set(self.metrics.values())
        return names.pop() if len(names) == 1 else None

    def rows(self) -> dict[str, dict[str, float]]:
        """Scores in percent: task -> method -> score; if there are several tasks, also for "average"."""
        rows = {task: {name: one.score for name, one in by.items()} for task, by in self.scores.items()}
        if len(rows) > 1:
            rows[AVERAGE] = {name: fmean(row[name] for row in rows.values()) for name in self.methods}
        return rows

    def sign(self, row: str) -> int:
        """1 if higher scores are better in this row of `rows`, -1 if lower ones are."""
        metric = next(iter(self.metrics.values())) if row == AVERAGE else self.metrics[row]
        return 1 if metric_row(metric).direction == "higher" else -1

    @property
    def examples(self) -> int:
        """The number of different examples, over all tasks."""
        return sum(next(iter(by.values())).rows.shape[1] for by in self.scores.values())


@dataclass(frozen=True)
class Margin:
    """One method's score minus that of `second`, in points, with its interval; significant: it excludes zero.

    The interval is None if nothing was resampled.
    """

    second: str
    difference: float
    low: float | None = None
    high: float | None = None
    significant: bool | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.difference:+.1f}"
        return f"{self.difference:+.1f} [{self.low:+.1f}, {self.high:+.1f}]{' *' * bool(self.significant)}"


@dataclass(frozen=True)
class Verdict:
    """The winner of a task, or on average; the methods `tied` with it; and one method's margins to all others.

    Each task's own LoRA cannot win, but has a margin too. subject: the method whose margins these are; "" for the
    winner's.
    """

    winner: str
    tied: tuple[str, ...]
    margins: tuple[Margin, ...]
    subject: str = ""

    @property
    def winners(self) -> tuple[str, ...]:
        """The winner and the methods with the same score."""
        return (self.winner, *self.tied)


def line_up(runs: Sequence[Run], metrics: Mapping[str, str], *, among: str = "") -> Contest:
    """Every method of the runs, pooled, on the tasks of `metrics` (task -> metric), which `among` names.

    Raises: MismatchError if the runs do not have the same tasks, examples, metrics and versions.
    """
    check_tasks(runs, metrics)
    for run in runs:
        for task, metric in metrics.items():
            check_versions(runs[0], run, task, metric)
    holders: dict[str, list[Run]] = {}
    for run in runs:
        for method in run.methods:
            holders.setdefault(method, []).append(run)
    for method, some in holders.items():
        for run in some[1:]:
            check_settings(method, some[0], run)
    scores = {task: _pooled(task, metric, runs, holders) for task, metric in metrics.items()}
    by_run = {
        method: {run.place: _alone(run, method, metrics) for run in some}
        for method, some in holders.items()
        if len(some) > 1
    }
    return Contest(metrics, {method: len(some) for method, some in holders.items()}, scores, by_run, among)


def _pooled(task: str, metric: str, runs: Sequence[Run], holders: Mapping[str, Sequence[Run]]) -> dict[str, Scored]:
    """Each method's score on one task, all over the same examples in the same order."""
    keyed = {method: [run.keyed(task, method) for run in some] for method, some in holders.items()}
    first = next(iter(keyed.values()))[0]
    for method, some in holders.items():
        for run, samples in zip(some, keyed[method], strict=True):
            check_examples(task, runs[0], run, (first, samples))
            if not all(isinstance(sample.get(metric), (int, float)) for sample in samples.values()):
                raise MismatchError(run.place, f"a sample of the task {task!r} has no {metric}", AGAIN)
    order = list(dict.fromkeys(key for samples in next(iter(keyed.values())) for key in samples))
    for method, found in keyed.items():
        theirs = {key for samples in found for key in samples}
        if theirs != set(order):
            what = f"{method!r} and {next(iter(keyed))!r} were not drawn from the same seeds"
            remedy = "Compare runs of the same seeds and --images."
            raise MismatchError(f"task {task}", f"{what} ({counts(len(theirs), len(order))})", remedy)
    return {method: _scored(some, order, metric) for method, some in keyed.items()}


def _scored(runs: Sequence[Mapping[Key, Sample]], order: Sequence[Key], metric: str) -> Scored:
    if all(len(run) == len(order) for run in runs):
        return scored_samples([[run[key] for key in order] for run in runs], metric)
    # Pictures of several seeds: each counts with the mean of the runs that drew it.
    means = [{metric: fmean(run[key][metric] for run in runs if key in run)} for key in order]
    return scored_samples([means], metric)


def _alone(run: Run, method: str, metrics: Mapping[str, str]) -> float:
    """A method's score in one run: its average over the tasks, in percent."""
    return fmean(
        scored_samples([list(run.keyed(task, method).values())], metric).score for task, metric in metrics.items()
    )


def judged(contest: Contest, *, samples: int, seed: int, subject: str = "") -> dict[str, Verdict]:
    """The verdict on each task; if there are several tasks, also on "average".

    The margins are those of the method `subject`. If it is "" or has no score, they are those of each row's winner.
    """
    rows = contest.rows()
    tasks = list(contest.scores)
    draws: dict[str, Tensor] = {}
    if samples:
        for method in contest.methods:
            drawn = resampled_scores([contest.scores[task][method] for task in tasks], seed=seed, samples=samples)
            draws[method] = drawn
    subject = subject if subject in contest.methods else ""
    return {row: _verdict(row, scores, contest, draws, subject) for row, scores in rows.items()}


def _verdict(
    row: str, scores: Mapping[str, float], contest: Contest, draws: Mapping[str, Tensor], subject: str
) -> Verdict:
    tasks, sign = list(contest.scores), contest.sign(row)
    # Each task's own LoRA is a reference and cannot win: it is chosen with knowledge of the task.
    contenders = [method for method in scores if method != OWN_LORA] or list(scores)
    winner = max(contenders, key=lambda method: sign * scores[method])
    tied = tuple(one for one in contenders if one != winner and abs(scores[winner] - scores[one]) < 1e-9)
    first = subject or winner

    def margin(method: str) -> Margin:
        difference = scores[first] - scores[method]
        if not draws:
            return Margin(method, difference)
        drawn = draws[first] - draws[method]
        found = central(difference, drawn.mean(dim=0) if row == AVERAGE else drawn[tasks.index(row)], level=LEVEL)
        return Margin(method, difference, found.low, found.high, found.excludes_zero)

    return Verdict(winner, tied, tuple(margin(method) for method in scores if method != first), subject)


class CompareReport:
    """Contests by metric and their verdicts, as tables, as lines and as a JSON document."""

    def __init__(
        self, runs: Sequence[Run], contests: Sequence[tuple[Contest, Mapping[str, Verdict]]], samples: int, seed: int
    ) -> None:
        self.runs, self.contests, self.samples, self.seed = runs, contests, samples, seed

    def document(self) -> dict[str, Any]:
        """The report as JSON stores it: scores in percent, differences in percentage points."""
        return {
            "runs": [
                {"place": run.place, "methods": list(run.methods), "suite": run.content.get("suite")}
                for run in self.runs
            ],
            "level": LEVEL,
            "bootstrap": self.samples,
            "seed": self.seed,
            "comparisons": [_document(contest, verdicts) for contest, verdicts in self.contests],
        }

    def tables(self) -> list[Table]:
        """For each metric the scores and, if there are several methods, the margins of the winners or the subject."""
        tables: list[Table] = []
        for contest, verdicts in self.contests:
            tables.append(_score_table(contest))
            if len(contest.methods) > 1:
                tables.append(_margin_table(contest, verdicts))
        return tables

    @property
    def star(self) -> str:
        """What a star after a difference means, and how its interval was computed."""
        examples = self.contests[0][0].examples
        how = f"paired bootstrap, {self.samples} resamples of {examples} examples, seed {self.seed}"
        return f"* the {100 * LEVEL:.0f}% interval of the difference excludes zero ({how})"

    def lines(self) -> list[str]:
        """The lines below the tables: how the intervals were computed, and which method wins overall."""
        first = self.contests[0][0]
        repeated = _repeated(first)
        lines = [f"Each score is over {repeated} runs."] if repeated > 1 else []
        if len(first.methods) > 1:
            lines += [self.star] * bool(self.samples)
            lines += [_conclusion(contest, verdicts) for contest, verdicts in self.contests]
        return lines

    def show(self) -> None:
        """Draws the tables on stdout, and the lines below them."""
        draw(self.tables(), self.lines())

    def write(self, folder: str | Path) -> None:
        """Writes comparison.md and comparison.json; neither file is ever incomplete."""
        text = "\n".join([*map(to_markdown, self.tables()), *self.lines()]) + "\n"
        write_text(Path(folder) / "comparison.md", text)
        document = json.dumps(self.document(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(Path(folder) / "comparison.json", document + "\n")


def _document(contest: Contest, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    return {
        **({"among": contest.among} if contest.among else {}),
        "metrics": dict(contest.metrics),
        "examples": {task: next(iter(by.values())).rows.shape[1] for task, by in contest.scores.items()},
        "methods": {method: {"runs": count} for method, count in contest.methods.items()},
        "scores": contest.rows(),
        "by_run": {method: dict(runs) for method, runs in contest.by_run.items()},
        "verdicts": {row: _plain(verdict) for row, verdict in verdicts.items()},
    }


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {key: value for key, value in asdict(verdict).items() if key != "subject" or value}


def _repeated(contest: Contest) -> int:
    """The number of runs of each method; 0 if methods have different numbers."""
    counts = set(contest.methods.values())
    return counts.pop() if len(counts) == 1 else 0


def _titles(contest: Contest) -> dict[str, str]:
    alike = _repeated(contest)
    return {n: n if alike or count == 1 else f"{n} ({count} runs)" for n, count in contest.methods.items()}


def _among(contest: Contest) -> str:
    return f", {contest.among}" if contest.among else ""


def _row_label(contest: Contest, row: str) -> str:
    return row if contest.label or row == AVERAGE else f"{row} ({contest.metrics[row]})"


def _score_table(contest: Contest) -> ScoreTable:
    corner = (f"{contest.label} (%)" if contest.label else "task (%)") + _among(contest)
    rows = [ScoreRow(_row_label(contest, row), tuple(scores.values())) for row, scores in contest.rows().items()]
    return ScoreTable(corner, tuple(_titles(contest).values()), tuple(rows))


def _margin_table(contest: Contest, verdicts: Mapping[str, Verdict]) -> TextTable:
    titles = _titles(contest)
    rows = []
    for row, verdict in verdicts.items():
        cells = {margin.second: str(margin) for margin in verdict.margins}
        winners = " = ".join(verdict.winners)
        rows.append(TextRow(_row_label(contest, row), (winners, *(cells.get(name, "–") for name in titles))))
    first = next(iter(verdicts.values())).subject or "winner"
    corner = f"{first} − other, {contest.label or 'main metric'}{_among(contest)}"
    return TextTable(corner, ("winner", *titles.values()), tuple(rows))


def _conclusion(contest: Contest, verdicts: Mapping[str, Verdict]) -> str:
    row, verdict = list(verdicts.items())[-1]
    where = f"on average over {len(contest.scores)} tasks{_among(contest)}" if row == AVERAGE else f"on {row}"
    winners = " and ".join(verdict.winners)
    said = f"{contest.label or 'main metric'}: {winners} {'win alike' if verdict.tied else 'wins'} {where}"
    own = [one for one in verdict.margins if one.second == OWN_LORA]
    alike = verdict.winners if (verdict.subject or verdict.winner) in verdict.winners else ()
    others = [one for one in verdict.margins if one.second not in (*alike, OWN_LORA)]
    apart = [one for one in others if one.significant]
    groups = {"clearly ahead of": apart}
    if verdict.subject:  # unlike a winner, a subject can be behind other methods
        ahead = [one for one in apart if contest.sign(row) * one.difference > 0]
        groups = {"ahead of": ahead, "behind": [one for one in apart if one not in ahead]}
    groups["no clear difference from"] = [one for one in others if one.significant is False]
    parts = [f"{how} {', '.join(one.second for one in some)}" for how, some in groups.items() if some]
    parts += [f"minus each task's own LoRA {str(one).rstrip(' *')}" for one in own]
    of = f"{verdict.subject} " * bool(verdict.subject)
    return f"{said}; {of}{'; '.join(parts)}" if parts else said


def run_compare(
    targets: Sequence[str],
    *,
    tasks: Iterable[str] | None = None,
    metrics: Sequence[str] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> CompareReport:
    """The report on the results in `targets`, each PATH or NAME=PATH.

    tasks: those to compare, otherwise all. metrics: one table for each, otherwise the tasks' main metrics (for pictures
    all metrics). Raises: UsageError, MismatchError.
    """
    if not targets:
        raise UsageError("--compare", "no results are named", "Write folders that mole evaluate wrote.")
    for name in metrics or ():
        metric_row(name)
    read = [read_run(target) for target in targets]
    runs = whole_runs(read)
    known = list(dict.fromkeys(task for run in runs for task in run.content["results"]))
    for task in tasks or ():
        if task not in known:
            raise UsageError("--tasks", f"no task is called {task!r}", suggestion(task, known))
    wanted = list(dict.fromkeys(tasks or known))
    contests = [line_up(runs, chosen) for chosen in chosen_metrics(runs, wanted, metrics)]
    return CompareReport(
        read, [(contest, judged(contest, samples=samples, seed=seed)) for contest in contests], samples, seed
    )


def chosen_metrics(runs: Sequence[Run], tasks: Sequence[str], metrics: Sequence[str] | None) -> list[dict[str, str]]:
    """{task: metric} for each table: one per metric in `metrics`; by default the main ones, and for pictures all."""
    holders = {task: next(run for run in runs if task in run.content["results"]) for task in tasks}
    if metrics is None and not runs[0].pictures:
        return [{task: run.scores(task)[0] for task, run in holders.items()}]
    names = metrics or list(dict.fromkeys(name for task, run in holders.items() for name in run.scores(task)))
    tables = {name: [task for task, run in holders.items() if name in run.scores(task)] for name in names}
    for name, some in tables.items():
        if not some:
            there = list(dict.fromkeys(metric for task, run in holders.items() for metric in run.scores(task)))
            raise UsageError("--metrics", f"no task is scored by {name}", f"Write some of: {', '.join(there)}.")
    return [dict.fromkeys(some, name) for name, some in tables.items()]
