"""What the table of compatibility promises: every mode on every architecture is PEFT's own result, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.cells import exactness
from tests.conformance.subject import FIXED, Subject


@pytest.fixture(scope="session")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """The subject of a row, made once."""
    made: dict[str, Subject] = {}

    def subject(name: str) -> Subject:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp("conformance")
            made[name] = Subject(ARCHITECTURES[name], folder)
        return made[name]

    return subject


@pytest.mark.slow
@pytest.mark.parametrize("mode", FIXED)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fixed_mode_is_pefts_and_the_base_is_restored(name: str, mode: str, subject_of: Callable) -> None:
    cell = exactness(subject_of(name), mode)
    assert cell.state == "exact", cell.words
