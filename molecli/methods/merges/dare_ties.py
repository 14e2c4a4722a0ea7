"""DARE's random drop instead of TIES' trim, then TIES' election and mean. Source: 2311.03099 with 2306.01708."""

from __future__ import annotations

from molecli.config import MethodConfig
from molecli.functional.factors import factored
from molecli.functional.merging import elected_mean
from molecli.methods.merges.dare import dropped
from molecli.methods.merges.updates import Result, Updates


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The elected mean of the updates, each with a random share `config.density` of its entries."""
    kept = updates.scaled(dropped(updates, config))
    return factored(elected_mean(kept), config.rank or updates.width)
