"""Unique names: for the columns of a table, and as parts of paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_UNSAFE = re.compile(r"[^\w.-]+")


def numbered(names: Iterable[str]) -> list[str]:
    """The names, with a number after repeated ones: a LoRA may have the name of a mode, such as "base"."""
    found: list[str] = []
    for name in names:
        counted = (name, *(f"{name} ({number})" for number in range(2, len(found) + 2)))
        found.append(next(one for one in counted if one not in found))
    return found


def slugs(names: Sequence[str], *, longest: int = 80) -> dict[str, str]:
    """name -> a unique part of a file name, of at most `longest` letters and a number."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        stem = _UNSAFE.sub("_", name)[:longest].strip("_") or "method"
        numbered = (stem, *(f"{stem}_{n}" for n in range(2, len(names) + 2)))
        found[name] = next(slug for slug in numbered if slug not in taken)
        taken.add(found[name])
    return found
