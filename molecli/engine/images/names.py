"""Names as parts of paths."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNSAFE = re.compile(r"[^\w.-]+")


def slugs(names: Sequence[str], *, longest: int = 80) -> dict[str, str]:
    """Each name as a part of a file name of at most `longest` letters and a number; two names never share one."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        stem = _UNSAFE.sub("_", name)[:longest].strip("_") or "method"
        numbered = (stem, *(f"{stem}_{n}" for n in range(2, len(names) + 2)))
        found[name] = next(slug for slug in numbered if slug not in taken)
        taken.add(found[name])
    return found
