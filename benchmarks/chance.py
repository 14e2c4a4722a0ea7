"""The scores of constant answers on the test rows of a suite's tasks, compared with a study.

    python benchmarks/chance.py --suite bbh --data-dir DATA/bbh --study benchmarks/results/study-unseen.json

`most frequent`: always the test set's most frequent answer, which is the best constant. `most frequent in training`:
that of the training rows; if several are equally frequent, the first. A method above the first has learned more than
the distribution of answers.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from molecli.suites import load_suite, select_tasks


def blind(train: Sequence[str], test: Sequence[str]) -> tuple[float, float]:
    """(most frequent of the test set, most frequent of the training rows), in percent of the test rows."""
    best = Counter(test).most_common(1)[0][1]
    learned = test.count(Counter(train).most_common(1)[0][0])
    return 100 * best / len(test), 100 * learned / len(test)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="bbh")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--methods", default="base,nla,lorahub,soup,gated")
    given = parser.parse_args(argv)
    suite, methods = load_suite(given.suite), given.methods.split(",")
    first = next(iter(json.loads(given.study.read_text("utf-8"))["comparisons"].values()))["comparisons"][0]
    rows: dict[str, list[float]] = {}
    for task in select_tasks(suite, None, given.data_dir):
        train, test = ([row.target for row in suite.load(task, part, given.data_dir)] for part in ("train", "test"))
        rows[task] = [*blind(train, test), *(first["scores"][task][method] for method in methods)]
    heads = ["task (%)", "most frequent", "most frequent in training", *methods]
    print(f"| {' | '.join(heads)} |\n|---|" + "---:|" * (len(heads) - 1))
    for task, values in rows.items():
        print(f"| {task} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    print("| average | " + " | ".join(f"{fmean(column):.1f}" for column in zip(*rows.values(), strict=True)) + " |")
    for name, place in (("most frequent", 0), ("most frequent in training", 1)):
        counts = ", ".join(
            f"{method} {sum(values[2 + i] > values[place] for values in rows.values())}"
            for i, method in enumerate(methods)
        )
        print(f"\ntasks above {name}, of {len(rows)}: {counts}")


if __name__ == "__main__":
    main()
