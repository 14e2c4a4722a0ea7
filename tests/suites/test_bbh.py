"""BIG-Bench Hard: its prompt, its five training rows, and the real files where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molecli.errors import UsageError
from molecli.suites.bbh import TASKS, BbhSuite

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "bbh"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps({"input": f"question {i}", "target": f"({i})"}) + "\n" for i in range(12)]
    (tmp_path / "navigate.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_five_rows_train_and_the_rest_test(folder: Path) -> None:
    train, test = (BbhSuite().load("navigate", split, str(folder)) for split in ("train", "test"))
    assert [example.target for example in train] == ["(0)", "(1)", "(2)", "(3)", "(4)"]
    assert [example.target for example in test] == [f"({i})" for i in range(5, 12)]


def test_the_prompt_is_question_and_answer(folder: Path) -> None:
    assert BbhSuite().load("navigate", "train", str(folder))[0].prompt == "Q: question 0\nA:"


def test_only_tasks_whose_files_are_there_are_listed(folder: Path) -> None:
    assert BbhSuite().tasks(str(folder)) == ["navigate"]
    assert len(BbhSuite().tasks()) == len(TASKS) == 27


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        BbhSuite().load("snarks", "test", str(folder))
    assert str(caught.value) == f"{folder}/snarks.jsonl: no such file. Check the path."


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA}")
@pytest.mark.slow
def test_the_real_files_give_all_27_tasks() -> None:
    suite = BbhSuite()
    assert suite.tasks(str(DATA)) == list(TASKS)
    for task in TASKS:
        assert len(suite.load(task, "train", str(DATA))) == 5
        assert len(suite.load(task, "test", str(DATA))) >= 90
