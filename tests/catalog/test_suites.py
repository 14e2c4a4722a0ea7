"""The table of suites: every row loads, unknown names are met with the nearest one."""

from __future__ import annotations

from pathlib import Path

import pytest

from molecli.catalog.metrics import METRICS
from molecli.catalog.suites import SUITES
from molecli.errors import UsageError
from molecli.suites import load_suite, select_tasks


@pytest.mark.parametrize(
    "name", [name for name, row in SUITES.items() if row.holds == "texts" and "files" not in row.given]
)
def test_every_suite_loads_and_names_known_metrics_and_room_for_each_task(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.version
    tasks = suite.tasks(None)
    assert tasks
    for task in tasks:
        assert suite.metrics(task)
        assert set(suite.metrics(task)) <= set(METRICS)
        assert suite.max_new_tokens(task) > 0


def test_a_mistyped_suite_names_the_nearest_one() -> None:
    with pytest.raises(UsageError) as caught:
        load_suite("bhb")
    assert str(caught.value) == "--suite: no suite is called 'bhb'. Did you mean 'bbh'?"


def test_files_are_for_the_jsonl_suite_alone() -> None:
    with pytest.raises(UsageError) as caught:
        load_suite("bbh", files=["mine.jsonl"])
    assert str(caught.value) == "data.files: the suite 'bbh' has its own files. Write suite: jsonl to read yours."


def test_tasks_are_selected_in_the_order_asked_for_and_once() -> None:
    suite = load_suite("bbh")
    assert select_tasks(suite, ["snarks", "navigate", "snarks"], None) == ["snarks", "navigate"]
    assert select_tasks(suite, None, None) == suite.tasks(None)


def test_a_mistyped_task_names_the_nearest_one() -> None:
    with pytest.raises(UsageError) as caught:
        select_tasks(load_suite("bbh"), ["navigat"], None)
    assert str(caught.value) == "suite bbh: no task is called 'navigat'. Did you mean 'navigate'?"


@pytest.mark.parametrize(
    ("name", "folders", "files"),
    [
        ("struct2text", (), "test/common_gen.jsonl, test/dart.jsonl, test/e2e_nlg.jsonl, test/web_nlg.jsonl"),
        ("bbh", (), ", ".join(f"{task}.jsonl" for task in load_suite("bbh").known(None))),
        (
            "cbqa+bbh",
            ("cbqa", "bbh"),
            "cbqa/test/arc_challenge.jsonl, cbqa/test/arc_easy.jsonl, cbqa/test/natural_questions.jsonl, "
            "cbqa/test/trivia_qa.jsonl, " + ", ".join(f"bbh/{task}.jsonl" for task in load_suite("bbh").known(None)),
        ),
    ],
)
def test_a_folder_without_any_task_is_told_every_file(
    tmp_path: Path, name: str, folders: tuple[str, ...], files: str
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(UsageError) as caught:
        select_tasks(load_suite(name), None, f"{tmp_path}/")
    what = f"there is no task of the suite {name!r}; these files are missing: {files}"
    assert str(caught.value) == f"{tmp_path}/: {what}. Check --data-dir."


def test_of_the_tasks_asked_for_every_missing_file_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "dart.jsonl").touch()
    with pytest.raises(UsageError) as caught:
        select_tasks(load_suite("struct2text"), ["web_nlg", "dart", "e2e_nlg", "web_nlg"], str(tmp_path))
    what = "these files of the tasks 'web_nlg', 'e2e_nlg' are missing"
    assert str(caught.value) == f"{tmp_path}: {what}: test/web_nlg.jsonl, test/e2e_nlg.jsonl. Check --data-dir."


@pytest.mark.parametrize(
    ("name", "present", "asked", "missing"),
    [
        ("bbh", "navigate.jsonl", "snarks", "snarks.jsonl"),
        ("nli", "rte_dev.jsonl", "qnli", "qnli_dev.jsonl"),
        ("instruction_induction", "test/sum.jsonl", "diff", "test/diff.jsonl"),
        ("translation", "wmt14_en-fr.jsonl", "wmt14_fr-en", "test/wmt14_fr-en.jsonl"),
        ("struct2text", "test/dart.jsonl", "e2e_nlg", "test/e2e_nlg.jsonl"),
        ("cbqa", "arc_easy.jsonl", "trivia_qa", "test/trivia_qa.jsonl"),
    ],
)
def test_a_task_whose_file_is_not_there_is_told_which_file(
    tmp_path: Path, name: str, present: str, asked: str, missing: str
) -> None:
    (tmp_path / present).parent.mkdir(exist_ok=True)
    (tmp_path / present).touch()
    with pytest.raises(UsageError) as caught:
        select_tasks(load_suite(name), [asked], str(tmp_path))
    what = f"no such file, and the task {asked!r} needs it"
    assert str(caught.value) == f"{tmp_path}/{missing}: {what}. Check --data-dir."


def test_a_task_without_a_public_copy_needs_its_file() -> None:
    with pytest.raises(UsageError) as caught:
        select_tasks(load_suite("nli"), ["sick"], None)
    assert str(caught.value) == "suite nli: the task 'sick' is not on the hub. Give its files: --data-dir."


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        select_tasks(load_suite("nli"), None, str(tmp_path / "gone"))
    assert str(caught.value) == f"{tmp_path / 'gone'}: no such folder. Check --data-dir."
