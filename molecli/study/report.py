"""The report of a study: every method's scores side by side, which one wins, the curve over the number of LoRAs and the
gain along it, the gates, and the published figures for comparison.

Contents: StudyReport, study_report, curve_of, lines_of, draw_curve, beside.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from molecli.evaluation.compare import CompareReport, chosen_metrics, judged, line_up
from molecli.evaluation.saved_results import Run, joined, read_run
from molecli.evaluation.scoring import AVERAGE
from molecli.evaluation.tables import ScoreRow, ScoreTable, Table, TextRow, TextTable, draw, to_markdown
from molecli.files.atomic import write_text, write_with
from molecli.study.gates import LARGEST, Look, entropy_course_png, look_tables, read_looks
from molecli.study.scaling import Growth, growth_table, growths
from molecli.study.tuning import Choice, choice_table, chosen_on

if TYPE_CHECKING:
    from molecli.config import StudyRecipe

# (folder of a number of LoRAs, name of runs that belong together)
Column = tuple[str, str]
EVERY = "all"  # the only number of a study that names no numbers
SHARED = ("base", "own")  # scored once and shown with every number


@dataclass(frozen=True)
class StudyReport:
    """A comparison for each number of LoRAs, with the texts and the published figures of the recipe.

    failed: a command's name -> why it failed.
    partial: evaluations of some tasks only (not compared) -> how many. missing: incomplete columns -> what is missing.
    recipe: the keys that were written, with flags, so that the figures can be computed again.
    growth: each method's gain from one number of LoRAs to the next.
    """

    title: str
    base: str
    comparisons: Mapping[str, CompareReport]
    published: Mapping[str, Mapping[str, float]]
    source: str
    device: str
    looks: Sequence[Look] = ()
    choices: Sequence[Choice] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    partial: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    growth: Sequence[Growth] = ()

    def document(self) -> dict[str, Any]:
        """The report as JSON stores it."""
        return {
            "title": self.title,
            "base": self.base,
            "device": self.device,
            "versions": dict(next(iter(self.comparisons.values())).runs[0].content.get("libraries", {})),
            "comparisons": {number: report.document() for number, report in self.comparisons.items()},
            **({"growth": [one.document() for one in self.growth]} if len(self.comparisons) > 1 else {}),
            "published": {"source": self.source, "figures": {r: dict(c) for r, c in self.published.items()}},
            "gates": [asdict(look) for look in self.looks],
            "tuned": [asdict(choice) for choice in self.choices],
            "failed": dict(self.failed),
            "partial": dict(self.partial),
            "missing": dict(self.missing),
            "recipe": dict(self.recipe),
        }

    def sections(self) -> list[tuple[str, list[Table], list[str]]]:
        """(heading, tables, lines) of every part."""
        parts = []
        for number, report in self.comparisons.items():
            parts.append(("" if number == EVERY else number.replace("-", " "), report.tables(), report.lines()))
        if len(self.comparisons) > 1:
            parts.append(("Average by the number of LoRAs", *self._by_number()))
        if self.choices:
            parts.append((f"Settings chosen on {chosen_on(self.choices)}", [choice_table(self.choices)], []))
        if self.looks:
            parts.append(("Gates", list(look_tables(self.looks)), [f"Over {_compositions(self.looks)} each."]))
        if self.published:
            lines = [
                f"published: not measured here, but taken from {self.source or 'another work'}",
                f"here: this study, on {self.base}",
            ]
            curve = self.curve() if len(self.comparisons) > 1 else None
            table = beside(self.published, self.comparisons, curve, self.looks)
            parts.append(("Beside the published figures", [table], lines))
        if undone := {**self.missing, **self.partial, **self.failed}:
            parts.append(("Not done", [], [f"{name}: {why}" for name, why in undone.items()]))
        return parts

    def curve(self) -> ScoreTable:
        """The methods' averages, a row for each number of LoRAs."""
        return curve_of({number: _averages(report) for number, report in self.comparisons.items()})

    def _by_number(self) -> tuple[list[Table], list[str]]:
        """(the curve and the table of gains, the lines that explain them)."""
        if not self.growth:
            return [self.curve()], []
        first = next(iter(self.comparisons.values()))
        what = "a method's average at the larger number minus that at the smaller, over the same test examples"
        lines = [f"gain from more LoRAs: {what}", *([first.star] if first.samples else [])]
        return [self.curve(), growth_table(self.growth)], lines

    def show(self) -> None:
        """Draws the tables on stdout."""
        for number, (heading, tables, lines) in enumerate(self.sections()):
            sys.stdout.write("\n" * (number > 0) + (f"## {heading}\n\n" if heading else ""))
            draw(tables)
            sys.stdout.write("".join(["\n", *(f"{line}\n" for line in lines)] if lines else []))

    def markdown(self) -> str:
        """The whole report as markdown."""
        blocks = [f"# {self.title}"] if self.title else []
        for heading, tables, lines in self.sections():
            blocks += [f"## {heading}"] if heading else []
            blocks += [to_markdown(table).strip() for table in tables]
            blocks += ["\n".join(f"- {line}" for line in lines)] if lines else []
        return "\n\n".join(blocks) + "\n"

    def write(self, folder: Path) -> None:
        """Writes study.md and study.json; study.png with several numbers, entropy.png if gates were inspected."""
        write_text(folder / "study.md", self.markdown())
        text = json.dumps(self.document(), indent=1, ensure_ascii=False, allow_nan=False)
        write_text(folder / "study.json", text + "\n")
        if len(self.comparisons) > 1:
            write_with(folder / "study.png", lambda part: draw_curve(self.curve(), part))
        if self.looks:
            entropy_course_png(self.looks, folder / "entropy.png")


