"""Translation: six directions, WMT's nested rows, and no pair on both sides of a lone file in either direction."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from molecli.errors import UsageError
from molecli.suites.translation import TASKS, TRAIN_ROWS, TranslationSuite, prompt


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"translation": {"en": f"The cat {i}.", "fr": f"Le chat {i}."}} for i in range(count)]


def test_there_are_six_directions_each_with_its_languages_in_the_prompt() -> None:
    assert TranslationSuite().tasks() == [
        "wmt14_en-fr", "wmt14_fr-en", "wmt16_en-de", "wmt16_de-en", "wmt16_en-ro", "wmt16_ro-en",
    ]  # fmt: skip
    assert prompt("wmt16_ro-en", "Bună.") == "Translate Romanian to English.\nRomanian: Bună.\nEnglish:"
    assert len({prompt(task, "x") for task in TASKS}) == 6


def test_both_directions_read_the_same_nested_pair(tmp_path: Path) -> None:
    for task in ("wmt14_en-fr", "wmt14_fr-en"):
        write(tmp_path / "test" / f"{task}.jsonl", pairs(1))
    suite = TranslationSuite()
    there, back = (suite.load(task, "test", str(tmp_path))[0] for task in ("wmt14_en-fr", "wmt14_fr-en"))
    assert (there.prompt, there.target) == (prompt("wmt14_en-fr", "The cat 0."), "Le chat 0.")
    assert (back.prompt, back.target) == (prompt("wmt14_fr-en", "Le chat 0."), "The cat 0.")


def test_the_pair_alone_and_input_and_target_are_read_too(tmp_path: Path) -> None:
    rows = [{"en": "Hi", "de": "Hallo"}, {"input": "Hi", "target": "Hallo", "references": ["Hi", "Servus"]}]
    write(tmp_path / "test" / "wmt16_en-de.jsonl", rows)
    one, two = TranslationSuite().load("wmt16_en-de", "test", str(tmp_path))
    assert one.prompt == two.prompt
    assert (one.answers, two.answers) == (("Hallo",), ("Hallo", "Hi", "Servus"))


def test_a_lone_file_is_divided_alike_in_both_directions(tmp_path: Path) -> None:
    for task in ("wmt14_en-fr", "wmt14_fr-en"):
        write(tmp_path / f"{task}.jsonl", pairs(80))
    suite = TranslationSuite()
    train = {example.target for example in suite.load("wmt14_fr-en", "train", str(tmp_path))}
    test = {example.target for example in suite.load("wmt14_fr-en", "test", str(tmp_path))}
    asked = {example.prompt for example in suite.load("wmt14_en-fr", "test", str(tmp_path))}
    assert not train & test
    assert len(train | test) == 80
    assert asked == {prompt("wmt14_en-fr", english) for english in test}


def test_with_a_file_for_one_split_the_other_is_missing_and_not_taken_from_it(tmp_path: Path) -> None:
    write(tmp_path / "test" / "wmt14_en-fr.jsonl", pairs(2))
    write(tmp_path / "wmt14_en-fr.jsonl", pairs(2))
    with pytest.raises(UsageError) as caught:
        TranslationSuite().load("wmt14_en-fr", "train", str(tmp_path))
    assert str(caught.value) == f"{tmp_path}/train/wmt14_en-fr.jsonl: no such file. Check the path."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"translation": {"en": "Hi"}}, ", translation: the field 'fr' is missing. Every line needs it."),
        ({"translation": "Hi"}, ": the field 'translation' is not an object. Write {\"...\": ...}."),
        ({"en": "Hi", "fr": " "}, ": one side of the translation is empty. Leave that line out."),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write(tmp_path / "test" / "wmt14_en-fr.jsonl", [row])
    with pytest.raises(UsageError) as caught:
        TranslationSuite().load("wmt14_en-fr", "test", str(tmp_path))
    assert str(caught.value) == f"{tmp_path}/test/wmt14_en-fr.jsonl, line 1{message}"


def test_wmt_is_streamed_and_no_more_than_its_first_pairs_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, fetched = [], 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal fetched
        while True:
            fetched += 1
            yield {"translation": {"en": f"sentence {fetched}", "ro": f"propoziție {fetched}"}}

    def load_dataset(path: str, name: str, *, split: str, streaming: bool) -> Any:
        calls.append((path, name, split, streaming))
        return pairs_of_ro if split == "test" else endless()

    pairs_of_ro = [{"translation": {"en": "Hi", "ro": "Salut"}}]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    suite = TranslationSuite()
    assert suite.load("wmt16_en-ro", "test")[0].target == "Salut"
    assert len(suite.load("wmt16_ro-en", "train")) == TRAIN_ROWS == fetched
    assert calls == [("wmt/wmt16", "ro-en", "test", True), ("wmt/wmt16", "ro-en", "train", True)]
