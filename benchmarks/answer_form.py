"""How often a method's completions have the form of an answer, and how often these are right.

    python benchmarks/answer_form.py RUN [--only METHOD]... [--tasks-of METHOD]

RUN is a folder that `mole study` wrote, with its study-steps/scores. A completion has the form of an answer if it
equals the answer to some test question of its task; both are normalised as in LoRAHub's scoring of BIG-Bench Hard.
`same`: completions that equal the task's most frequent one (100 for a constant method). Percentages are means over
tasks, with equal weight for each run of a method; `right of these` is right divided by in form, of those means.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from molecli.evaluation.results import RESULTS_FILE
from molecli.evaluation.saved_results import Sample, read_run
from molecli.metrics.exact_match import lorahub_text


class Form(NamedTuple):
    """Percentages of one method's completions on one task."""

    in_form: float
    right: float
    same: float


def form(samples: Sequence[Sample]) -> Form:
    """The percentages for the samples of one task and method, as `mole evaluate` stores them."""
    answers = {lorahub_text(answer) for sample in samples for answer in sample["answers"]}
    said = [lorahub_text(sample["resps"][0][0]) for sample in samples]
    right = [one in map(lorahub_text, sample["answers"]) for one, sample in zip(said, samples, strict=True)]
    most = Counter(said).most_common(1)[0][1]
    return Form(*(100 * count / len(said) for count in (sum(one in answers for one in said), sum(right), most)))


def forms(run: Path) -> dict[str, dict[str, list[Form]]]:
    """method -> task -> the percentages of each of its runs."""
    found: dict[str, dict[str, list[Form]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted((run / "study-steps" / "scores").rglob(RESULTS_FILE)):
        for task, by_method in read_run(str(file)).samples.items():
            for method, samples in by_method.items():
                found[method][task].append(form(samples))
    return found


def rows(found: dict[str, dict[str, list[Form]]], tasks: Sequence[str]) -> Iterator[tuple[str, Form]]:
    """(method, its mean over the tasks) of methods with all tasks, sorted by how often they are right."""
    whole = {name: by for name, by in found.items() if all(task in by for task in tasks)}
    means = {name: mean([mean(by[task]) for task in tasks]) for name, by in whole.items()}
    yield from sorted(means.items(), key=lambda item: -item[1].right)


def mean(some: Sequence[Form]) -> Form:
    """The mean of each column."""
    return Form(*map(fmean, zip(*some, strict=True)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", action="append", default=[], help="these methods; all when not given")
    parser.add_argument("--tasks-of", help="on the tasks that this method has; else on all that any has")
    given = parser.parse_args(argv)
    found = forms(given.run)
    tasks = sorted(found[given.tasks_of] if given.tasks_of else {task for by in found.values() for task in by})
    print(f"| {len(tasks)} tasks (%) | in form | right | right of these | same |\n|---|---:|---:|---:|---:|")
    for method, one in rows(found, tasks):
        if not given.only or method in given.only:
            of_these = f"{100 * one.right / one.in_form:.1f}" if one.in_form else "–"
            print(f"| {method} | {one.in_form:.1f} | {one.right:.1f} | {of_these} | {one.same:.1f} |")


if __name__ == "__main__":
    main()
