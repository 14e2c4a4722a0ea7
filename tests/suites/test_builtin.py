"""The built-in tasks are right, disjoint and the same everywhere; the shipped assets keep their promises."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from molecli.suites._builtin_words import ADJECTIVES, NOUNS, VERBS, rows
from molecli.suites.builtin import JOINT_TASKS, SKILLS, TEST_ROWS, TRAIN_ROWS, BuiltinSuite, skills_of, split_of

SUITE = BuiltinSuite()
BUILTIN = Path(__file__).parents[2] / "molecli" / "builtin"
needs_assets = pytest.mark.skipif(not (BUILTIN / "tiny-t5").exists(), reason="the embedded default is not built")


def sentence_of(prompt: str) -> tuple[str, ...]:
    return tuple(prompt.split(": ")[1].split())


def test_every_spelling_stands_for_one_concept_in_one_language() -> None:
    words = [word for table in (NOUNS, VERBS, ADJECTIVES) for row in rows(table) for word in row]
    assert [word for word, count in Counter(words).items() if count > 1] == []
    assert {len(row) for row in rows(NOUNS) + rows(VERBS)} == {5}
    assert {len(row) for row in rows(ADJECTIVES)} == {4}
    assert len(rows(ADJECTIVES)) % 2 == 0


@pytest.mark.parametrize("task", SUITE.tasks())
def test_a_task_has_its_rows_and_no_duplicates(task: str) -> None:
    for split, count in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        examples = SUITE.load(task, split)
        assert len({example.prompt for example in examples}) == len(examples) == count
        assert {example.task for example in examples} == {task}


def test_no_test_sentence_is_in_the_training_data_of_any_task() -> None:
    seen = {
        split: {sentence_of(e.prompt) for t in SUITE.tasks() for e in SUITE.load(t, split)}
        for split in ("train", "test")
    }
    assert not seen["train"] & seen["test"]
    assert all(split_of(words) == split for split, sentences in seen.items() for words in sentences)


@pytest.mark.parametrize("task", JOINT_TASKS)
def test_the_answer_of_a_joint_task_is_the_composition_of_its_two_skills(task: str) -> None:
    outer, inner = skills_of(task)
    for example in SUITE.load(task, "test"):
        words = sentence_of(example.prompt)
        assert tuple(example.target.split()) == SKILLS[outer](SKILLS[inner](words))
        assert tuple(example.target.split()) not in (SKILLS[outer](words), SKILLS[inner](words), words)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("french", "vieux renard court"),
        ("reverse", "runs fox old"),
        ("opposite", "young fox runs"),
        ("plural", "old foxes run"),
        ("double", "old old fox fox runs runs"),
    ],
)
def test_a_skill_does_what_the_docstring_says(prompt: str, target: str) -> None:
    assert " ".join(SKILLS[prompt](("old", "fox", "runs"))) == target


def test_every_skill_changes_every_sentence() -> None:
    assert all(sentence_of(e.prompt) != tuple(e.target.split()) for t in SUITE.tasks() for e in SUITE.load(t, "test"))


def test_answers_fit_in_the_token_limit() -> None:
    assert all(
        len(e.target.split()) < SUITE.max_new_tokens(t)
        for t in SUITE.tasks()
        for s in ("train", "test")
        for e in SUITE.load(t, s)
    )


def test_the_generated_data_never_change_without_a_new_version() -> None:
    lines = [f"{e.prompt}\t{e.target}\n" for t in SUITE.tasks() for s in ("train", "test") for e in SUITE.load(t, s)]
    assert (SUITE.version, sha256("".join(lines).encode()).hexdigest()[:16]) == ("1", "f39a2817414a2faa")


def test_an_unknown_task_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="dance"):
        SUITE.load("dance", "test")


@needs_assets
def test_the_embedded_default_is_small_and_names_no_path() -> None:
    files = [f for folder in ("tiny-t5", "loras") for f in (BUILTIN / folder).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 8e6
    texts = {f.name: f.read_text() for f in files if f.suffix == ".json"}
    assert [name for name, text in texts.items() if str(Path.home()) in text or '"/' in text] == []
    for name in SKILLS:
        config = json.loads((BUILTIN / "loras" / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "builtin:tiny-t5"
    assert sorted(f.name for f in (BUILTIN / "loras").iterdir()) == sorted(SKILLS)


@needs_assets
@pytest.mark.slow
@pytest.mark.parametrize("skill", list(SKILLS))
def test_a_lora_has_its_skill_and_the_base_has_not(skill: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "tiny-t5")
    base = AutoModelForSeq2SeqLM.from_pretrained(BUILTIN / "tiny-t5")
    examples = SUITE.load(skill, "test")
    inputs = dict(tokenizer([e.prompt for e in examples], return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)

    def share_right(model: torch.nn.Module) -> float:
        output = model.generate(**inputs, max_new_tokens=SUITE.max_new_tokens(skill), do_sample=False)
        said = tokenizer.batch_decode(output, skip_special_tokens=True)
        return sum(a == e.target for a, e in zip(said, examples, strict=True)) / len(examples)

    assert share_right(base) <= 0.05
    assert share_right(PeftModel.from_pretrained(base, BUILTIN / "loras" / skill)) >= 0.97
