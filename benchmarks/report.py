"""Writes docs/results.md and its plots from the results of studies, without any manual editing.

    python benchmarks/report.py RUN... --results benchmarks/results --page docs/results.md

Copies study.json and study.md of every RUN (a folder that `mole study` wrote) to --results as study-<name>.*, and
writes the page from all results there. Without a RUN it only writes the page again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molecli.evaluation.tables import to_markdown
from molecli.study.report import curve_of, draw_curve
from molecli.study.scaling import Growth, growth_table
from molecli.study.tuning import Choice, choice_table, chosen_on

HEAD = """# Results

Written by `benchmarks/report.py` from `benchmarks/results/study-*.json`; do not edit. Each table is a `mole study`, on
the machine named; scores are of the test sets, intervals a paired bootstrap over examples. `Least tried` and `most
tried` mark a setting at the edge of those it was chosen from: one beyond it might score better. Rows called published
hold the paper's own figures on its own base and data, not measured here.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    given = parser.parse_args(argv)
    for run in given.runs:
        take(run, given.results)
    studies = sorted(given.results.glob("study-*.json"))
    given.page.write_text(page(studies, given.page.parent), "utf-8")
    print(f"{given.page}: {len(studies)} studies")


def take(run: Path, results: Path) -> None:
    """Copies the results of a study, under the name of its folder."""
    results.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".md"):
        shutil.copy(run / f"study{suffix}", results / f"study-{run.resolve().name}{suffix}")


def page(studies: Sequence[Path], folder: Path) -> str:
    """The page of these results; plots of averages are written beside it."""
    parts = [HEAD]
    for path in studies:
        found = json.loads(path.read_text("utf-8"))
        plot = folder / f"{path.stem}.png"
        draw(found, plot)
        made = f"Base {found['base']}, on {found['device']}; {libraries(found)}."
        whole = os.path.relpath(path.with_suffix(".md"), folder)
        title = found["title"] or path.stem
        parts.append(f"## {title}\n\n{made} By task, with every margin: [{path.stem}.md]({whole}).\n")
        parts.append(f"![Averages of {title}]({plot.name})\n")
        if len(found["comparisons"]) > 1:
            curve = folder / f"{path.stem}-curve.png"
            numbers = found["comparisons"].items()
            draw_curve(curve_of({n: average(report["comparisons"][0]) for n, report in numbers}), curve)
            parts.append(f"![Averages by the number of LoRAs]({curve.name})\n")
        if found.get("growth"):  # older results have none
            parts.append("Averages at more LoRAs minus those at fewer, * where the interval excludes zero:\n")
            parts.append(to_markdown(growth_table([Growth.read(one) for one in found["growth"]])))
        parts += [table for number in found["comparisons"] for table in ranked(found, number)]
        if found["tuned"]:
            parts.append(f"Chosen on {chosen(found)}.\n")
        if found.get("missing"):  # older results do not say
            parts.append(f"Missing: {'; '.join(f'{name} ({what})' for name, what in found['missing'].items())}.\n")
    return "\n".join(parts)


def ranked(found: Mapping[str, Any], number: str) -> list[str]:
    """For every comparison a table of the methods, best first, each with the margin by which the study's subject
    (otherwise the winner) is ahead of it."""
    tables = []
    for one in found["comparisons"][number]["comparisons"]:
        row = "average" if "average" in one["scores"] else next(iter(one["scores"]))
        scores, verdict = one["scores"][row], one["verdicts"][row]
        margins = {margin["second"]: margin for margin in verdict["margins"]}
        names = sorted(scores, key=lambda name: -scores[name])
        metric = ", ".join(sorted(set(one["metrics"].values())))
        first = verdict.get("subject") or verdict["winner"]
        heads = [f"{metric}: {len(one['metrics'])} tasks", "average (%)", "runs", f"{first} is ahead by"]
        about = [one.get("among", ""), "" if number == "all" else number.replace("-", " ")]
        above = ", ".join(part for part in about if part)
        lines = [f"{above}:\n"] * bool(above) + [f"| {' | '.join(heads)} |", "|---|---:|---:|---:|"]
        for name in names:
            margin = ahead(margins[name]) if name in margins else "–"
            lines.append(f"| {name} | {scores[name]:.1f} | {one['methods'][name]['runs']} | {margin} |")
        tables.append("\n".join(lines) + "\n")
    return tables


def ahead(margin: Mapping[str, Any]) -> str:
    """`+3.1 [+1.2, +5.0] *`, with a star if the interval excludes zero."""
    if margin["low"] is None:
        return f"{margin['difference']:+.1f}"
    star = " *" * bool(margin["significant"])
    return f"{margin['difference']:+.1f} [{margin['low']:+.1f}, {margin['high']:+.1f}]{star}"


def chosen(found: Mapping[str, Any]) -> str:
    """The examples used for the choice, and for every method its chosen setting, with its edge."""
    choices = [Choice(**one) for one in found["tuned"]]
    rows = choice_table(choices).rows
    return f"{chosen_on(choices)}: " + "; ".join(f"{row.label}: {row.texts[0]}" for row in rows)


def libraries(found: Mapping[str, Any]) -> str:
    """The versions of the main libraries."""
    return ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "peft"))


def average(comparison: Mapping[str, Any]) -> dict[str, float]:
    """method -> its average over the tasks, or its score on the only one."""
    scores: dict[str, dict[str, float]] = comparison["scores"]
    return scores.get("average") or next(iter(scores.values()))


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Bars of every method's average, with the spread of its repetitions, for the last number of LoRAs."""
    from matplotlib.figure import Figure

    number, report = list(found["comparisons"].items())[-1]
    scores = average(report["comparisons"][0])
    names = sorted(scores, key=lambda name: scores[name])
    runs = report["comparisons"][0]["by_run"]
    spread = [[abs(scores[n] - f(runs.get(n, {"": scores[n]}).values())) for n in names] for f in (min, max)]
    figure = Figure(figsize=(7, 0.8 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [scores[name] for name in names], xerr=spread, capsize=2)
    axes.margins(y=0.02)
    axes.set_xlabel("average (%)" + ("" if number == "all" else f", {number.replace('-', ' ')}"))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
