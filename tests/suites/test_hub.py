"""Suites without --data-dir: what is asked of the hub, and what is said when it cannot be reached."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from molecli.errors import RunError
from molecli.protocols import Source
from molecli.suites import load_suite
from molecli.suites.bbh import BbhSuite
from molecli.suites.instruction_induction import InstructionInductionSuite, _web_rows
from molecli.suites.nli import NliSuite
from molecli.suites.translation import TranslationSuite


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub of one table for every name; the calls are recorded."""
    calls: list[tuple[Any, ...]] = []
    labels = datasets.ClassLabel(names=["entailment", "not_entailment"])
    text = datasets.Value("string")
    features = datasets.Features(input=text, target=text, sentence1=text, sentence2=text, label=labels)
    columns = {
        "input": [f"question {i}" for i in range(7)],
        "target": ["yes"] * 7,
        "sentence1": [f"premise {i}" for i in range(7)],
        "sentence2": ["hypothesis"] * 7,
        "label": [0, 1, -1, 0, 1, 0, 1],
    }

    def load_dataset(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        calls.append((path, name, split))
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_bbh_comes_from_the_hub_with_the_same_split(hub: list[tuple[Any, ...]]) -> None:
    examples = BbhSuite().load("navigate", "test")
    assert [example.prompt for example in examples] == ["Q: question 5\nA:", "Q: question 6\nA:"]
    assert hub == [("lukaemon/bbh", "navigate", "test")]


def test_nli_labels_become_words_and_unlabelled_rows_are_left_out(hub: list[tuple[Any, ...]]) -> None:
    examples = NliSuite().load("rte", "test")
    assert [example.target for example in examples] == ["entailment", "not_entailment"] * 3
    assert "Premise: premise 3\n" in examples[2].prompt
    NliSuite().load("rte", "train")
    assert hub == [("nyu-mll/glue", "rte", "validation"), ("nyu-mll/glue", "rte", "train")]


def test_offline_by_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'lukaemon/bbh' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunError) as caught:
        BbhSuite().load("navigate", "test")
    assert str(caught.value) == (
        "lukaemon/bbh/navigate: could not be loaded from the hub "
        "(Couldn't reach 'lukaemon/bbh' on the Hub (OfflineModeIsEnabled)). "
        "HF_HUB_OFFLINE is set: give the files with --data-dir, or unset it."
    )


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(RunError) as caught:
        NliSuite().load("snli", "test")
    assert str(caught.value) == (
        "stanfordnlp/snli: could not be loaded from the hub (Couldn't reach it). "
        "Check the network, or give the files with --data-dir."
    )
    assert caught.value.exit_code == 1


def test_instruction_induction_comes_from_its_authors_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def urlopen(address: str, *, timeout: float) -> io.BytesIO:
        asked.append(address)
        return io.BytesIO(json.dumps({"examples": {"1": {"informal": "Hi.", "formal": "Good day. "}}}).encode())

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    _web_rows.cache_clear()
    (example,) = InstructionInductionSuite().load("informal_to_formal", "test")
    _web_rows.cache_clear()
    assert example.target == "Good day."
    assert asked[0].endswith("/data/raw/execute/informal_to_formal.json")


def test_the_authors_repository_is_not_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _web_rows.cache_clear()
    with pytest.raises(RunError) as caught:
        InstructionInductionSuite().load("sum", "train")
    assert str(caught.value).endswith(
        "/data/raw/induce/sum.json: could not be loaded (offline mode). "
        "HF_HUB_OFFLINE is set: give the files with --data-dir, or unset it."
    )


def test_a_dataset_kept_as_a_script_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found bbh.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(
        RunError, match=r"no longer supported, but found bbh\.py\)\. Check the network, or give the files"
    ):
        BbhSuite().load("navigate", "test")


def test_a_stream_that_breaks_off_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        yield {"input": "a", "target": "b"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: broken())
    with pytest.raises(RunError, match=r"^wmt/wmt14/fr-en: could not be loaded from the hub \(gone\)"):
        TranslationSuite().load("wmt14_fr-en", "train")


@pytest.mark.parametrize("suite", ["translation", "struct2text", "cbqa"])
def test_the_new_suites_offline_say_so(suite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The library itself, not a stand-in: HF_HUB_OFFLINE is set for all tests.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    one = load_suite(suite)
    for task in one.tasks(None):
        with pytest.raises(RunError, match="HF_HUB_OFFLINE is set: give the files with --data-dir"):
            one.load(task, "test", None)


@pytest.mark.parametrize(
    ("suite", "task", "place"),
    [
        ("bbh", "navigate", "lukaemon/bbh/navigate, test"),
        ("nli", "anli_r2", "facebook/anli, test_r2"),
        ("translation", "wmt16_de-en", "wmt/wmt16/de-en, test"),
        ("struct2text", "dart", "GEM/gem/dart, validation"),
        ("cbqa", "arc_challenge", "allenai/ai2_arc/ARC-Challenge, test"),
        ("nli+cbqa", "rte", "nyu-mll/glue/rte, validation"),
    ],
)
def test_what_would_be_asked_is_known_without_asking(suite: str, task: str, place: str) -> None:
    assert load_suite(suite).source(task, "test", None) == Source(place, online=True)
