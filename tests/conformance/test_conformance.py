"""What docs/compatibility.md promises of each architecture and each way of calling: exact, or refused in its words.

A spread of the cells runs always; all of them are `slow`. `python -m tools.compatibility` writes the page.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.cells import EXACT, cells_of
from tests.conformance.subject import FIXED, MODES, Subject
from tests.conformance.table import GROUPS, PAGE, columns, parse, shared_words
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
def promised() -> dict[tuple[str, str, str], str]:
    return parse(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def notes() -> str:
    return PAGE.read_text(encoding="utf-8").partition("## Refusals")[2]


def check(name: str, way: str, modes: tuple[str, ...], subject: Subject, promised: dict, notes: str) -> None:
    for mode, cell in cells_of(subject, way, modes).items():
        assert cell.state != "wrong", f"{mode}: {cell.words}"
        for group, members in GROUPS.items():
            if mode in members or (cell.state == "base" and way in columns(members)):
                mark = promised[group, name, way]
                assert (mark == "–") == (cell.state == "base"), f"{mode}: {cell.words}"
                assert mark != "✓" or cell.state == "exact", f"{mode}: {cell.words}"
        if cell.state == "refused":
            assert shared_words(cell.words) in notes


@pytest.mark.parametrize(("name", "way", "mode"), spread())
def test_a_spread_of_the_cells_is_what_the_page_says(
    name: str, way: str, mode: str, subject_of: Callable, promised: dict, notes: str
) -> None:
    check(name, way, (mode,), subject_of(name), promised, notes)


@pytest.mark.slow
@pytest.mark.parametrize("way", columns())
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_cell_is_what_the_page_says(
    name: str, way: str, subject_of: Callable, promised: dict, notes: str
) -> None:
    check(name, way, tuple(MODES), subject_of(name), promised, notes)


def test_the_page_has_every_architecture_and_way(promised: dict) -> None:
    every = {(group, name, way) for group in GROUPS for name in ARCHITECTURES for way in columns(GROUPS[group])}
    assert set(promised) == every
    assert len(ARCHITECTURES) >= 50


def test_the_spread_has_every_architecture_way_and_mode() -> None:
    names, ways, modes = (set(found) for found in zip(*spread(), strict=True))
    assert names == set(ARCHITECTURES)
    assert ways == set(QUICK)
    assert modes == set(MODES)
