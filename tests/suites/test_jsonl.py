"""The jsonl suite: what it reads, and the exact message for everything it cannot."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from molecli.errors import UsageError
from molecli.suites import load_suite
from molecli.suites.jsonl import JsonlSuite

GOOD = '{"input": "2+2", "target": "4"}\n'


def write(folder: Path, text: str, name: str = "sums.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path | str) -> str:
    suite = JsonlSuite({"sums": str(path)})
    with pytest.raises(UsageError) as caught:
        suite.load("sums", "test")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_input_and_target_are_read_and_the_stem_names_the_task(tmp_path: Path) -> None:
    suite = load_suite("jsonl", files=[str(write(tmp_path, GOOD))])
    assert suite.tasks(None) == ["sums"]
    (example,) = suite.load("sums", "test", None)
    assert (example.task, example.prompt, example.target, example.answers) == ("sums", "2+2", "4", ("4",))


def test_output_stands_in_for_target_and_references_add_answers(tmp_path: Path) -> None:
    path = write(tmp_path, '{"input": "a", "output": "b", "references": ["c", "b"], "note": 1}\n')
    (example,) = JsonlSuite({"sums": str(path)}).load("sums", "train")
    assert (example.target, example.answers) == ("b", ("b", "c"))


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "\n" + GOOD + "\n{]\n")
    assert message(path).startswith(f"{path}, line 4: not JSON")


def test_stdin_is_read_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(GOOD))
    suite = load_suite("jsonl", files=["-"])
    assert suite.tasks(None) == ["stdin"]
    assert suite.load("stdin", "test", None) == suite.load("stdin", "test", None)
    # A recipe names a file by its stem, which for "-" is "-".
    assert JsonlSuite({"-": "-"}).tasks() == ["stdin"]


def test_a_bad_line_of_stdin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(GOOD + '{"input": "x"}\n'))
    assert message("-") == "stdin, line 2: the field 'target' is missing. Every line needs it."


def test_a_folder_gives_its_split_where_there_is_one(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "train/sums.jsonl")
    write(tmp_path, GOOD.replace("4", "5"), "test/sums.jsonl")
    write(tmp_path, GOOD, "other.jsonl")
    suite = JsonlSuite()
    assert suite.tasks(str(tmp_path)) == ["other", "sums"]
    assert suite.load("sums", "test", str(tmp_path))[0].target == "5"
    assert suite.load("other", "test", str(tmp_path)) == suite.load("other", "train", str(tmp_path))


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    assert message(path) == f"{path}: no such file. Check the path."


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    assert message(tmp_path) == f"{tmp_path}: is a folder, not a JSONL file. Name a file inside it."


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert message(path) == f'{path}: holds no examples. Write one {{"input": ..., "target": ...}} per line.'


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "4\t5\n")
    assert message(path) == f"{path}, line 2: not JSON (Extra data, column 3). Correct that line."


def test_a_line_that_is_no_object(tmp_path: Path) -> None:
    path = write(tmp_path, "[1, 2]\n")
    assert message(path) == f'{path}, line 1: not a JSON object. Write {{"input": ..., "target": ...}}.'


@pytest.mark.parametrize("field", ["input", "target"])
def test_a_line_without_a_field(tmp_path: Path, field: str) -> None:
    other = "target" if field == "input" else "input"
    path = write(tmp_path, GOOD + GOOD + f'{{"{other}": "x"}}\n')
    assert message(path) == f"{path}, line 3: the field {field!r} is missing. Every line needs it."


def test_a_field_that_is_not_text(tmp_path: Path) -> None:
    path = write(tmp_path, '{"input": "2+2", "target": 4}\n')
    assert message(path) == f"{path}, line 1: the field 'target' is not text. Put it in double quotes."


def test_references_that_are_no_list(tmp_path: Path) -> None:
    path = write(tmp_path, '{"input": "a", "target": "b", "references": "c"}\n')
    assert message(path) == f'{path}, line 1: the field \'references\' is not a list of texts. Write ["...", "..."].'


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"input": "é", "target": "b"}'.encode("latin-1"))
    assert message(path) == f"{path}: not UTF-8 text. Save it as UTF-8."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    path.chmod(0)
    assert message(path) == f"{path}: cannot be read (Permission denied). Check its permissions."


def test_nothing_given_at_all() -> None:
    with pytest.raises(UsageError) as caught:
        JsonlSuite().tasks()
    assert str(caught.value) == "suite jsonl: no files were given. Write data.files or --data-dir."


def test_two_files_of_one_name() -> None:
    with pytest.raises(UsageError) as caught:
        JsonlSuite(["a/sums.jsonl", "b/sums.jsonl"])
    assert str(caught.value) == (
        "b/sums.jsonl: two files would both be the task 'sums'. Write data.files as task: file."
    )
