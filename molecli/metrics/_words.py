"""How the word-based metrics (accuracy, set match, F1) cut a text into words."""

from __future__ import annotations

import re

# A number keeps its sign, point and fraction; a label keeps its underscore ("not_entailment").
_WORD = re.compile(r"-?\d+(?:[.,:/]\d+)*|\w+(?:['’-]\w+)*")


def words(text: str) -> list[str]:
    """The words of `text` in lower case, punctuation left out."""
    return _WORD.findall(text.lower())
