"""Inputs by name for the methods on a UNet's outputs: the order of LoRAs as indices, and the triggers.

Contents: turns, words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from molecli.errors import UsageError, suggestion


def turns(order: Sequence[str], names: Sequence[str]) -> list[int]:
    """The indices of `names` in the order of `order`; in their own order if it is empty.

    Raises: UsageError for an order that does not name each of these experts once.
    """
    for name in order:
        if name not in names:
            raise UsageError("method.order", f"there is no LoRA {name!r}", suggestion(name, tuple(names)))
    missing = [name for name in names if name not in order]
    if order and (missing or len(order) != len(names)):
        what = f"it leaves out {', '.join(missing)}" if missing else "it names a LoRA twice"
        raise UsageError("method.order", what, f"Name each LoRA once: {', '.join(names)}.")
    return [names.index(name) for name in order or names]


def words(mode: str, names: Sequence[str], triggers: Mapping[str, str]) -> list[str]:
    """The trigger of each expert. Raises: UsageError for an expert without one, because the mode needs it."""
    found = [triggers.get(name, "").strip() for name in names]
    for name, trigger in zip(names, found, strict=True):
        if not trigger:
            what = f"mode {mode} needs the LoRA's trigger words, and none are known"
            raise UsageError(name, what, f"Write concepts.{name}.trigger in the recipe, or use another mode.")
    return found
