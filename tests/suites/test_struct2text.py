"""Structure to text: data written out as FLAN does, and every reference right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from molecli.errors import UsageError
from molecli.metrics import load_metric
from molecli.protocols import Example
from molecli.suites.struct2text import TASKS, Struct2TextSuite, prompt

ROWS: dict[str, dict[str, Any]] = {
    "common_gen": {"concepts": ["field", "look", "stand"], "target": "He stands in the field.", "references": []},
    "dart": {
        "tripleset": [["Mars Hill College", "JOINED", "1973"], ["[TABLECONTEXT]", "[TITLE]", "A school"]],
        "target": "It joined in 1973.",
    },
    "e2e_nlg": {"meaning_representation": "name[The Eagle], eatType[pub]", "target": "The Eagle is a pub."},
    "web_nlg": {
        "input": ["Aarhus_Airport | cityServed | Aarhus", "Aarhus | country | Denmark"],
        "target": "Aarhus Airport serves Aarhus in Denmark.",
    },
}
WRITTEN = {
    "common_gen": "field, look, stand",
    "dart": "Mars Hill College JOINED 1973; A school",
    "e2e_nlg": "name = The Eagle, eatType = pub",
    "web_nlg": "Aarhus Airport, cityServed, Aarhus; Aarhus, country, Denmark",
}


def load(folder: Path, task: str, *rows: dict[str, Any], split: Any = "test") -> list[Example]:
    path = folder / split / f"{task}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Struct2TextSuite().load(task, split, str(folder))


@pytest.mark.parametrize("task", list(TASKS))
def test_the_data_are_written_out_as_flan_does(tmp_path: Path, task: str) -> None:
    (example,) = load(tmp_path, task, ROWS[task])
    assert example.prompt == prompt(task, WRITTEN[task])
    assert WRITTEN[task] in example.prompt
    assert example.target == ROWS[task]["target"]


@pytest.mark.parametrize("task", list(TASKS))
def test_plain_text_is_read_too(tmp_path: Path, task: str) -> None:
    (example,) = load(tmp_path, task, {"input": WRITTEN[task], "target": "x", "references": ["y"]})
    assert (example.prompt, example.answers) == (prompt(task, WRITTEN[task]), ("x", "y"))


def test_every_reference_is_right_under_every_rouge(tmp_path: Path) -> None:
    row = {**ROWS["common_gen"], "references": ["He stands in the field.", "Look at the field."]}
    (example,) = load(tmp_path, "common_gen", row)
    assert example.answers == ("He stands in the field.", "Look at the field.")
    for metric in Struct2TextSuite().metrics("common_gen"):
        assert load_metric(metric)(["Look at the field."], [example.answers]) == [1.0]


def test_rows_of_one_input_are_one_example_of_the_test_and_several_of_the_training(tmp_path: Path) -> None:
    rows = [{**ROWS["e2e_nlg"], "target": text} for text in ("a", "b", "a")]
    other = {"meaning_representation": "name[Alimentum]", "target": "c"}
    test = load(tmp_path, "e2e_nlg", rows[0], other, *rows[1:])
    assert [(example.target, example.answers) for example in test] == [("a", ("a", "b")), ("c", ("c",))]
    train = load(tmp_path, "e2e_nlg", rows[0], other, *rows[1:], split="train")
    assert [example.target for example in train] == ["a", "c", "b", "a"]


def test_a_lone_file_is_halved_by_its_input(tmp_path: Path) -> None:
    lines = [{"concepts": ["a", str(i)], "target": f"{j}"} for i in range(40) for j in range(2)]
    (tmp_path / "common_gen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    suite = Struct2TextSuite()
    assert suite.tasks(str(tmp_path)) == ["common_gen"]
    train, test = (suite.load("common_gen", split, str(tmp_path)) for split in ("train", "test"))
    assert not {example.prompt for example in train} & {example.prompt for example in test}
    assert len(train) + 2 * len(test) == 80
    assert {example.answers for example in test} == {("0", "1")}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("dart", {"target": "x"}, "the field 'tripleset' is missing. Every line needs it."),
        ("common_gen", {"concepts": [], "target": "x"}, "the field 'concepts' is empty. Leave that line out."),
        (
            "dart",
            {"tripleset": ["a b c"], "target": "x"},
            'the field \'tripleset\' is not a list of triples. Write [["subject", "relation", "object"], ...].',
        ),
        ("web_nlg", {"input": [1], "target": "x"}, 'the field \'input\' is not a list of texts. Write ["...", "..."].'),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, task, row)
    assert str(caught.value) == f"{tmp_path}/test/{task}.jsonl, line 1: {message}"


def test_the_hub_is_asked_for_the_parquet_copy_of_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, *, data_files: dict[str, str], split: str) -> datasets.Dataset:
        calls.append((path, data_files, split))
        return datasets.Dataset.from_list([{**ROWS["web_nlg"], "references": ["Aarhus has an airport."]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = Struct2TextSuite().load("web_nlg", "test")
    assert example.answers == (ROWS["web_nlg"]["target"], "Aarhus has an airport.")
    place = "hf://datasets/GEM/gem@refs%2Fconvert%2Fparquet/web_nlg_en/validation/*.parquet"
    assert calls == [("parquet", {"validation": place}, "validation")]
