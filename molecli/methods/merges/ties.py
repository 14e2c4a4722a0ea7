"""TIES: trim, elect a sign for every entry, average the updates that agree. Source: Yadav et al. 2023, 2306.01708.

Departs: the weights are applied before the election, and the trim is by matrix; see `functional.merging`. λ is `scale`.
"""

from __future__ import annotations

from molecli.config import MethodConfig
from molecli.functional.factors import factored
from molecli.functional.merging import elected_mean, trim
from molecli.methods.merges.updates import Result, Updates

DENSITY = 0.2


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The elected mean of the updates, each trimmed to the share `config.density` of its entries."""
    kept = updates.scaled(trim(updates.dense(), config.density or DENSITY))
    return factored(elected_mean(kept), config.rank or updates.width)
