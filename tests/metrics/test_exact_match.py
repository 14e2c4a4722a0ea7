"""Exact match: three normalisers, told apart by what they forgive."""

from __future__ import annotations

import pytest

from molecli.metrics import load_metric


@pytest.mark.parametrize(
    ("prediction", "strict", "lm_eval", "lorahub"),
    [
        ("Paris", 1, 1, 1),
        ("  Paris\n", 1, 1, 1),
        ("paris", 0, 1, 1),
        ("Paris.", 0, 1, 1),
        ("Paris!", 0, 1, 0),
        ("Paris France", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_each_normaliser_forgives_exactly_what_it_says(
    prediction: str, strict: int, lm_eval: int, lorahub: int
) -> None:
    for name, wanted in (("exact_match", strict), ("exact_match_lm_eval", lm_eval), ("exact_match_lorahub", lorahub)):
        assert load_metric(name)([prediction], [("Paris",)]) == [wanted], name


def test_any_of_several_answers_is_right_and_examples_are_scored_one_by_one() -> None:
    scores = load_metric("exact_match")(["Fest", "Feier", "Sieg"], [("Partei", "Fest"), ("Fest",), ("Sieg",)])
    assert scores == [1.0, 0.0, 1.0]


def test_predictions_and_answers_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        load_metric("exact_match")(["a"], [("a",), ("b",)])
