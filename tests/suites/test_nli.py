"""NLI: prompts, splits without shared premises, and the real files where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molecli.errors import UsageError
from molecli.suites._rows import half_of
from molecli.suites.nli import TASKS, NliSuite, prompt

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "nli"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA}")


def write(folder: Path, name: str, rows: list[tuple[str, str, str]]) -> None:
    lines = [json.dumps(dict(zip(("premise", "hypothesis", "label"), row, strict=True))) + "\n" for row in rows]
    (folder / name).write_text("".join(lines), encoding="utf-8")


def test_the_prompt_gives_the_labels_and_both_texts() -> None:
    assert prompt("sick", "It rains.", "It is wet.") == (
        "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.\n"
        "Premise: It rains.\nHypothesis: It is wet.\nAnswer:"
    )
    assert "Answer entailment or not_entailment.\nQuestion: Who?\nSentence: Ada." in prompt("qnli", "Who?", "Ada.")


def test_train_and_dev_files_are_the_splits(tmp_path: Path) -> None:
    write(tmp_path, "rte_train.jsonl", [("p", "h", "entailment")])
    write(tmp_path, "rte_dev.jsonl", [("q", "h", "not_entailment")] * 2)
    suite = NliSuite()
    assert suite.tasks(str(tmp_path)) == ["rte"]
    assert [len(suite.load("rte", split, str(tmp_path))) for split in ("train", "test")] == [1, 2]
    assert suite.load("rte", "test", str(tmp_path))[0].target == "not_entailment"


def test_a_dev_file_alone_is_halved_by_premise(tmp_path: Path) -> None:
    rows = [(f"premise {i}", f"hypothesis {j}", "neutral") for i in range(60) for j in range(3)]
    write(tmp_path, "snli_dev.jsonl", rows)
    train, test = (NliSuite().load("snli", split, str(tmp_path)) for split in ("train", "test"))
    assert len(train) + len(test) == 180
    assert min(len(train), len(test)) > 45

    def premises(examples: list) -> set[str]:
        return {example.prompt.split("\n")[1] for example in examples}

    assert not premises(train) & premises(test)
    assert [e.prompt for e in NliSuite(seed=1).load("snli", "test", str(tmp_path))] != [e.prompt for e in test]


def test_the_split_of_a_premise_is_fixed_for_all_time() -> None:
    assert [half_of(f"premise {i}") for i in range(6)] == ["test", "test", "train", "test", "train", "test"]


def test_a_line_without_its_label_is_named(tmp_path: Path) -> None:
    (tmp_path / "rte_train.jsonl").write_text('{"premise": "p", "hypothesis": "h"}\n', encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        NliSuite().load("rte", "train", str(tmp_path))
    where = f"{tmp_path}/rte_train.jsonl, line 1"
    assert str(caught.value) == f"{where}: the field 'label' is missing. Every line needs it."


def test_a_task_without_a_public_copy_says_so() -> None:
    assert "sick" not in NliSuite().tasks()
    with pytest.raises(UsageError) as caught:
        NliSuite().load("sick", "test")
    assert str(caught.value) == "suite nli: the task 'sick' is not on the hub. Give its files with --data-dir."


@needs_data
@pytest.mark.slow
def test_the_real_files_give_eight_tasks_with_known_labels_in_both_splits() -> None:
    suite = NliSuite()
    tasks = suite.tasks(str(DATA))
    assert len(tasks) == 8
    for task in tasks:
        for split in ("train", "test"):
            examples = suite.load(task, split, str(DATA))
            assert {example.target for example in examples} <= set(TASKS[task].labels), (task, split)
            assert len(examples) >= 38
