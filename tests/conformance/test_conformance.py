"""What docs/compatibility.md promises of each architecture and each way of calling: exact, or refused in its words.

A spread of the cells runs always; all of them are `slow`. `python -m tools.compatibility` writes the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.cells import EXACT, Cell, cells_of
from tests.conformance.pipelines import PIPELINE_WAYS, ROWS, Pipeline, pipeline_cells
from tests.conformance.subject import FIXED, MODES, Subject
from tests.conformance.table import PAGE, columns, columns_of, modes_of, parse, render, shared_words
from tests.conformance.ways import WAYS

QUICK = [name for name in columns() if name not in WAYS or not WAYS[name].costly]
EACH = 2  # ways of each architecture in the spread, besides exactness in one mode


def spread() -> list[tuple[str, str, str]]:
    """(architecture, way, mode): every architecture and every way that is not costly, in all modes over the whole."""
    chosen = []
    for i, name in enumerate(ARCHITECTURES):
        chosen.append((name, EXACT, list(FIXED)[i % len(FIXED)]))
        for k in range(EACH):
            way = QUICK[1:][(EACH * i + k) % (len(QUICK) - 1)]
            modes = WAYS[way].modes
            chosen.append((name, way, modes[(i // 3 + k) % len(modes)]))
    return chosen


@pytest.fixture(scope="session")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """The subject of a row, made once."""
    made: dict[str, Subject] = {}

    def subject(name: str) -> Subject:
        if name not in made:
            made[name] = Subject(ARCHITECTURES[name], tmp_path_factory.mktemp("conformance"))
        return made[name]

    return subject


@pytest.fixture(scope="session")
def promised() -> dict[tuple[str, str], dict[str, Cell]]:
    return parse(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}


def check(found: dict[str, Cell], promised: dict[str, Cell] | None) -> None:
    """Nothing is wrong, and all is as the page promises; that it promises every cell is another test's."""
    assert found
    for mode, cell in found.items():
        assert cell.state != "wrong", f"{mode}: {cell.words}"
        # How far the base itself deviates is a matter of rounding, and so of the machine.
        if promised is not None and "base" not in (*promised, *found):
            words = shared_words(cell.words) if cell.state == "refused" else ""
            assert (cell.state, words) == (promised[mode].state, promised[mode].words), f"{mode}: {cell.words}"


@pytest.mark.parametrize(("name", "way", "mode"), spread())
def test_a_spread_of_the_cells_is_what_the_page_says(
    name: str, way: str, mode: str, subject_of: Callable, promised: dict
) -> None:
    check(cells_of(subject_of(name), way, (mode,)), promised.get((name, way)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_cell_of_an_architecture_is_what_the_page_says(name: str, subject_of: Callable, promised: dict) -> None:
    for way in columns():
        check(cells_of(subject_of(name), way), promised.get((name, way)))


def pipeline_spread() -> list[tuple[str, str, str]]:
    """(pipeline, way, mode): every pipeline once, and every way in all its modes over the whole."""
    cells = [(way, mode) for way, row in PIPELINE_WAYS.items() for mode in row.modes]
    return [(name, *cells[i % len(cells)]) for i, name in enumerate([*ROWS, *ROWS][: max(len(ROWS), len(cells))])]


@pytest.mark.parametrize(("name", "way", "mode"), pipeline_spread())
def test_a_spread_of_the_cells_of_pipelines_is_what_the_page_says(
    name: str, way: str, mode: str, tmp_path: Path, promised: dict
) -> None:
    check(pipeline_cells(Pipeline(name, tmp_path), way, (mode,)), promised.get((name, way)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_cell_of_a_pipeline_is_what_the_page_says(name: str, tmp_path: Path, promised: dict) -> None:
    row = Pipeline(name, tmp_path)
    for way in PIPELINE_WAYS:
        check(pipeline_cells(row, way), promised.get((name, way)))


def test_the_page_has_every_row_and_way(promised: dict) -> None:
    assert set(promised) == {(name, way) for name in (*ARCHITECTURES, *ROWS) for way in columns_of(name)}
    assert len(ARCHITECTURES) >= 50


def results(row: str = "llama", way: str = next(iter(WAYS)), **cells: Cell) -> dict[tuple[str, str], dict[str, Cell]]:
    """All cells exact but those of one row and way."""
    every = {
        (name, way): {mode: Cell("exact") for mode in modes_of(way)}
        for name in (*ARCHITECTURES, *ROWS)
        for way in columns_of(name)
    }
    return {**every, (row, way): dict(cells)}


def test_a_page_is_read_as_it_was_written() -> None:
    refused = {
        mode: Cell("refused", "generation: not so. Do it otherwise.") for mode in ("prompt/block", "token/matrix")
    }
    made = results(**{**{mode: Cell("exact") for mode in modes_of(next(iter(WAYS)))}, **refused})
    assert parse(render(made)) == made
    made = results(base=Cell("base"))
    assert parse(render(made)) == made
    for cells in ({"linear": Cell("refused", "gates: no."), "cat": Cell("exact")}, {"base": Cell("base")}):
        made = results("sd_pag", "scaled", **cells)
        assert parse(render(made)) == made


def test_there_is_no_sign_for_a_wrong_cell() -> None:
    with pytest.raises(ValueError, match="1 cells are wrong, such as"):
        render(results(linear=Cell("wrong", "off by 1e-2")))


def test_the_spread_has_every_architecture_way_and_mode() -> None:
    names, ways, modes = (set(found) for found in zip(*spread(), strict=True))
    assert names == set(ARCHITECTURES)
    assert ways == set(QUICK)
    assert modes == set(MODES)
