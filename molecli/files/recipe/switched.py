"""Which LoRAs of a composition are on: `mask` and `only`, one of each or several side by side.

Switched    one choice: the names that are off, the names that alone stay on
choices     what a recipe's `mask` and `only` say -> every choice
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Switched(NamedTuple):
    """The LoRAs in `mask` are off, and with `only` all that it does not name."""

    mask: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What stands behind a method's name: " only a without b"; "" where every LoRA is on."""
        kept = f" only {', '.join(self.only)}" if self.only else ""
        return kept + (f" without {', '.join(self.mask)}" if self.mask else "")


def choices(mask: Sequence[Any], only: Sequence[Any]) -> tuple[Switched, ...]:
    """Every mask with every only, each pair once; either is one list of names or a list of such lists."""
    pairs = (Switched(tuple(off), tuple(kept)) for off in _each(mask) for kept in _each(only))
    return tuple(dict.fromkeys(pairs))


def _each(names: Sequence[Any]) -> Sequence[Any]:
    return names if names and not isinstance(names[0], str) else (names,)
