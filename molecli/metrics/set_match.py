"""Set match: the same words in any order. Source: instruction induction (Honovich et al., 2022), "exact set"."""

from __future__ import annotations

from collections.abc import Sequence

from molecli.metrics._words import words


def members(text: str) -> frozenset[str]:
    """The set of words of `text`, without the "and" before the last one."""
    return frozenset(words(text.replace(" and ", " ")))


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """1.0 if the words are exactly those of an answer."""
    return [
        float(members(prediction) in {members(answer) for answer in accepted})
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]
