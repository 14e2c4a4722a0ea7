"""The best approximation of Σ w_i ΔW_i with a given rank, by default the largest rank of the LoRAs.

Source: PEFT's `svd`. Departs: PEFT up to 0.20 multiplies every update by its scaling twice.
"""

from __future__ import annotations

from molecli.config import MethodConfig
from molecli.functional import factors
from molecli.methods.merges.updates import Result, Updates


def merge(updates: Updates, config: MethodConfig) -> Result:
    """Eckart-Young on the stacked factors, without computing a dense update."""
    A, B = factors.cat(updates.factors, updates.weights)
    return factors.truncated(A, B, config.rank or max(updates.ranks))
