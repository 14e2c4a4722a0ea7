"""docs/results.md and its plots from studies' results: nothing in it is typed by hand.

    python benchmarks/report.py RUN... --results benchmarks/results --page docs/results.md

Takes study.json, study.md and study.png of every RUN (a folder that `mole study` wrote) into --results as
study-<name>.*, and writes the page of all that lie there. Without a RUN it only writes the page anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = """# Results

Written by `benchmarks/report.py` from `benchmarks/results/study-*.json`; do not edit. Each table is a `mole study`, on
the machine named; scores are of the test sets, intervals a paired bootstrap over examples. What is called published is
the paper's own figure on its own base and data, not measured here.
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
    """Copy what a study found, under the name of its folder."""
    results.mkdir(parents=True, exist_ok=True)
    for file in sorted(run.glob("study.*")):
        shutil.copy(file, results / f"study-{run.resolve().name}{file.suffix}")


def page(studies: Sequence[Path], folder: Path) -> str:
    """The page of these results; plots of averages are written beside it."""
    parts = [HEAD]
    for path in studies:
        found = json.loads(path.read_text("utf-8"))
        plot = folder / f"{path.stem}.png"
        draw(found, plot)
        body = path.with_suffix(".md").read_text("utf-8").replace("\n## ", "\n### ").removeprefix("# ")
        title, _, rest = body.partition("\n")
        made = f"Base {found['base']}, on {found['device']}; {libraries(found)}."
        parts.append(f"## {title}\n\n{made}\n\n![Averages of {title}]({plot.name})\n{rest}")
        if path.with_suffix(".png").is_file():
            curve = folder / f"{path.stem}-curve.png"
            shutil.copy(path.with_suffix(".png"), curve)
            parts.append(f"![Averages by the number of LoRAs]({curve.name})\n")
    return "\n".join(parts)


def libraries(found: Mapping[str, Any]) -> str:
    """The versions that a reader would ask for."""
    return ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "peft"))


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Bars of every method's average, with the spread of its repetitions, for the last number of LoRAs."""
    from matplotlib.figure import Figure

    number, report = list(found["comparisons"].items())[-1]
    scores = report["comparisons"][0]["scores"]
    average = scores.get("average") or next(iter(scores.values()))
    names = sorted(average, key=lambda name: average[name])
    runs = report["comparisons"][0]["by_run"]
    spread = [[abs(average[n] - f(runs.get(n, {"": average[n]}).values())) for n in names] for f in (min, max)]
    figure = Figure(figsize=(7, 0.8 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [average[name] for name in names], xerr=spread, capsize=2)
    axes.set_xlabel("average (%)" + ("" if number == "all" else f", {number.replace('-', ' ')}"))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
