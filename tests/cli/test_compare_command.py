"""`mole evaluate --compare`: streams, files, exit codes, and the flags that have nothing to do there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molecli.evaluation.results import document, write
from molecli.evaluation.scoring import score
from molecli.protocols import Example

Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """`saved("a", base=0, gated=9)` -> a folder of results: so many of ten answers right by each method."""

    def save(name: str, *, rows: int = 10, **right: int) -> Path:
        examples = [Example("sum", f"{i}+{i}", str(2 * i)) for i in range(rows)]
        methods = {
            method: [
                score("sum", examples, [e.target if i < n else "?" for i, e in enumerate(examples)], ["exact_match"])
            ]
            for method, n in right.items()
        }
        content = document(methods, list(methods)[-1], suite=("jsonl", "1"), comparisons=[])
        write(tmp_path / name, content, methods)
        return tmp_path / name

    return save


def test_the_tables_go_to_stdout_and_nothing_is_written(mole: Callable[..., Any], saved: Saved, tmp_path: Path) -> None:
    one, two = saved("one", base=1), saved("two", linear=8, gated=10)
    ran = mole("evaluate", "--compare", one, two)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[0] == "| exact_match (%) | base | linear | gated |"
    assert ran.out.splitlines()[2] == "| sum | 10.0 | 80.0 | **100.0** |"
    assert "| sum | gated | +90.0 [" in ran.out
    assert ran.out.endswith("exact_match: gated wins on sum; clearly ahead of base; no clear difference from linear\n")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_json_is_the_only_thing_on_stdout(mole: Callable[..., Any], saved: Saved) -> None:
    ran = mole("evaluate", saved("one", base=1, gated=9), "--compare", "--json", "--bootstrap", "50", "--seed", "3")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert (found["bootstrap"], found["seed"]) == (50, 3)
    assert found["comparisons"][0]["verdicts"]["sum"]["winner"] == "gated"


def test_output_holds_the_tables_and_the_document(mole: Callable[..., Any], saved: Saved, tmp_path: Path) -> None:
    one, out = saved("one", base=1, gated=9), tmp_path / "out"
    ran = mole("evaluate", "--compare", f"mine={one}", one, "--output", out)
    assert (ran.code, ran.err) == (0, f"Written: {out}\n")
    assert (out / "comparison.md").read_text("utf-8") == ran.out
    assert json.loads((out / "comparison.json").read_text("utf-8"))["runs"][0]["methods"] == ["mine"]
    again = mole("evaluate", "--compare", one, "--output", out)
    assert (again.code, again.out) == (2, "")
    assert again.err == (
        f"mole: {out}: the output folder is not empty. Choose another --output, or write --overwrite to replace it.\n"
    )
    assert mole("evaluate", "--compare", one, "--output", out, "--overwrite").code == 0


def test_what_does_not_belong_together_is_code_3_and_writes_nothing(
    mole: Callable[..., Any], saved: Saved, tmp_path: Path
) -> None:
    one, two = saved("one", base=1), saved("two", rows=9, gated=9)
    ran = mole("evaluate", "--compare", one, two, "--output", tmp_path / "out")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith(f"mole: {two}: its examples of the task 'sum' are not those of {one} (9 here, 10 there")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("--suite", "bbh"), "--suite"),
        (("--limit", "2"), "--limit"),
        (("--base", "x"), "--base"),
        (("--files", "a.jsonl"), "--files"),
        (("--dry-run",), "--dry-run"),
        (("--resume",), "--resume"),
        (("--set", "seed=1"), "--set"),
    ],
)
def test_flags_of_an_evaluation_are_refused(
    mole: Callable[..., Any], saved: Saved, arguments: tuple[str, ...], flag: str
) -> None:
    ran = mole("evaluate", "--compare", saved("one", base=1), *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"mole: {flag}: it has no effect with --compare, which evaluates nothing. "
        "Leave it out: --tasks, --metrics, --bootstrap, --seed, --output apply.\n"
    )


def test_without_results_there_is_nothing_to_compare(mole: Callable[..., Any]) -> None:
    ran = mole("evaluate", "--compare")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "mole: --compare: no results are named. Write folders that mole evaluate wrote.\n"
