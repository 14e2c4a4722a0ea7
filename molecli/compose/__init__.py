"""The composition methods: one file each, one row each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from molecli.errors import UsageError


@dataclass(frozen=True)
class Method:
    """A row of the table: `target` is module:attribute, imported when used."""

    name: str
    level: str
    trained: bool
    paper: str
    summary: str
    target: str


METHODS = {
    method.name: method
    for method in (
        Method(
            "gated",
            "site",
            True,
            "MoLE, ICLR 2024",
            "learned gates weight the LoRAs by the input",
            "molecli.compose.gated:build_gates",
        ),
        Method("linear", "weights", False, "MoLE Eq. 1", "the sum of all LoRAs", "molecli.compose.linear:gate"),
        Method(
            "nla", "weights", False, "MoLE Eq. 2", "the sum with weights that add up to 1", "molecli.compose.nla:gate"
        ),
        Method("single", "weights", False, "Hu et al. 2021", "one LoRA alone", "molecli.compose.single:gate"),
    )
}


def get_method(name: str) -> Method:
    """The method called `name`. Raises: UsageError that names the nearest."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(METHODS)}."
        raise UsageError("--mode", f"no composition method {name!r}", hint)
    return METHODS[name]
