"""The weighted sum of the updates' largest entries. Source: PEFT's `magnitude_prune`, on ΔW instead of A and B."""

from __future__ import annotations

from molecli.config import MethodConfig
from molecli.functional.factors import factored
from molecli.functional.merging import trim
from molecli.methods.merges.updates import Result, Updates

DENSITY = 0.2


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The sum of the updates, each with the share `config.density` of its largest entries."""
    kept = trim(updates.dense(), config.density or DENSITY)
    return factored(updates.scaled(kept).sum(0), config.rank or updates.width)
