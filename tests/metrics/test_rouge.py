"""ROUGE against values worked out by hand."""

from __future__ import annotations

import pytest

from molecli.metrics import load_metric

PREDICTION, ANSWER = "the cat sat", "the cat lay down"


@pytest.mark.parametrize(
    ("name", "wanted"),
    # Shared words 2 of 3 and 4; shared bigrams 1 of 2 and 3; longest common subsequence 2.
    [("rouge1", 2 * 2 / 7), ("rouge2", 2 * 1 / 5), ("rougeL", 2 * 2 / 7)],
)
def test_f_measures_match_counting_by_hand(name: str, wanted: float) -> None:
    assert load_metric(name)([PREDICTION], [(ANSWER,)]) == [pytest.approx(wanted)]


def test_the_longest_common_subsequence_respects_order_where_unigrams_do_not() -> None:
    assert load_metric("rouge1")(["b a"], [("a b",)]) == [1.0]
    assert load_metric("rougeL")(["b a"], [("a b",)]) == [0.5]


def test_the_best_of_several_answers_counts() -> None:
    assert load_metric("rouge1")(["a dog"], [("the cat", "a dog")]) == [1.0]
