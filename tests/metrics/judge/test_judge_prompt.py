"""The question lists what a picture should show, and asks for exactly what the parser reads."""

from __future__ import annotations

import pytest

from molecli.metrics.judge.parse import Scores, UnreadableAnswer, parse_scores
from molecli.metrics.judge.prompt import Element, once_more, question

ELEMENTS = (Element("character", "Alice", ("blue dress", "white\napron ", " ")), Element("style", "ink drawing"))


def test_the_elements_are_listed_with_type_name_and_features() -> None:
    assert "\n\n1. character (Alice): blue dress, white apron\n2. style (ink drawing)\n\n" in question(ELEMENTS)


def test_both_criteria_are_asked_for_with_their_deductions() -> None:
    composition, image = question(ELEMENTS).partition("Image quality:")[::2]
    assert [line[11] for line in composition.splitlines() if line.startswith("- Take off ")] == ["3", "1", "1", "m"]
    assert [line[11] for line in image.splitlines() if line.startswith("- Take off ")] == ["3", "2", "1", "m"]
    assert "steps of 0.5" in composition


def test_the_form_that_is_asked_for_is_the_form_that_is_read() -> None:
    form = "\n".join(question(ELEMENTS).splitlines()[-2:])
    filled = form.replace("x/10", "3.5/10").replace("y/10", "6/10")
    assert parse_scores(filled) == (Scores(3.5, 6.0), Scores(3.5, 6.0))
    with pytest.raises(UnreadableAnswer):
        parse_scores(question(ELEMENTS))  # a model that only repeats the question judged nothing


def test_a_further_try_says_what_was_wrong_with_the_last() -> None:
    again = once_more(question(ELEMENTS), "no scores for image 2")
    assert again.startswith(question(ELEMENTS))
    assert "no scores for image 2" in again
