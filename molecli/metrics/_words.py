"""Splits a text into words, for accuracy, set match and F1."""

from __future__ import annotations

import re

# Numbers keep their sign, point and fraction; labels keep their underscore ("not_entailment").
_WORD = re.compile(r"-?\d+(?:[.,:/]\d+)*|\w+(?:['’-]\w+)*")


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation."""
    return _WORD.findall(text.lower())
