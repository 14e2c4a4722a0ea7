"""Word F1 against values worked out by hand."""

from __future__ import annotations

import pytest

from molecli.metrics.f1 import score


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    # Shared: "involve", "up" of 2 given and 3 wanted; P = 1, R = 2/3.
    assert score(["involve up"], [("involve going up.",)]) == [pytest.approx(0.8)]


def test_repeated_words_count_only_as_often_as_they_are_wanted() -> None:
    assert score(["up up up"], [("up",)]) == [pytest.approx(0.5)]


def test_the_best_answer_counts_and_nothing_shared_is_zero() -> None:
    assert score(["going up", ""], [("falling", "going up"), ("up",)]) == [1.0, 0.0]
