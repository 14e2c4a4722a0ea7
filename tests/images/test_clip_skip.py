"""Prompts are encoded alike when gates learn and when pictures are drawn with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from refusals import refused

from molecli.images.clip_skip import use_clip_skip


def composition(skip: int | None) -> Any:
    return SimpleNamespace(recipe=f"image: {{clip_skip: {'null' if skip is None else skip}}}")


@pytest.mark.parametrize(
    ("asked", "recorded", "used"),
    [(None, [], None), (None, [1], 1), (2, [1], 2), (None, [None], None), (None, [1, 1], 1), (3, [1, 2], 3)],
)
def test_the_compositions_own_number_unless_another_is_asked_for(
    asked: int | None, recorded: list[int | None], used: int | None
) -> None:
    backbone = SimpleNamespace(clip_skip=9)
    use_clip_skip(backbone, asked, map(composition, recorded))
    assert backbone.clip_skip == used


def test_compositions_that_differ_are_not_mixed() -> None:
    both = [composition(None), composition(2)]
    what = "--clip-skip: the compositions were made with different values (2, none). Write the one to draw with."
    refused(lambda: use_clip_skip(SimpleNamespace(), None, both), 2, what)