def study_report(
    recipe: StudyRecipe,
    folder: Path,
    scored: Sequence[str],
    looked: Sequence[str] = (),
    choices: Sequence[Choice] = (),
    failed: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
) -> StudyReport:
    """The report on the evaluations `scored` in `folder` (scores/<number>/..., scores/base, scores/own/<task>), on the
    gates of the jobs `looked`, on the chosen settings, and on what failed or is missing.

    Raises: UsageError, MismatchError if the evaluations cannot be compared.
    """
    groups: dict[Column, list[Run]] = {}
    for name in scored:
        _, number, *rest = name.split("/")
        groups.setdefault((number, _group(recipe, number, rest)), []).append(_read(recipe, folder / name, rest))
    runs, partial = _whole({key: joined(some) for key, some in groups.items()})
    base = [run for (number, _), run in runs.items() if number == "base"]
    own = [run for (number, _), run in runs.items() if number == "own"]
    found = {}
    for number in dict.fromkeys(number for number, _ in runs if number not in SHARED):
        found[number] = _compared(recipe, base, own, [run for (n, _), run in runs.items() if n == number])
    return StudyReport(
        recipe.title,
        recipe.base.id,
        found,
        recipe.published,
        recipe.source,
        ", ".join(dict.fromkeys(run.content["device"] for run in runs.values() if "device" in run.content)),
        read_looks(folder, looked),
        choices,
        failed or {},
        partial,
        missing or {},
        recipe.model_dump(mode="json", exclude_unset=True, exclude={"output", "published"}),
        growths(found),
    )


def _whole(runs: Mapping[Column, Run]) -> tuple[dict[Column, Run], dict[str, str]]:
    """(the runs with every task, what the others lack): a mean over some tasks is not compared with one over all.

    The column of each LoRA on its own task has only the tasks with a LoRA.
    """
    has = {key: len(run.content["results"]) for key, run in runs.items()}
    most = max((count for (number, _), count in has.items() if number != "own"), default=0)
    kept = {key: run for key, run in runs.items() if has[key] == most or key[0] == "own"}
    left = [(key, run) for key, run in runs.items() if key not in kept]
    partial = {
        f"scores/{'/'.join(key)}": f"on {has[key]} of {most} tasks, {', '.join(run.methods)}" for key, run in left
    }
    return kept, partial


def _group(recipe: StudyRecipe, number: str, rest: Sequence[str]) -> str:
    """The common name of the runs (of one task each) that belong together: the seed, "own", or for pictures the seed
    and the method."""
    if number == "own":
        return number
    if recipe.draws:
        return "/".join(rest[:2])
    # If the method learns on each task, the last part is the task. If it learns nothing, the second part is the method,
    # and a third part can be a setting; its run has the tasks for which the setting was chosen.
    by_task = recipe.leave_out or (recipe.per_task and rest[:1] != ["fixed"])
    return "/".join(rest[:-1] if by_task else rest[:2])


def _read(recipe: StudyRecipe, path: Path, rest: Sequence[str]) -> Run:
    """The run in a folder. A run of pictures names its method after the mode or a folder. Here the method gets the
    column's name, so that runs over other scenes can be joined to it."""
    if not recipe.draws:
        return read_run(str(path))
    column = rest[1]
    run = read_run(f"{column}={path}")
    samples = {task: {column: by.get(run.methods[column], ())} for task, by in run.samples.items()}
    return Run(run.place, run.content, samples, {column: column})


