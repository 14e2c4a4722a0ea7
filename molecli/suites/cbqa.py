"""Closed-book questions: ARC (challenge and easy), Natural Questions (open) and TriviaQA; exact match of any answer.

Split: `train` and `test` of ARC; `train` and, as test, `validation` of Natural Questions and TriviaQA, because the
answers of their tests are not public. For TriviaQA (rc.nocontext) `train` is the first 30,000 rows, as in FLAN. A
single local file is halved by its question.

The prompt lists ARC's options with the letters A, B, ... in their order. Training uses the text of the option, as in
FLAN; "(B) text", "B" and "(B)" are also right, unless another option reads so. The other two have no options. All
answers listed in the dataset are right, including TriviaQA's aliases and their normalised forms.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from molecli.catalog.suites import SUITES
from molecli.errors import UsageError
from molecli.protocols import Example
from molecli.suites._hub import HubSet
from molecli.suites._rows import Row
from molecli.suites._table_suite import TabledSuite


@dataclass(frozen=True)
class Question:
    """The question, the answer to learn, all right answers, and the options."""

    text: str
    target: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()


def _choice(row: Row) -> Question:
    """ARC's fields. Raises: UsageError if the key is not among the labels."""
    choices = row.inside("choices")
    options, labels = choices.texts("text"), choices.texts("label")
    key = row.text("answerKey")
    if key not in labels or len(options) != len(labels):
        raise UsageError(
            row.where, f"the answer {key!r} is not among the options {', '.join(labels)}", "Correct that line."
        )
    right = labels.index(key)
    return Question(row.text("question"), options[right], spellings(options, right), options)


def _open(row: Row) -> Question:
    """Natural Questions' fields; its questions have no question mark."""
    answers = _one_or_more(row, "answer")
    return Question(f"{row.text('question').strip().rstrip('?')}?", answers[0], answers)


def _trivia(row: Row) -> Question:
    """TriviaQA's fields."""
    answer = row.inside("answer")
    value = answer.text("value")
    normalised = (answer.text("normalized_value"),) if answer.fields.get("normalized_value") else ()
    others = (*answer.texts("aliases"), *normalised, *answer.texts("normalized_aliases"))
    return Question(row.text("question"), value, (value, *others))


@dataclass(frozen=True)
class QuestionTask:
    """One task: how its fields are read, its public copy, and room for its longest answer."""

    read: Callable[[Row], Question]
    hub: HubSet
    max_new_tokens: int


TASKS: dict[str, QuestionTask] = {
    "arc_challenge": QuestionTask(_choice, HubSet("allenai/ai2_arc", "ARC-Challenge"), 64),
    "arc_easy": QuestionTask(_choice, HubSet("allenai/ai2_arc", "ARC-Easy"), 64),
    "natural_questions": QuestionTask(_open, HubSet("google-research-datasets/nq_open", test="validation"), 32),
    "trivia_qa": QuestionTask(
        _trivia,
        HubSet("mandarjoshi/trivia_qa", "rc.nocontext", test="validation", stream=True, train_rows=30_000),
        32,
    ),
}


def prompt(question: str, options: Sequence[str] = ()) -> str:
    """The question, followed by the options if there are any."""
    if not options:
        return f"Answer the question.\nQuestion: {question}\nAnswer:"
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))
    return f"Choose the right answer.\nQuestion: {question}\nOptions:\n{listed}\nAnswer:"


def spellings(options: Sequence[str], right: int) -> tuple[str, ...]:
    """The accepted answers for the right option: its text, then with its letter, unless another option reads so."""
    letter, text = string.ascii_uppercase[right], options[right]
    others = {option.strip(string.punctuation + " ").upper() for i, option in enumerate(options) if i != right}
    return (text, *((letter, f"({letter})") if letter not in others else ()), f"({letter}) {text}")


class CbqaSuite(TabledSuite):
    """The questions from `data_dir` or the hub, with the original fields; {"input", "target"} lines are read too."""

    name = "cbqa"
    version = "1"

    hubs: ClassVar[Mapping[str, HubSet]] = {task: row.hub for task, row in TASKS.items()}

    def question(self, task: str, row: Row) -> str:
        """The question."""
        return _question(task, row).text

    def example(self, task: str, row: Row) -> Example:
        """The question with its options, and all right answers."""
        return _example(task, _question(task, row))

    def metrics(self, task: str) -> tuple[str, ...]:
        """Exact match under each normaliser."""
        return SUITES[self.name].metrics

    def max_new_tokens(self, task: str) -> int:
        """Room for the task's longest answer."""
        return TASKS[task].max_new_tokens


def _example(task: str, question: Question) -> Example:
    asked = prompt(question.text.strip(), [option.strip() for option in question.options])
    answers = tuple(dict.fromkeys(answer.strip() for answer in question.answers))
    return Example(task, asked, question.target.strip(), answers)


def _question(task: str, row: Row) -> Question:
    if "input" not in row.fields:
        return TASKS[task].read(row)
    target = row.text("target", "output")
    return Question(row.text("input"), target, (target, *row.texts("references")))


def _one_or_more(row: Row, name: str) -> tuple[str, ...]:
    found = (row.text(name),) if isinstance(row.fields.get(name), str) else row.texts(name)
    if not found:
        raise UsageError(row.where, f"the field {name!r} is missing or empty", "Every line needs it.")
    return found
