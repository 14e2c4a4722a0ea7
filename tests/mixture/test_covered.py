"""A covered method is back when the last that covers it has gone, whatever the order."""

from __future__ import annotations

import itertools

import pytest

from molecli.mixture.covered import Covered


class Owner:
    def name(self) -> str:
        return "class"


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("own", [False, True])
def test_what_was_there_is_back_in_any_order(own: bool, order: tuple[int, ...]) -> None:
    owner = Owner()
    if own:
        owner.name = lambda: "own"  # type: ignore[method-assign]
    before = dict(vars(owner))
    covers = [Covered(owner, "name", lambda i=i: str(i)) for i in range(3)]
    left = [0, 1, 2]
    for i in order:
        assert owner.name() == str(left[-1])
        covers[i].remove()
        covers[i].remove()  # which changes nothing
        left.remove(i)
    assert vars(owner) == before
