"""Concatenation: all factors side by side. This is exactly Σ w_i ΔW_i (Eq. 1 of MoLE), as one LoRA of rank Σ r_i.

Source: PEFT's `cat`. With `rank`, the best approximation of that rank, as in `svd`.
"""

from __future__ import annotations

from molecli.config import MethodConfig
from molecli.functional import factors
from molecli.methods.merges.updates import Result, Updates


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The concatenated LoRA; exact unless `config.rank` is smaller."""
    A, B = factors.cat(updates.factors, updates.weights)
    return factors.truncated(A, B, config.rank) if config.rank is not None else (A, B, 0.0)
