"""CONTRIBUTING.md: every path in it exists, its table of parts is that of the import rules, and it stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from molecli.catalog.methods import METHODS
from molecli.catalog.metrics import METRICS
from molecli.catalog.suites import SUITES
from molecli.catalog.table import Table

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
# A word in capitals stands for one of the reader's choice.
PATHS = sorted(
    path
    for path in set(re.findall(r"`((?:molecli|tests|docs|benchmarks|tools)/[^\s`]*|[\w]+\.(?:md|toml))`", TEXT))
    if not re.search(r"\b[A-Z]+\b", path.removesuffix(".md"))
)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_it_names_many_paths() -> None:
    assert len(PATHS) > 40


def test_the_parts_are_those_of_the_import_rules_in_their_order() -> None:
    rules = (ROOT / "pyproject.toml").read_text("utf-8")
    (layers,) = re.findall(r"^layers = \[\n(.*?)^\]", rules, re.MULTILINE | re.DOTALL)
    rows = TEXT[TEXT.index("| part, from the top | holds |") :].split("\n\n")[0].splitlines()[2:]
    shown = [re.findall(r"`molecli/(\w+)(?:\.py)?`", row.split("|")[1]) for row in rows]
    ruled = [re.findall(r"molecli\.(\w+)", line) for line in layers.splitlines()]
    assert shown == ruled


def test_it_names_every_group_of_entry_points() -> None:
    tables: tuple[Table, ...] = (METHODS, METRICS, SUITES)
    assert all(f"`{table.group}`" in TEXT for table in tables)


def test_it_is_short() -> None:
    assert len(TEXT) <= 9_000
