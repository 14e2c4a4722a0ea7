"""The documents name every composition method."""

from __future__ import annotations

from pathlib import Path

import pytest

from molecli.compose import METHODS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", METHODS)
def test_readme_names_every_mode(name: str) -> None:
    assert f"`{name}`" in (ROOT / "README.md").read_text("utf-8")
