"""User errors. `molecli.cli.app` turns them into a message and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class UserError(Exception):
    """A mistake that the user can correct. Its message is *where: what is wrong. What to do.*"""

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        self.where, self.what, self.remedy = where, what, remedy
        super().__init__(f"{where}: {what}." + (f" {remedy}" if remedy else ""))


class RunError(UserError):
    """Failed while running."""

    exit_code = 1


class UsageError(UserError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class MismatchError(UserError):
    """Base, LoRAs and gates do not belong together, or a file is damaged."""

    exit_code = 3


def near(key: str, known: Iterable[str]) -> str | None:
    """The known name closest to `key`, or None if none is close."""
    matches = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggestion(key: str, known: Iterable[str]) -> str:
    """A remedy for the unknown name `key`: "Did you mean 'x'?", or the list of known names."""
    names = list(known)
    nearest = near(key, names)
    return f"Did you mean {nearest!r}?" if nearest else f"Known: {', '.join(names) or 'none'}."
