"""DARE's drop in place of TIES' trim, then TIES' election and mean. Source: 2311.03099 with 2306.01708."""

from __future__ import annotations

from molecli.compose.dare import dropped
from molecli.compose.updates import Result, Updates
from molecli.files.recipe import MethodConfig
from molecli.functional.factors import factored
from molecli.functional.merging import elected_mean


def merge(updates: Updates, config: MethodConfig) -> Result:
    """Of each update a random share `config.density` stands for election."""
    kept = updates.scaled(dropped(updates, config))
    return factored(elected_mean(kept), config.rank or updates.width)
