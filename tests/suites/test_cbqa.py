"""Closed-book questions: what is asked, and every spelling of the answer that is right, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from molecli.errors import UsageError
from molecli.metrics import load_metric
from molecli.protocols import Example
from molecli.suites.cbqa import CbqaSuite, spellings

ARC: dict[str, Any] = {
    "question": "Which of these is a mammal?",
    "choices": {"text": ["trout", "whale", "eagle"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
NQ: dict[str, Any] = {"question": "who sang yesterday", "answer": ["The Beatles", "Paul McCartney"]}
TRIVIA: dict[str, Any] = {
    "question": "Which city is the capital of Peru?",
    "answer": {
        "value": "Lima",
        "aliases": ["Lima, Peru", "Lima"],
        "normalized_value": "lima",
        "normalized_aliases": ["lima peru", "lima"],
    },
}


def load(folder: Path, task: str, row: dict[str, Any]) -> Example:
    (folder / "test").mkdir(exist_ok=True)
    (folder / "test" / f"{task}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (example,) = CbqaSuite().load(task, "test", str(folder))
    return example


def test_arc_shows_its_options_by_letter_and_learns_the_text(tmp_path: Path) -> None:
    example = load(tmp_path, "arc_easy", ARC)
    assert example.prompt == (
        "Choose the right answer.\nQuestion: Which of these is a mammal?\n"
        "Options:\n(A) trout\n(B) whale\n(C) eagle\nAnswer:"
    )
    assert (example.target, example.answers) == ("whale", ("whale", "B", "(B)", "(B) whale"))
    said = ["whale", "B", "(B)", "(B) whale", "trout", "A", "2", ""]
    assert load_metric("exact_match")(said, [example.answers] * 8) == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_letter_that_another_option_reads_as_is_not_an_answer() -> None:
    # The right one is (A): its letter is what the second option says.
    assert spellings(["blood type O", "type A", "(a)"], 0) == ("blood type O", "(A) blood type O")
    assert spellings(["4", "2"], 1) == ("2", "B", "(B)", "(B) 2")


def test_an_open_question_stands_alone_with_its_mark_and_any_answer_is_right(tmp_path: Path) -> None:
    example = load(tmp_path, "natural_questions", NQ)
    assert example.prompt == "Answer the question.\nQuestion: who sang yesterday?\nAnswer:"
    assert (example.target, example.answers) == ("The Beatles", ("The Beatles", "Paul McCartney"))
    assert load(tmp_path, "natural_questions", {"question": "who?", "answer": "me"}).answers == ("me",)


def test_the_aliases_of_trivia_qa_are_right_as_written_and_normalised(tmp_path: Path) -> None:
    example = load(tmp_path, "trivia_qa", TRIVIA)
    assert (example.target, example.answers) == ("Lima", ("Lima", "Lima, Peru", "lima", "lima peru"))


def test_input_and_target_are_read_too(tmp_path: Path) -> None:
    example = load(tmp_path, "trivia_qa", {"input": "Who?", "target": "Ada", "references": ["Ada Lovelace"]})
    assert (example.prompt, example.answers) == (
        "Answer the question.\nQuestion: Who?\nAnswer:",
        ("Ada", "Ada Lovelace"),
    )


def test_every_task_is_scored_by_exact_match_under_three_normalisers() -> None:
    suite = CbqaSuite()
    assert suite.tasks() == ["arc_challenge", "arc_easy", "natural_questions", "trivia_qa"]
    for task in suite.tasks():
        assert suite.metrics(task) == ("exact_match", "exact_match_lm_eval", "exact_match_lorahub")


def test_a_lone_file_is_halved_by_its_question(tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}", "answer": [str(i)]} for i in range(60)]
    (tmp_path / "natural_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = (CbqaSuite().load("natural_questions", split, str(tmp_path)) for split in ("train", "test"))
    assert len(train) + len(test) == 60
    assert min(len(train), len(test)) > 15
    assert not {example.prompt for example in train} & {example.prompt for example in test}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "arc_easy",
            {**ARC, "answerKey": "D"},
            ": the answer 'D' is not among the options 1, 2, 3. Correct that line.",
        ),
        ("arc_easy", {"question": "q"}, ": the field 'choices' is missing. Every line needs it."),
        ("natural_questions", {"question": "q"}, ": the field 'answer' is missing or empty. Every line needs it."),
        ("trivia_qa", {"question": "q", "answer": {}}, ", answer: the field 'value' is missing. Every line needs it."),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, task, row)
    assert str(caught.value) == f"{tmp_path}/test/{task}.jsonl, line 1{message}"


def test_the_hub_is_asked_for_the_sets_own_names_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    rows = {"allenai/ai2_arc": ARC, "google-research-datasets/nq_open": NQ, "mandarjoshi/trivia_qa": TRIVIA}

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool = False) -> Any:
        calls.append((path, name, split, streaming))
        return datasets.Dataset.from_list([rows[path]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    suite = CbqaSuite()
    assert [suite.load(task, "test")[0].target for task in suite.tasks()] == ["whale", "whale", "The Beatles", "Lima"]
    assert calls == [
        ("allenai/ai2_arc", "ARC-Challenge", "test", False),
        ("allenai/ai2_arc", "ARC-Easy", "test", False),
        ("google-research-datasets/nq_open", None, "validation", False),
        ("mandarjoshi/trivia_qa", "rc.nocontext", "validation", True),
    ]
