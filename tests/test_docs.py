"""The documents name every composition method."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest

from molecli.catalog.methods import METHODS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", METHODS)
def test_readme_names_every_mode(name: str) -> None:
    assert f"`{name}`" in (ROOT / "README.md").read_text("utf-8")


def test_method_md_says_what_every_mode_reads() -> None:
    lines = (ROOT / "docs" / "method.md").read_text("utf-8").splitlines()
    start = lines.index("| mode | `method.*` |") + 2
    rows = next(list(found) for table, found in groupby(lines[start:], lambda line: line.startswith("|")) if table)
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|")] for row in rows]
    said = {mode: tuple(keys) for modes, keys in cells for mode in modes}
    assert said == {name: method.own_options for name, method in METHODS.items()}
