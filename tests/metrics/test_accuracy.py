"""Accuracy looks at the first word and nothing else."""

from __future__ import annotations

import pytest

from molecli.metrics.accuracy import label, score


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("entailment", "entailment", 1),
        ("Entailment, because it rains.", "entailment", 1),
        ("entailment", "not_entailment", 0),
        ("not_entailment.", "not_entailment", 1),
        ("neutral entailment", "entailment", 0),
        ("(B) the second one", "(B)", 1),
        ("B", "(B)", 1),
        ("-5", "5", 0),
        ("3 - probably", "3 - probably", 1),
        ("3", "3 - probably", 1),
        ("3.5", "3", 0),
        ("", "entailment", 0),
        (" }", "}", 1),
    ],
)
def test_the_first_word_decides(prediction: str, answer: str, right: int) -> None:
    assert score([prediction], [(answer,)]) == [right]


def test_a_text_without_words_is_its_own_label() -> None:
    assert label(" ) ") == ")"
