"""Instruction induction: every task can be told from its prompt, and accepts what its file accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molecli.metrics import load_metric
from molecli.protocols import Example
from molecli.suites.instruction_induction import TASKS, InstructionInductionSuite, prompt

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "instruction_induction"


def load(folder: Path, task: str, row: dict[str, Any]) -> Example:
    (folder / "test").mkdir(exist_ok=True)
    (folder / "test" / f"{task}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (example,) = InstructionInductionSuite().load(task, "test", str(folder))
    return example


def test_tasks_with_the_same_input_have_different_prompts() -> None:
    assert len({prompt(task, "place") for task in TASKS}) == len(TASKS) == 22
    assert prompt("first_word_letter", "place") == "Write the first letter of the word.\nInput: place\nOutput:"


def test_every_possible_translation_is_right(tmp_path: Path) -> None:
    row = {"input": "party", "output": "Partei", "possible_translations": ["Fest", "Partei"]}
    example = load(tmp_path, "translation_en-de", row)
    assert (example.target, example.answers) == ("Partei", ("Partei", "Fest"))


def test_every_common_concept_is_right_and_the_items_are_the_input(tmp_path: Path) -> None:
    row = {"concept": "go up.", "items": ["lifts", "balloons"], "all_common_concepts": ["rise.", "go up."]}
    example = load(tmp_path, "common_concept", row)
    assert example.answers == ("go up.", "rise.")
    assert "Input: lifts, balloons\n" in example.prompt


def test_animals_are_right_in_any_order(tmp_path: Path) -> None:
    example = load(tmp_path, "taxonomy_animal", {"input": "cow, boots, bird", "output": "cow, bird"})
    main = InstructionInductionSuite().metrics("taxonomy_animal")[0]
    assert load_metric(main)(["bird, cow", "bird", "bird, boots, cow"], [example.answers] * 3) == [1.0, 0.0, 0.0]


def test_the_cause_stands_first_for_some_pairs_and_second_for_others(tmp_path: Path) -> None:
    examples = [
        load(tmp_path, "cause_and_effect", {"cause": f"It rained {i}.", "effect": f"It was wet {i}."})
        for i in range(20)
    ]
    assert [example.target for example in examples] == [f"It rained {i}." for i in range(20)]
    first = [f"Sentence 1: {example.target}" in example.prompt for example in examples]
    assert 4 < sum(first) < 16


def test_blanks_around_inputs_and_answers_are_stripped(tmp_path: Path) -> None:
    example = load(tmp_path, "informal_to_formal", {"input": "Hi. ", "output": "Good day. "})
    assert example.target == "Good day."
    assert "Input: Hi.\n" in example.prompt


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA}")
@pytest.mark.slow
def test_the_real_files_give_22_tasks_whose_targets_score_full_marks() -> None:
    suite = InstructionInductionSuite()
    assert suite.tasks(str(DATA)) == list(TASKS)
    for task in TASKS:
        test = suite.load(task, "test", str(DATA))
        assert len(suite.load(task, "train", str(DATA))) >= 15
        for metric in suite.metrics(task):
            assert set(load_metric(metric)([e.target for e in test], [e.answers for e in test])) == {1.0}, task
