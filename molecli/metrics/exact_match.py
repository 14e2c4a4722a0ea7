"""Exact match under three normalisers: strict, lm-eval's options, LoRAHub's.

The choice changes scores on BBH by points, so that each is a separate metric and not an option.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from functools import partial

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def strict_text(text: str) -> str:
    """`text` without leading and trailing white space."""
    return text.strip()


def lm_eval_text(text: str) -> str:
    """`text` in lower case without punctuation. Source: lm-evaluation-harness, ignore_case and ignore_punctuation.

    Departs: white space at the ends after removing punctuation is stripped too.
    """
    return text.lower().translate(_NO_PUNCTUATION).strip()


def lorahub_text(text: str) -> str:
    """`text` stripped, in lower case, without full stops. Source: LoRAHub, `accuracy_score` in lorahub/algorithm.py."""
    return text.strip().lower().replace(".", "")


def _matches(
    normalise: Callable[[str], str], predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> list[float]:
    return [
        float(normalise(prediction) in {normalise(answer) for answer in accepted})
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]


strict = partial(_matches, strict_text)
lm_eval = partial(_matches, lm_eval_text)
lorahub = partial(_matches, lorahub_text)
