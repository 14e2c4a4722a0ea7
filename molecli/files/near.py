"""The nearest known name to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(key: str, known: Iterable[str]) -> str | None:
    """The known name closest to `key`, or None when nothing is close."""
    matches = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggestion(key: str, known: Iterable[str]) -> str:
    """A remedy for the unknown name `key`: "Did you mean 'x'?", or the list of what is known."""
    names = list(known)
    nearest = near(key, names)
    return f"Did you mean {nearest!r}?" if nearest else f"Known: {', '.join(names) or 'none'}."
