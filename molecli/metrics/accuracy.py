"""Accuracy of a label: the completion's first word against the answer's first word.

So "(B) the second" is right where "(B)" is wanted, and "entailment, because ..." where "entailment" is. Only the first
word counts: looking further would let a completion that lists every label be right.
"""

from __future__ import annotations

from collections.abc import Sequence

from molecli.metrics._words import words


def label(text: str) -> str:
    """The first word of `text`, or the stripped text where it holds no word (a lone bracket is a label too)."""
    found = words(text)
    return found[0] if found else text.strip()


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """1.0 where the first word is the label of an answer; an empty completion is never right."""
    return [
        float(bool(prediction.strip()) and label(prediction) in {label(answer) for answer in accepted})
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]
