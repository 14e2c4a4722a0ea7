"""The command that writes docs/compatibility.md: what it computes, prints, keeps and refuses to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.cells import Cell
from tests.conformance.table import columns, modes_of, parse, render
from tools import compatibility
from tools.compatibility import main


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page on which all is exact."""
    path = tmp_path / "compatibility.md"
    every = {
        (name, way): {mode: Cell("exact") for mode in modes_of(way)} for name in ARCHITECTURES for way in columns()
    }
    path.write_text(render(every), encoding="utf-8")
    monkeypatch.setattr(compatibility, "PAGE", path)
    return path


def test_cells_are_printed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page.read_text(encoding="utf-8")
    assert main(["--only", "llama", "--ways", "exact", "--processes", "1", "--show"]) == 0
    assert "llama, as PEFT, cat: exact" in capsys.readouterr().out.splitlines()
    assert page.read_text(encoding="utf-8") == before


def test_some_cells_are_written_and_the_rest_is_kept(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"base": Cell("base", "ValueError: no")}
    monkeypatch.setattr(compatibility, "compute", lambda name, ways: dict.fromkeys(ways, base))
    before = parse(page.read_text(encoding="utf-8"))
    assert main(["--only", "t5", "--ways", "static", "--processes", "1"]) == 0
    assert parse(page.read_text(encoding="utf-8")) == {**before, ("t5", "static"): {"base": Cell("base")}}


def test_a_wrong_cell_fails_and_nothing_is_written(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = page.read_text(encoding="utf-8")
    wrong = {"exact": {"linear": Cell("wrong", "off by 1e-2")}}
    monkeypatch.setattr(compatibility, "compute", lambda name, ways: wrong)
    assert main(["--only", "llama", "--ways", "exact", "--processes", "1"]) == 1
    assert "llama, as PEFT, linear: off by 1e-2" in capsys.readouterr().err.splitlines()
    assert page.read_text(encoding="utf-8") == before


def test_an_unknown_architecture_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "lama"])
    assert "unknown: lama" in capsys.readouterr().err
