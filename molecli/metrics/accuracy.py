"""Accuracy of a label: compares the first words of the completion and the answer.

"(B) the second" is right for "(B)", and "entailment, because ..." for "entailment". Only the first word counts:
otherwise a completion that lists all labels would be right.
"""

from __future__ import annotations

from collections.abc import Sequence

from molecli.metrics._words import words


def label(text: str) -> str:
    """The first word of `text`, or the stripped text if it has no word (a single bracket is a label too)."""
    found = words(text)
    return found[0] if found else text.strip()


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """1.0 if the first word is the label of an answer; an empty completion is never right."""
    return [
        float(bool(prediction.strip()) and label(prediction) in {label(answer) for answer in accepted})
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]
