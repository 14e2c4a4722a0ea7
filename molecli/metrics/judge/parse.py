"""Reads the scores in a judge's answer.

A score line is `Image k: Composition Quality: x/10, Image Quality: y/10`, with any marks of bold, lists and headings,
and any line breaks. The rules:

- Scores are rounded to multiples of 0.5 (halves up); scores outside 0 to 10 are refused.
- Of several score lines for an image the last counts: answers begin with drafts and end with the result. But the last
  two score lines must be about image 1 and image 2, otherwise the answer is ambiguous. A line that repeats the one
  before is ignored.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Dimension = Literal["composition", "image"]
DIMENSIONS: tuple[Dimension, ...] = ("composition", "image")
TOP = 10.0
STEP = 0.5

_MARKS = re.compile(r"[*_`#>|]+")
_BLANKS = re.compile(r"\s+")
_SCORE = (
    r"\s*(?:scores?|rating)?\s*(?:[:：=–—]|-(?=\s))?\s*"
    r"(-?\d{1,9}(?:[.,]\d{1,9})?)\s*(?:/|out\s+of)\s*10(?:\.0+)?(?![.,]?\d)"
)
_LINE = re.compile(
    # Must not match "better than image 2. Composition quality: ..." in an explanation of image 1.
    r"(?:(?<=\bfor )|(?<![a-z] ))\bimage\s*(\d{1,3})[\s:：.)\-–—]*"
    rf"composition\s+quality{_SCORE}"
    rf"(?:(?!\bimage\s*\d|composition\s+quality).){{0,1000}}?\bimage\s+quality{_SCORE}",
    re.IGNORECASE | re.DOTALL,
)
# The beginnings of refusals.
_REFUSAL = re.compile(
    r"\b(?:can(?:no|['’])t|can not|unable to|won['’]t|not able to)\s+(?:\w+\s+){0,3}?"
    r"(?:help|assist|evaluate|compare|rate|provide|comply|identify|analy[sz]e|do\s+that|view|see)",
    re.IGNORECASE,
)
_SHOWN = 80


class UnreadableAnswer(Exception):
    """An answer without usable scores; the message says what is missing."""


@dataclass(frozen=True)
class Scores:
    """The two scores of one picture, 0 to 10."""

    composition: float
    image: float

    def on(self, dimension: Dimension) -> float:
        """The score for `dimension`."""
        return self.composition if dimension == "composition" else self.image


def parse_scores(text: str) -> tuple[Scores, Scores]:
    """The scores of image 1 and of image 2. Raises: UnreadableAnswer."""
    rows = _rows(text)
    if not rows:
        raise UnreadableAnswer(_why_none(text))
    last = dict(rows[-2:])
    for number in (1, 2):
        if number not in dict(rows):
            raise UnreadableAnswer(f"no scores for image {number}")
    if set(last) != {1, 2}:
        raise UnreadableAnswer("its last score lines contradict each other")
    return last[1], last[2]


def _rows(text: str) -> list[tuple[int, Scores]]:
    """(image, its scores) line by line, without lines that only repeat the one before."""
    rows: list[tuple[int, Scores]] = []
    # Blanks are collapsed: on thousands of line breaks at the end the pattern would be very slow.
    plain = _BLANKS.sub(lambda run: "\n" if "\n" in run[0] else " ", _MARKS.sub("", text))
    for match in _LINE.finditer(plain):
        number = int(match[1])
        if number not in (1, 2):
            raise UnreadableAnswer(f"scores for an image {number} that was not shown")
        row = (number, Scores(_on_grid(match[2]), _on_grid(match[3])))
        if row not in rows[-1:]:
            rows.append(row)
    return rows


def _on_grid(text: str) -> float:
    value = float(text.replace(",", "."))
    if not 0 <= value <= TOP:
        raise UnreadableAnswer(f"the score {text}/10 is not between 0 and 10")
    return math.floor(value / STEP + 0.5) * STEP


def _why_none(text: str) -> str:
    shown = " ".join(text.split())
    if not shown:
        return "the answer is empty"
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN].rstrip() + "..."
    said = "the judge declines" if _REFUSAL.search(text) else "no scores in it"
    return f"{said} ({shown!r})"
