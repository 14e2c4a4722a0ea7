"""Output folders: what may be written where."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from molecli.errors import RunError, UsageError
from molecli.files import output_folder as output


def _used(folder: Path) -> Path:
    folder.mkdir()
    for name in ("recipe.yaml", "composition.safetensors", "samples_a.jsonl", "notes.txt"):
        (folder / name).write_text("x")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-000001").write_text("x")
    return folder


def test_a_new_or_an_empty_folder_is_claimed(tmp_path: Path) -> None:
    assert output.claim(tmp_path / "a" / "b").is_dir()
    assert output.claim(tmp_path / "a" / "b") == tmp_path / "a" / "b"


@pytest.mark.parametrize(
    ("resumable", "advice"),
    [(True, ", --resume to continue the run there"), (False, "")],
)
def test_a_folder_that_is_not_empty_is_refused_and_left_as_it_was(tmp_path: Path, resumable: bool, advice: str) -> None:
    folder = _used(tmp_path / "run")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UsageError) as caught:
        output.claim(folder, resumable=resumable)
    assert str(caught.value) == (
        f"{folder}: the output folder is not empty. "
        f"Choose another --output, or write --overwrite to replace it{advice}."
    )
    assert sorted(path.name for path in folder.iterdir()) == before


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = output.claim(_used(tmp_path / "run"), overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_overwrite_does_not_follow_links_out_of_the_folder(tmp_path: Path) -> None:
    elsewhere = _used(tmp_path / "elsewhere")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(elsewhere)
    output.claim(folder, overwrite=True)
    assert not (folder / "checkpoints").exists()
    assert (elsewhere / "recipe.yaml").exists()


def test_resume_keeps_everything(tmp_path: Path) -> None:
    folder = _used(tmp_path / "run")
    before = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in output.claim(folder, resume=True).iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resume": True}, "{}: there is no run to resume. Check --output."),
        (
            {"resume": True, "overwrite": True},
            "--overwrite --resume: they contradict each other. Write only one of them.",
        ),
    ],
)
def test_resume_needs_a_run(tmp_path: Path, flags: dict[str, bool], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        output.claim(tmp_path / "none", **flags)
    assert str(caught.value) == message.format(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(UsageError, match=re.escape("f: the output is a file, not a folder. Choose another --output.")):
        output.claim(tmp_path / "f")


def test_a_folder_that_cannot_be_made_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(RunError) as caught:
        output.claim(tmp_path / "f" / "run")
    assert str(caught.value) == f"{tmp_path}/f/run: cannot be written (Not a directory). Choose another --output."


def test_the_default_folder_is_named_after_command_and_time_and_is_new(tmp_path: Path) -> None:
    first = output.default_folder("compose", tmp_path)
    assert re.fullmatch(r"compose-\d{8}-\d{6}", Path(first).name)
    names = set()
    for _ in range(3):
        name = output.default_folder("compose", tmp_path)
        Path(name).mkdir()
        names.add(name)
    assert len(names) == 3
