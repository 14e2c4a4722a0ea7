"""Atomic writes: all of it or nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molecli.errors import RunError
from molecli.files.atomic import append_jsonl, atomic_folder, write_bytes, write_text, write_with


def test_a_file_is_written_and_its_folders_are_made(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a" / "b.txt", "één\n")
    assert path.read_bytes() == "één\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_failed_write_leaves_the_old_content_and_no_debris(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "x.bin", b"old")

    def half(part: Path) -> None:
        part.write_bytes(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with(path, half)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_text(tmp_path / "atomic", "").stat().st_mode == plain.stat().st_mode


def test_a_folder_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "run") as part:
        (part / "a.txt").write_text("1")
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "a.txt").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_never_appears_when_the_block_raises(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "run") as part:
            (part / "a.txt").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_gives_way_and_a_full_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with atomic_folder(tmp_path / "run") as part:
        (part / "a.txt").write_text("1")
    with pytest.raises(RunError) as caught, atomic_folder(tmp_path / "run") as part:
        (part / "a.txt").write_text("2")
    run = tmp_path / "run"
    assert str(caught.value) == (
        f"{run}: cannot be written (Directory not empty). Check the folder and the free space."
    )
    assert caught.value.exit_code == 1
    assert (run / "a.txt").read_text() == "1"
    assert list(tmp_path.iterdir()) == [run]


def test_replace_swaps_a_full_folder(tmp_path: Path) -> None:
    for text in "12":
        with atomic_folder(tmp_path / "run", replace=True) as part:
            (part / f"{text}.txt").write_text(text)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["2.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_path_below_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.txt"
    with pytest.raises(RunError) as caught:
        write_text(path, "")
    assert str(caught.value).startswith(f"{path}: cannot be written (")
    assert str(caught.value).endswith("Check the folder and the free space.")
    assert caught.value.exit_code == 1


def test_rows_are_appended_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 2, "note": "é"})
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"step": 1},
        {"step": 2, "note": "é"},
    ]
