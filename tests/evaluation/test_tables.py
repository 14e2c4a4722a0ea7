"""Score tables: the same numbers for terminal and README, the best of a row in bold, the average last."""

from __future__ import annotations

import io

from rich.console import Console

from molecli.evaluation.scoring import TaskResult
from molecli.evaluation.tables import score_table, to_markdown, to_rich
from molecli.protocols import Example


def result(task: str, value: float, metric: str = "exact_match") -> TaskResult:
    return TaskResult(task, (Example(task, "p", "t"),), ("o",), ("o",), {metric: (value,)}, {metric: value})


METHODS = {
    "base": [result("sum", 0.0), result("a|b", 0.125)],
    "gated": [result("sum", 0.9), result("a|b", 0.125)],
}


def test_markdown_is_exactly_this() -> None:
    assert to_markdown(score_table(METHODS)) == (
        "| exact_match (%) | base | gated |\n"
        "|---|---:|---:|\n"
        "| sum | 0.0 | **90.0** |\n"
        "| a\\|b | **12.5** | **12.5** |\n"
        "| average | 6.2 | **51.2** |\n"
    )


def test_rows_of_different_metrics_name_theirs_and_bleu_is_not_scaled_twice() -> None:
    text = to_markdown(score_table({"base": [result("sum", 0.5), result("talk", 31.8, "bleu")]}))
    assert "| task (%) | base |" in text
    assert "| sum (exact_match) | 50.0 |" in text
    assert "| talk (bleu) | 31.8 |" in text


def test_one_method_has_no_best_and_one_task_no_average() -> None:
    text = to_markdown(score_table({"base": [result("sum", 0.5)]}))
    assert "**" not in text
    assert "average" not in text


def test_a_task_that_a_method_lacks_is_a_dash_and_stays_out_of_its_average() -> None:
    text = to_markdown(score_table({**METHODS, "half": [result("sum", 0.8)]}))
    assert "| a\\|b | **12.5** | **12.5** | – |" in text
    assert "| average | 6.2 | 51.2 | **80.0** |" in text


def test_the_terminal_shows_the_same_numbers_and_markup_in_names_is_harmless() -> None:
    methods = {"[red]": METHODS["base"], "gated": METHODS["gated"]}
    stream = io.StringIO()
    Console(file=stream, width=80).print(to_rich(score_table(methods), title="ab"))
    shown = stream.getvalue()
    for text in ("[red]", "gated", "90.0", "12.5", "51.2", "average"):
        assert text in shown
