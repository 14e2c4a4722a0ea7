"""Word F1, as for extractive question answering; the best answer counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from molecli.metrics._words import words


def overlap(prediction: str, answer: str) -> float:
    """2PR / (P + R) over words with their multiplicity; 0 if no word is shared."""
    given, wanted = Counter(words(prediction)), Counter(words(answer))
    shared = (given & wanted).total()
    # 2PR / (P + R) with P = shared / given and R = shared / wanted.
    return 2 * shared / (given.total() + wanted.total()) if shared else 0.0


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """The best F1 over the answers, in [0, 1]."""
    return [
        max(overlap(prediction, answer) for answer in accepted)
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]
