"""The documents name every composition method, their links lead somewhere, and the README stays short."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest

from molecli.catalog.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])


@pytest.mark.parametrize("name", METHODS)
def test_usage_md_names_every_mode(name: str) -> None:
    text = (ROOT / "docs" / "usage.md").read_text("utf-8")
    table = text[text.index("| `--mode` | is |") :].partition("\n\n")[0]
    assert f"`{name}`" in table


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, part in links(page):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not part or part in anchors(file), f"{target}#{part}"


def links(page: Path) -> list[tuple[str, str]]:
    """(path, heading) of the page's links into the repository."""
    found = re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", without_code(page))
    return [(target, part) for target, part in found if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The page's headings, as links name them."""
    heads = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_method_md_says_what_every_mode_reads() -> None:
    lines = (ROOT / "docs" / "method.md").read_text("utf-8").splitlines()
    start = lines.index("| mode | `method.*` |") + 2
    rows = next(list(found) for table, found in groupby(lines[start:], lambda line: line.startswith("|")) if table)
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|")] for row in rows]
    said = {mode: tuple(keys) for modes, keys in cells for mode in modes}
    assert said == {name: method.own_options for name, method in METHODS.items()}
