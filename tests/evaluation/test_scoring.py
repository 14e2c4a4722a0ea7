"""The scoring core on a stub backbone: order, batches, what part of an output is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from molecli.errors import RunError, UsageError
from molecli.evaluation.scoring import TaskResult, completion, own_lora, score, score_tasks
from molecli.protocols import Example


class Parrot:
    """Answers every prompt with its last word, and remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], int]] = []

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, **_: Any) -> list[str]:
        self.batches.append((list(prompts), max_new_tokens))
        return [f" {prompt.split()[-1]}\nand so on" for prompt in prompts]


def examples(task: str, *prompts: str, target: str = "yes") -> list[Example]:
    return [Example(task, prompt, target) for prompt in prompts]


def run(backbone: Any, tasks: dict[str, list[Example]], **options: Any) -> list[TaskResult]:
    metrics = dict.fromkeys(tasks, ("exact_match", "accuracy"))
    room = {task: 3 + i for i, task in enumerate(tasks)}
    return score_tasks(backbone, tasks, metrics=metrics, max_new_tokens=room, **options)


def test_results_keep_the_order_of_the_examples_though_batches_are_sorted_by_length() -> None:
    parrot = Parrot()
    prompts = ("say no", "please do say yes", "say yes", "would you say no")
    (result,) = run(parrot, {"talk": examples("talk", *prompts)}, batch_size=3)
    assert [len(batch) for batch, _ in parrot.batches] == [3, 1]
    assert parrot.batches[0][0][0] == "please do say yes"
    assert result.completions == ("no", "yes", "yes", "no")
    assert result.outputs[0] == " no\nand so on"
    assert result.scores["exact_match"] == (0.0, 1.0, 1.0, 0.0)
    assert result.values == {"exact_match": 0.5, "accuracy": 0.5}
    assert (result.metric, result.percent, result.percents) == ("exact_match", 50.0, [0.0, 100.0, 100.0, 0.0])


def test_every_task_has_its_own_room_and_progress_counts_all_examples() -> None:
    parrot, seen = Parrot(), []
    tasks = {"one": examples("one", "a", "b", "c"), "two": examples("two", "d")}
    run(parrot, tasks, batch_size=2, progress=lambda *step: seen.append(step), label="gated")
    assert [room for _, room in parrot.batches] == [3, 3, 4]
    assert seen == [("gated", 2, 4), ("gated", 3, 4), ("gated", 4, 4)]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_changes_no_score(batch_size: int) -> None:
    tasks = {"talk": examples("talk", "say no", "please do say yes", "say yes")}
    (result,) = run(Parrot(), tasks, batch_size=batch_size)
    assert result.scores["exact_match"] == (0.0, 1.0, 1.0)


class Small(Parrot):
    """Has memory for `room` prompts at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, **more: Any) -> list[str]:
        if len(prompts) > self.room:
            raise torch.OutOfMemoryError
        return super().generate(prompts, max_new_tokens=max_new_tokens, **more)


def test_what_does_not_fit_in_memory_at_once_is_completed_in_pieces() -> None:
    tasks, small = {"talk": examples("talk", *(f"say {n}" for n in range(7)))}, Small(2)
    with pytest.warns(UserWarning, match=r"7 examples at once do not fit in memory: completing 3 at once$"):
        (result,) = run(small, tasks, batch_size=7)
    assert result.completions == tuple(str(n) for n in range(7))
    assert [len(batch) for batch, _ in small.batches] == [1] * 7


def test_one_example_that_does_not_fit_in_memory_is_an_error() -> None:
    with pytest.raises(RunError) as caught:
        run(Small(0), {"talk": examples("talk", "say yes")})
    what = "one example does not fit in memory. Write --dtype bfloat16, or end other programs that use the device."
    assert str(caught.value) == f"evaluate: {what}"


def test_another_error_is_not_taken_for_memory() -> None:
    class Broken(Parrot):
        def generate(self, prompts: Sequence[str], *, max_new_tokens: int, **_: Any) -> list[str]:
            raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        run(Broken(), {"talk": examples("talk", "say yes", "say no")})


def test_an_unknown_metric_stops_before_anything_is_generated() -> None:
    parrot = Parrot()
    with pytest.raises(UsageError) as caught:
        score_tasks(parrot, {"t": examples("t", "a")}, metrics={"t": ["blue"]}, max_new_tokens={"t": 1})  # type: ignore[arg-type]
    assert str(caught.value) == "metrics: no metric is called 'blue'. Did you mean 'bleu'?"
    assert parrot.batches == []


def test_a_task_without_examples_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        run(Parrot(), {"one": examples("one", "a"), "two": []})
    assert str(caught.value) == "task two: there are no examples to score. Check its file and the split."


@pytest.mark.parametrize(
    ("output", "answers", "scored"),
    [
        (" yes \nQ: next", ("yes",), "yes"),
        ("\n\nyes\n", ("yes",), "yes"),
        ("one\ntwo\n", ("one\ntwo",), "one\ntwo"),
        ("", ("yes",), ""),
    ],
)
def test_the_first_line_is_scored_unless_an_answer_has_several(output: str, answers: Any, scored: str) -> None:
    assert completion(output, answers) == scored


def test_bleu_in_percent_is_corpus_bleu_and_not_multiplied() -> None:
    result = score("t", examples("t", "p", target="the cat sat on the mat"), ["the cat sat on the mat"], ["bleu"])
    assert result.percent == pytest.approx(100.0)


def result(task: str, *scores: float) -> TaskResult:
    shown = tuple(examples(task, *("p" for _ in scores)))
    return TaskResult(
        task, shown, ("",) * len(scores), ("",) * len(scores), {"f1": scores}, {"f1": sum(scores) / len(scores)}
    )


def test_own_lora_takes_each_task_from_its_namesake() -> None:
    methods = {"sum": [result("sum", 1.0), result("diff", 0.0)], "diff": [result("sum", 0.2), result("diff", 0.9)]}
    own = own_lora(methods)
    assert own is not None
    assert [(r.task, r.values["f1"]) for r in own] == [("sum", 1.0), ("diff", 0.9)]
    assert own_lora(methods, {"sum": "diff"})[0].values["f1"] == 0.2  # type: ignore[index]


def test_own_lora_needs_a_namesake_for_every_task() -> None:
    assert own_lora({"sum": [result("sum", 1.0), result("negation", 0.0)]}) is None
    assert own_lora({}) is None