def _compared(recipe: StudyRecipe, base: Sequence[Run], own: Sequence[Run], runs: Sequence[Run]) -> CompareReport:
    """The comparison of all methods on all tasks and on each of the recipe's groups of tasks. If some tasks have no
    LoRA, also on the tasks that have one, together with these LoRAs. The margins are those of the recipe's subject.

    There is a contest for each metric of the recipe, for pictures for every metric; otherwise one by main metrics.
    """
    tasks = list(runs[0].content["results"])
    covered = [task for task in tasks if all(task in run.content["results"] for run in own)]
    samples, seed = recipe.test.bootstrap, recipe.seed
    parts = [([*base, *own, *runs], covered)] if own and covered == tasks else [([*base, *runs], tasks)]
    if own and covered and covered != tasks:
        parts.append(([*base, *own, *runs], covered))
    named = [("" if chosen == tasks else "tasks that have a LoRA", some, chosen) for some, chosen in parts]
    named += [(name, [*base, *runs], list(chosen)) for name, chosen in recipe.groups.items()]
    metrics = recipe.test.metrics
    contests = [
        line_up(some, one, among=name) for name, some, chosen in named for one in chosen_metrics(runs, chosen, metrics)
    ]
    subject = recipe.subject
    judgements = [(one, judged(one, samples=samples, seed=seed, subject=subject)) for one in contests]
    return CompareReport(parts[0][0], judgements, samples, seed)


def _compositions(looks: Sequence[Look]) -> str:
    counts = sorted({look.compositions for look in looks})
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{number} composition{'s' * (number != '1')}"


def _averages(report: CompareReport) -> dict[str, float]:
    contest = report.contests[0][0]
    rows = contest.rows()
    return dict(rows.get(AVERAGE) or next(iter(rows.values())))


def curve_of(averages: Mapping[str, Mapping[str, float]]) -> ScoreTable:
    """A table with a row for each number of LoRAs, from {"8-loras": {method: its average}}."""
    methods = list(dict.fromkeys(name for by in averages.values() for name in by))
    rows = [ScoreRow(n.removesuffix("-loras"), tuple(by.get(m) for m in methods)) for n, by in averages.items()]
    return ScoreTable("LoRAs", tuple(methods), tuple(rows))


def lines_of(curve: ScoreTable) -> dict[str, list[tuple[int, float]]]:
    """{method: its points (row, score)}, sorted by the last score, best first; methods without scores are left out."""
    lines = {
        name: [(x, score) for x, row in enumerate(curve.rows) if (score := row.scores[i]) is not None]
        for i, name in enumerate(curve.columns)
    }
    drawn = [(name, points) for name, points in lines.items() if points]
    return dict(sorted(drawn, key=lambda line: line[1][-1][1], reverse=True))


def draw_curve(curve: ScoreTable, path: Path) -> None:
    """Draws a line for each method over the numbers of LoRAs, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(lines_of(curve).items()):
        marker = "osD"[i // 10 % 3]  # colours repeat after ten lines
        axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    axes.set_xticks(range(len(curve.rows)), [row.label for row in curve.rows])
    axes.set_xlabel("LoRAs composed")
    axes.set_ylabel("average (%)")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, format="png", dpi=150)


# (row, column) -> percent
Figures = dict[tuple[str, str], float]


def beside(
    published: Mapping[str, Mapping[str, float]],
    comparisons: Mapping[str, CompareReport],
    curve: ScoreTable | None,
    looks: Sequence[Look],
) -> TextTable:
    """The published rows and columns. Before each column come the values that were measured here, if there are any.

    `curve`: the averages by the number of LoRAs, if there are several numbers. A measured average over other tasks than
    the published one is not shown.
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
    """Whether the column's averages here and there are over the same tasks: every published row was measured, and all
    measured `tasks` were published. True if only averages were published, because then it cannot be checked."""
    rows = [row for row in published if not _average(row) and row != LARGEST]
    known = all(any(row == task or row.startswith(f"{task} ") for row in rows) for task in tasks)
    return not rows or (known and all((row, column) in here for row in rows))


def _by_row(report: CompareReport) -> Figures:
    first = report.contests[0][0]
    # An average over only some of the tasks cannot be compared.
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
    """The value with `digits` decimals, or without `digits` as it was written."""
    if value is None:
        return "–"
    return str(value) if digits is None else f"{value:.{digits}f}"
