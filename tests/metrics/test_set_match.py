"""Set match: order and commas do not count, members do."""

from __future__ import annotations

import pytest

from molecli.metrics.set_match import score


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("cow, eagle, bird", 1),
        ("bird cow eagle", 1),
        ("Bird, cow and eagle.", 1),
        ("cow, eagle", 0),
        ("cow, eagle, bird, boots", 0),
        ("", 0),
    ],
)
def test_members_are_compared_in_any_order(prediction: str, right: int) -> None:
    assert score([prediction], [("cow, eagle, bird",)]) == [right]
