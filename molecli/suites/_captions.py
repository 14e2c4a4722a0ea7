"""The captions of the embedded image base: its vocabulary and grammar.

"a fox on a red background", "a fox and a mug on ...", "a fox, an owl and a kite in flat style on ...". The builder of
the base (`tools/image_builtin`) uses the same functions.
Contents: Words, read_words, caption, article.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from molecli.catalog.builtin import package_folder

EMOJI = package_folder() / "builtin" / "emoji"


@dataclass(frozen=True)
class Words:
    """objects: what the base can draw; concepts and style: what the embedded LoRAs add; phrases: the backgrounds."""

    objects: tuple[str, ...]
    concepts: tuple[str, ...]
    style: str
    phrases: tuple[str, ...]


@cache
def read_words(file: Path = EMOJI / "objects.json") -> Words:
    """The words in the package's list of objects."""
    tree = json.loads(file.read_text("utf-8"))
    return Words(tuple(tree["base"]), tuple(tree["concepts"]), tree["style"], tuple(tree["backgrounds"]))


def article(word: str) -> str:
    """ "an" before a vowel, else "a"."""
    return "an" if word[0] in "aeiou" else "a"


def caption(words: Sequence[str], phrase: str, style: str = "") -> str:
    """One caption: the objects in this order, the style if any, the phrase of the background."""
    named = [f"{article(word)} {word}" for word in words]
    listed = named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
    return " ".join(part for part in (listed, f"in {style} style" if style else "", phrase) if part)
