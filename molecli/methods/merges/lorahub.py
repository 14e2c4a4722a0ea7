"""LoRAHub: one weight for each LoRA, found on a few examples without gradients. Source: Huang et al. 2024, 2307.13269.

A = Σ w_i A_i, B = Σ w_i B_i, as in its code; `on: updates` uses Σ w_i ΔW_i, the literal reading of the paper's Eq. 1.
The search is in `training.search_weights`. Departs: every LoRA keeps its own scaling, where the code applies the first
one's to all.
"""

from __future__ import annotations

from molecli.config import MethodConfig
from molecli.methods.merges import cat
from molecli.methods.merges.factorwise import added
from molecli.methods.merges.updates import Result, Updates


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The weighted sum. A single LoRA with weight w gives w² ΔW by factors, w ΔW by updates."""
    if config.on == "updates":
        return cat.merge(updates, config)
    weights = updates.vector
    return added(updates, weights, weights, config.rank)
